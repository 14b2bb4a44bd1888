"""make test ONLY=tests/test_gguf.py: what files for llama.cpp hold. make test-gguf: what an unpatched one answers."""

import json
import re
import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from demo.bases import make_bases
from publishing.build import build
from publishing.check import check_files
from publishing.gguf import add_files, export, find_pre_tokenizer
from publishing.paths import load_processor


@pytest.fixture(scope="module")
def exported(repo_of_few_words, tmp_path_factory):
    """The two files of the small random model, in float32."""
    return export(repo_of_few_words, tmp_path_factory.mktemp("gguf"), "f32")


@pytest.fixture(scope="module")
def weights(repo_of_few_words) -> dict[str, torch.Tensor]:
    return load_file(repo_of_few_words / "model.safetensors")


def read(path) -> dict[str, np.ndarray]:
    """Reads the tensors of a file as float32."""
    reader = GGUFReader(path)
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def field(path, name: str):
    return GGUFReader(path).get_field(name).contents()


def test_every_weight_is_in_one_of_the_files(exported, weights, repo_of_few_words):
    text, towers = map(read, exported)
    for new, old in (
        ("token_embd.weight", "language_model.embed_tokens.weight"),
        ("output_norm.weight", "language_model.norm.weight"),
        ("blk.1.attn_k.bias", "language_model.layers.1.self_attn.k_proj.bias"),
        ("blk.0.ffn_down.weight", "language_model.layers.0.mlp.down_proj.weight"),
    ):
        assert np.array_equal(text[new], weights[f"model.{old}"]), new
    assert np.array_equal(text["output.weight"], weights["lm_head.weight"])
    for new, old in (
        ("a.position_embd.weight", "audio_encoder.embed_positions.weight"),
        ("a.blk.1.ffn_up.weight", "audio_encoder.layers.1.fc1.weight"),
        ("a.blk.0.attn_out.bias", "audio_encoder.layers.0.self_attn.out_proj.bias"),
        ("mm.a.norm_pre.bias", "audio_encoder.layer_norm.bias"),
        ("v.blk.1.ffn_up.weight", "visual.blocks.1.mlp.fc1.weight"),
        ("v.blk.1.ln2.weight", "visual.blocks.1.norm2.weight"),
        ("mm.2.weight", "visual.merger.mlp.2.weight"),
    ):
        assert np.array_equal(towers[new], weights[f"model.{old}"]), new
    ids = json.loads((repo_of_few_words / "config.json").read_text())
    for new, name in (("v.boi", "audio_bos_token_id"), ("v.eoi", "audio_eos_token_id")):
        assert np.array_equal(towers[new], weights["model.language_model.embed_tokens.weight"][ids[name]])
    joined = np.concatenate([towers[f"v.blk.0.attn_{letter}.weight"] for letter in "qkv"])
    assert np.array_equal(joined, weights["model.visual.blocks.0.attn.qkv.weight"])
    patches = np.stack([towers["v.patch_embd.weight"], towers["v.patch_embd.weight.1"]], axis=2)
    assert np.array_equal(patches, weights["model.visual.patch_embed.proj.weight"])
    # The projector stands there twice, beside two identities and two vectors of zeros; the rows of the markers again.
    count = sum(tensor.numel() for tensor in weights.values())
    projector = weights["model.audio_projector.weight"]
    size, width = projector.shape
    extra = projector.numel() + 2 * width * width + 2 * width + size + 2 * size
    assert sum(tensor.size for part in (text, towers) for tensor in part.values()) == count + extra


def test_glm_projector_is_ours(exported, weights):
    _, towers = map(read, exported)
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    first, second = (torch.from_numpy(towers[f"mm.a.mlp.{number}.weight"].copy()) for number in (1, 2))
    expected = rows @ weights["model.audio_projector.weight"].T
    assert torch.allclose(torch.nn.functional.gelu(rows @ first.T) @ second.T, expected, atol=1e-5)


def test_metadata(exported, repo_of_few_words):
    processor, (text, towers) = load_processor(repo_of_few_words), exported
    assert text.name == f"{repo_of_few_words.name}-F32.gguf" and towers.name == f"mmproj-{text.name}"
    assert field(text, "general.architecture") == "qwen2vl" and field(text, "tokenizer.ggml.pre") == "qwen2"
    assert field(text, "general.license") == field(towers, "general.license") == "apache-2.0"
    assert field(text, "qwen2vl.rope.dimension_sections") == [4, 6, 6, 0]
    assert field(text, "tokenizer.chat_template") == processor.chat_template
    tokens, types = field(text, "tokenizer.ggml.tokens"), field(text, "tokenizer.ggml.token_type")
    vocabulary = processor.tokenizer.get_vocab()
    assert len(tokens) == 448 and all(tokens[number] == token for token, number in vocabulary.items())
    assert {types[processor.tokenizer.convert_tokens_to_ids(name)] for name in ("<|audio_pad|>", "<|im_end|>")} == {3}
    assert types[vocabulary["two"]] == 1 and types[-1] == 5
    assert (
        field(towers, "clip.audio.projector_type") == "glma" and field(towers, "clip.audio.projector.stack_factor") == 1
    )
    sizes = [field(towers, f"clip.vision.image_{name}_pixels") for name in ("min", "max")]
    assert sizes == [112**2, 112**2]


@pytest.mark.parametrize("kind, bound", [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 8e-3)])
def test_types(repo_of_few_words, weights, tmp_path, kind, bound):
    text, towers = map(read, paths_of := export(repo_of_few_words, tmp_path, kind))
    assert all(path.name.endswith(f"-{kind.upper()}.gguf") for path in paths_of)
    expected = weights["model.language_model.layers.0.mlp.up_proj.weight"].numpy()
    error = np.abs(text["blk.0.ffn_up.weight"] - expected).max()
    assert 0 < error < bound * np.abs(expected).max()
    norm = "model.audio_encoder.layers.0.final_layer_norm.weight"
    assert np.array_equal(towers["a.blk.0.ln2.weight"], weights[norm])


def change_json(folder, name: str, **changes):
    content = json.loads((folder / name).read_text())
    for path, value in changes.items():
        *parts, last = path.split("__")
        part = content
        for key in parts:
            part = part[key]
        part[last] = value
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("config.json", {"audio_config__activation_function": "relu"}, "its audio encoder has relu, not gelu"),
        ("config.json", {"vision_config__hidden_act": "gelu"}, "its vision tower has gelu, not quick_gelu"),
        ("config.json", {"text_config__use_sliding_window": True}, "within a sliding window"),
        ("config.json", {"audio_config__scale_embedding": True}, "its audio encoder scales its input"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(repo_of_few_words, tmp_path, name, changes, message):
    folder = shutil.copytree(repo_of_few_words, tmp_path / "repo")
    change_json(folder, name, **changes)
    with pytest.raises(ValueError, match=message):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_windows_of_another_length_are_refused(repo, tmp_path):
    with pytest.raises(
        ValueError, match="its windows have 1 s and 50 positions, and those of llama.cpp 30 s and 1,500"
    ):
        export(repo, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_tensors_are_named(repo_of_few_words, weights, tmp_path):
    folder = shutil.copytree(repo_of_few_words, tmp_path / "repo")
    save_file(
        {n: t for n, t in weights.items() if "conv2.bias" not in n}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="missing: model.audio_encoder.conv2.bias"):
        export(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="must be one of f32, f16, bf16, q8_0, got 'q4_k'"):
        export(repo_of_few_words, tmp_path / "out", "q4_k")


def test_values_past_float16_are_refused(repo_of_few_words, weights, tmp_path):
    folder, name = shutil.copytree(repo_of_few_words, tmp_path / "repo"), "model.visual.blocks.0.mlp.fc1.weight"
    save_file({**weights, name: weights[name] * 1e8}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="v.blk.0.ffn_up.weight has values that float16 cannot hold"):
        export(folder, tmp_path / "out", "f16")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["repo-F16.gguf"]
    export(folder, tmp_path / "out", "bf16")


def test_pre_tokenizers():
    digits, rest = {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}
    steps = {"type": "Sequence", "pretokenizers": [digits, rest]}
    assert find_pre_tokenizer({"pre_tokenizer": steps, "model": {"type": "BPE"}}) == "smollm"
    for wrong in ({**steps, "pretokenizers": [digits, {**rest, "use_regex": False}]}, None):
        with pytest.raises(ValueError, match="expected Qwen2's or SmolLM's"):
            find_pre_tokenizer({"pre_tokenizer": wrong, "model": {"type": "BPE"}})


def test_a_model_of_trimmed_tokens_is_warned_about(repo_of_few_words, tmp_path, caplog):
    folder = shutil.copytree(repo_of_few_words, tmp_path / "repo")
    change_json(folder, "processor_config.json", audio_tokens="trimmed", trained_audio_tokens="trimmed")
    export(folder, tmp_path / "out")
    assert "trained with trimmed audio tokens, and llama.cpp gives it fixed ones" in caplog.text


def test_files_join_a_folder_of_the_same_weights(repo_of_few_words, repo, exported, tmp_path):
    folder = shutil.copytree(repo_of_few_words, tmp_path / "repo")
    source = shutil.copytree(exported[0].parent, tmp_path / "gguf")
    for _ in range(2):  # a second time replaces the first
        add_files(folder, source, "someone/model")
        text = ModelCard.load(folder / "README.md").text
        assert text.count("llama-server -hf someone/model:F32") == 1
        assert sorted(path.name for path in folder.glob("*.gguf")) == sorted(path.name for path in exported)
    assert check_files(folder)["checksums"] == "all equal"
    with pytest.raises(ValueError, match="was not made of the weights in"):
        add_files(shutil.copytree(repo, tmp_path / "other"), source, "someone/model")
    (source / exported[1].name).unlink()
    with pytest.raises(ValueError, match=re.escape(f"{source} has {exported[0].name}; expected what")):
        add_files(folder, source, "someone/model")


def test_bases_that_were_not_proved_are_refused(tmp_path):
    repo = build(*make_bases(tmp_path, "qwen3_vl"), tmp_path / "repo")
    with pytest.raises(ValueError, match="its base is Qwen3-VL, and only files of Qwen2-VL were proved"):
        export(repo, tmp_path / "files")
    assert not (tmp_path / "files").exists()
