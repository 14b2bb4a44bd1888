"""Base weights -> repository folder, as `upload.py build` makes it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, Qwen2VLForConditionalGeneration, WhisperForConditionalGeneration

import upload
from demo.bases import make_qwen2_vl, make_whisper


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def copy_base(folder: Path, target: Path, change_names=lambda name: name, drop=()) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = {change_names(name): tensor for name, tensor in load(folder).items() if name not in drop}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_folder_holds_all_that_a_user_loads(repo):
    assert {path.name for path in repo.iterdir()} == {
        ".gitattributes",
        "LICENSE",
        "README.md",
        "audio_utils.py",
        "chat_template.jinja",
        "config.json",
        "configuration_qwen2_audio_vl.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_qwen2_audio_vl.py",
        "processing_qwen2_audio_vl.py",
        "processor_config.json",
        "requirements.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in (*upload.CODE_FILES, *upload.SHIPPED_FILES, "chat_template.jinja"):
        assert (repo / name).read_bytes() == (upload.HERE / name).read_bytes()


def test_weights_are_those_of_the_bases(repo, bases):
    built, base = load(repo), load(bases["qwen2_vl"])
    stock = Qwen2VLForConditionalGeneration.from_pretrained(bases["qwen2_vl"]).state_dict()
    whisper = WhisperForConditionalGeneration.from_pretrained(bases["whisper"]).model.encoder.state_dict()
    assert any(name.startswith("visual.") for name in base)  # the base has the names of published checkpoints
    markers = {151658: 151652, 151659: 151653}
    for name, tensor in stock.items():
        expected = tensor.clone()
        if name == upload.EMBEDDINGS:
            for marker, teacher in markers.items():
                expected[marker] = tensor[teacher]
        assert torch.equal(built.pop(name), expected), name
    for name, tensor in whisper.items():
        assert torch.equal(built.pop(f"model.audio_encoder.{name}"), tensor), name
    projector = built.pop("model.audio_projector.weight")
    assert not built
    assert projector.shape == (64, 64) and abs(projector.std() - 0.02) < 0.002 and abs(projector.mean()) < 0.002


def test_tokens(repo):
    tokenizer = AutoTokenizer.from_pretrained(repo)
    assert tokenizer.convert_tokens_to_ids(["<|audio_pad|>", "<|audio_bos|>", "<|audio_eos|>"]) == [
        151657,
        151658,
        151659,
    ]
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 32768
    assert set(upload.AUDIO_TOKENS) <= set(tokenizer.all_special_tokens)


def test_current_tensor_names_give_the_same_folder(bases, repo, tmp_path):
    base = copy_base(bases["qwen2_vl"], tmp_path / "base", lambda name: upload.rename(name, upload.BASE_NAMES))
    encoder = copy_base(bases["whisper"], tmp_path / "encoder", lambda name: name.removeprefix("model."))
    built = upload.build(base, encoder, tmp_path / "out")
    assert (built / "model.safetensors").read_bytes() == (repo / "model.safetensors").read_bytes()


def test_hub_ids(bases, repo, tmp_path):
    """Read from the cache of the Hub's client here, as there is no network; a download fills the same cache."""
    for name in ("qwen2_vl", "whisper"):
        cached = Path(os.environ["HF_HOME"]) / "hub" / f"models--someone--{name}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        shutil.copytree(bases[name], cached / "snapshots" / ("0" * 40))
    built = upload.build("someone/qwen2_vl", "someone/whisper", tmp_path / "out")
    assert (built / "model.safetensors").read_bytes() == (repo / "model.safetensors").read_bytes()


def test_tied_embeddings(bases, tmp_path):
    base = make_qwen2_vl(tmp_path / "base", tie_word_embeddings=True)
    built = upload.build(base, bases["whisper"], tmp_path / "out")
    assert "lm_head.weight" not in load(built)
    model, info = AutoModel.from_pretrained(built, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_bf16_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "MAX_SHARD_SIZE", "25MB")
    base = make_qwen2_vl(tmp_path / "base", dtype=torch.bfloat16)
    encoder = make_whisper(tmp_path / "encoder", window_seconds=1, dtype=torch.float16)
    built = upload.build(base, encoder, tmp_path / "out")
    index = json.loads((built / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    tensors = load(built)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    model, info = AutoModel.from_pretrained(built, trust_remote_code=True, dtype="auto", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not info["missing_keys"] and not info["unexpected_keys"]


def test_seed_decides_the_projector(bases, tmp_path):
    projectors = [
        load(upload.build(bases["qwen2_vl"], bases["whisper"], tmp_path / str(n), seed=seed))[upload.PROJECTOR]
        for n, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(projectors[0], projectors[1]) and not torch.equal(projectors[0], projectors[2])


def test_wrong_parts_are_refused_before_anything_is_written(bases, tmp_path):
    norm = "model.norm.weight"
    missing = copy_base(bases["qwen2_vl"], tmp_path / "missing", drop=(norm,))
    extra = copy_base(bases["qwen2_vl"], tmp_path / "extra", lambda name: "model.other" if name == norm else name)
    extractor = copy_base(bases["whisper"], tmp_path / "extractor")
    settings = json.loads((extractor / "preprocessor_config.json").read_text())
    (extractor / "preprocessor_config.json").write_text(json.dumps(settings | {"feature_size": 80}))
    for base, encoder, message in (
        (missing, bases["whisper"], "missing: model.language_model.norm.weight"),
        (extra, bases["whisper"], r"unexpected: model.other \(from model.other\)"),
        (bases["qwen2_vl"], extractor, "feature_size is 80, but the model's num_mel_bins is 128"),
        (bases["whisper"], bases["whisper"], "Qwen2-VL checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            upload.build(base, encoder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        upload.build(bases["qwen2_vl"], bases["whisper"], tmp_path / "full")


def test_command_line(bases, tmp_path):
    command = [sys.executable, upload.HERE / "upload.py", "build", "--base", bases["qwen2_vl"], "--audio-encoder"]
    arguments = {"capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run([*command, bases["whisper"], "--output", "out"], **arguments, check=True)
    assert "out is ready" in done.stdout and (tmp_path / "out" / "model.safetensors").is_file()
    failed = subprocess.run([*command, bases["whisper"], "--output", "out"], **arguments)
    assert failed.returncode == 1 and failed.stderr.strip().splitlines()[-1].startswith(
        "upload.py build: out is not empty"
    )
