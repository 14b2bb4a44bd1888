"""Base weights -> repository folder, as `upload.py build` makes it."""

import collections
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import audio, image, text
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, Qwen2VLForConditionalGeneration, WhisperForConditionalGeneration

import upload
from configuration_qwen2_audio_vl import EXAMPLES, SHIPPED_FILES
from demo.bases import make_qwen2_vl, make_whisper
from evaluation import __main__ as evaluation
from publishing import build as building
from publishing import check as checking
from publishing import checkpoints, paths
from training import train


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
    assert set(paths.files_of(repo)) == {
        ".gitattributes",
        "LICENSE",
        "README.md",
        "SHA256SUMS",
        "app.py",
        "audio_decoding.py",
        "audio_download.py",
        "audio_utils.py",
        "collator.py",
        "chat_template.jinja",
        "config.json",
        "configuration_qwen2_audio_vl.py",
        "examples/photo.png",
        "examples/speech.mp3",
        "generation_config.json",
        "handler.py",
        "model.safetensors",
        "modeling_qwen2_audio_vl.py",
        "mrope_positions.py",
        "processing_qwen2_audio_vl.py",
        "processor_config.json",
        "requirements.txt",
        "serve.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name, source in {"chat_template.jinja": "chat_template.jinja", **SHIPPED_FILES}.items():
        assert (repo / name).read_bytes() == (paths.ROOT / source).read_bytes()
    sums = [line.split("  ") for line in (repo / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in sums} == set(paths.files_of(repo)) - {"SHA256SUMS"}
    for checksum, name in sums:
        assert hashlib.sha256((repo / name).read_bytes()).hexdigest() == checksum


def test_weights_are_those_of_the_bases(repo, bases):
    built, base = load(repo), load(bases["qwen2_vl"])
    stock = Qwen2VLForConditionalGeneration.from_pretrained(bases["qwen2_vl"]).state_dict()
    whisper = WhisperForConditionalGeneration.from_pretrained(bases["whisper"]).model.encoder.state_dict()
    assert any(name.startswith("visual.") for name in base)  # the base has the names of published checkpoints
    markers = {151658: 151652, 151659: 151653}
    for name, tensor in stock.items():
        expected = tensor.clone()
        if name == checkpoints.EMBEDDINGS:
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
    assert set(building.AUDIO_TOKENS) <= set(tokenizer.all_special_tokens)


def test_the_left_is_padded_also_if_the_base_names_no_side(bases, tmp_path):
    shutil.copytree(bases["qwen2_vl"], tmp_path / "base")
    config = tmp_path / "base" / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings.pop("padding_side", None)
    config.write_text(json.dumps(settings | {"tokenizer_class": "TokenizersBackend"}))
    building.build_tokenizer(tmp_path / "base").save_pretrained(tmp_path / "built")
    assert json.loads((tmp_path / "built" / "tokenizer_config.json").read_text())["padding_side"] == "left"


@pytest.mark.parametrize("names", [["tokenizer.json"], ["tokenizer_config.json", "tokenizer.json"], ["config.json"]])
def test_missing_files_of_the_bases_are_named(names, bases, repo, tmp_path):
    """transformers would make a tokenizer of no words, or a configuration of its own defaults."""
    folders = {"base": bases["qwen2_vl"], "audio_encoder": bases["whisper"], "checkpoint": repo}
    copies = {part: Path(shutil.copytree(folder, tmp_path / part)) for part, folder in folders.items()}
    for part, folder in copies.items():
        lost = [name for name in names if (folder / name).is_file()]
        for name in lost:
            (folder / name).rename(tmp_path / name)
        others = {} if part == "checkpoint" else {name: copies[name] for name in ("base", "audio_encoder")}
        if lost:
            with pytest.raises(ValueError, match=f"^{re.escape(str(folder))} lacks {', '.join(names)}; copy what"):
                upload.build(output=tmp_path / "out", **{**others, part: folder})
        for name in lost:
            (tmp_path / name).rename(folder / name)
    assert not (tmp_path / "out").exists()


def test_current_tensor_names_give_the_same_folder(bases, repo, tmp_path):
    rename, rules = checkpoints.rename, checkpoints.BASE_NAMES
    base = copy_base(bases["qwen2_vl"], tmp_path / "base", lambda name: rename(name, rules))
    encoder = copy_base(bases["whisper"], tmp_path / "encoder", lambda name: name.removeprefix("model."))
    built = upload.build(base, encoder, tmp_path / "out")
    assert (built / "model.safetensors").read_bytes() == (repo / "model.safetensors").read_bytes()


def test_hub_ids(bases, repo, tmp_path):
    """Read from the cache of the Hub's client here, as there is no network; a download fills the same cache."""
    commits = {"qwen2_vl": "1" * 40, "whisper": "2" * 40}
    for name, commit in commits.items():
        cached = Path(os.environ["HF_HOME"]) / "hub" / f"models--someone--{name}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(commit)
        shutil.copytree(bases[name], cached / "snapshots" / commit)
    built = upload.build("someone/qwen2_vl", "someone/whisper", tmp_path / "out")
    assert (built / "model.safetensors").read_bytes() == (repo / "model.safetensors").read_bytes()
    card = ModelCard.load(built / "README.md")
    assert card.data.base_model == ["someone/qwen2_vl", "someone/whisper"]
    assert card.data.base_model_relation == "merge"
    assert f"- base: someone/qwen2_vl at commit `{'1' * 40}`" in card.text


def test_card(repo):
    card = ModelCard.load(repo / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "any-to-any"
    assert card.data.license == "apache-2.0" and "custom_code" in card.data.tags
    assert [widget["src"] for widget in card.data.widget] == list(EXAMPLES)
    first_lines = card.text.strip().splitlines()[:3]
    assert first_lines[0] == "# qwen2-audio-vl" and "untrained" in first_lines[2]
    assert re.search(r"\n- [0-9,]{10} parameters in float32, 0.08 GB\n", card.text)
    for section in ("What it takes", "Limits", "Training", "Licence and citation"):
        assert f"\n## {section}\n" in card.text
    for word in ("make test", "development", "facts of the build", "benchmarks/", "upload.py push"):
        assert word not in card.text


def test_tied_embeddings(bases, tmp_path):
    base = make_qwen2_vl(tmp_path / "base", tie_word_embeddings=True)
    built = upload.build(base, bases["whisper"], tmp_path / "out")
    assert "lm_head.weight" not in load(built)
    model, info = AutoModel.from_pretrained(built, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_bf16_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_SHARD_SIZE", "25MB")
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
        load(upload.build(bases["qwen2_vl"], bases["whisper"], tmp_path / str(n), seed=seed))[checkpoints.PROJECTOR]
        for n, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(projectors[0], projectors[1]) and not torch.equal(projectors[0], projectors[2])


@pytest.mark.parametrize("chunk", [24, 1000, 2**24])
def test_weights_do_not_depend_on_the_chunks_they_are_copied_in(chunk, bases, tmp_path, monkeypatch):
    """Rows of the markers lie across chunks, and float32 becomes bfloat16."""
    base = tmp_path / "base"
    shutil.copytree(bases["qwen2_vl"], base)
    settings = json.loads((base / "config.json").read_text())
    settings["dtype"] = settings["text_config"]["dtype"] = "bfloat16"
    (base / "config.json").write_text(json.dumps(settings))
    embeddings = load(base)["model.embed_tokens.weight"][151_600:151_700].clone()
    tensors = load(base) | {"model.embed_tokens.weight": embeddings}
    save_file(tensors, base / "model.safetensors")
    plan = {tensor.name: tensor for tensor in checkpoints.stored_tensors(base)}
    monkeypatch.setattr(checkpoints, "CHUNK", chunk)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "visual.patch_embed.proj.weight"):
        for dtype in (torch.float32, torch.bfloat16):
            content = b"".join(checkpoints.read_bytes(plan[name], dtype))
            assert content == tensors[name].to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    stored = plan["model.embed_tokens.weight"]
    row = b"".join(checkpoints.read_bytes(stored, torch.float32, slice(3, 4)))
    chunks = checkpoints.replace_rows(checkpoints.read_bytes(stored, torch.float32), {7: row, 9: row})
    embeddings[7] = embeddings[9] = embeddings[3]
    assert b"".join(chunks) == embeddings.numpy().tobytes()


def test_trained_projector(bases, tmp_path):
    trained = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    save_file({"audio_projector.weight": trained}, tmp_path / "projector.safetensors")
    torch.save({"model.audio_projector.weight": trained}, tmp_path / "projector.pt")
    parts = bases["qwen2_vl"], bases["whisper"]
    for name in ("projector.safetensors", "projector.pt"):
        built = upload.build(*parts, tmp_path / f"with-{name}", projector=tmp_path / name)
        assert torch.equal(load(built)[checkpoints.PROJECTOR], trained)
        card = (built / "README.md").read_text()
        assert "The projector is trained." in card and "untrained" not in card


def test_trained_checkpoint_without_code(repo, tmp_path):
    """What a trained model was saved as; its code, card and checksums come with the build."""
    trained = tmp_path / "trained"
    trained.mkdir()
    for name in ("config.json", "generation_config.json", "processor_config.json", "model.safetensors"):
        shutil.copyfile(repo / name, trained / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(repo / name, trained / name)
    built = upload.build(checkpoint=trained, output=tmp_path / "built")
    assert paths.files_of(built) == paths.files_of(repo)
    same = set(paths.files_of(repo)) - {"README.md", paths.CHECKSUMS, "tokenizer_config.json"}
    assert all((built / name).read_bytes() == (repo / name).read_bytes() for name in same)
    assert "The projector is trained." in (built / "README.md").read_text()
    checking.check_files(built)


@pytest.mark.parametrize("given", [(), ("checkpoint", "base"), ("base",), ("checkpoint", "adapter")])
def test_build_is_told_either_bases_or_a_checkpoint(bases, repo, tmp_path, given):
    known = {"checkpoint": repo, "base": bases["qwen2_vl"], "adapter": repo}
    with pytest.raises(ValueError, match="Give either --base and --audio-encoder, or --checkpoint"):
        upload.build(output=tmp_path / "out", **{name: known[name] for name in given})
    with pytest.raises(ValueError, match="holds a qwen2_vl model; --checkpoint has to be one"):
        upload.build(checkpoint=bases["qwen2_vl"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_projectors_are_refused(bases, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    save_file({"audio_projector.weight": torch.zeros(64, 32)}, tmp_path / "shape.safetensors")
    save_file({"projector.weight": torch.zeros(64, 64)}, tmp_path / "name.safetensors")
    save_file(
        {n: torch.zeros(2) for n in ("audio_projector.weight", "audio_projector.bias")}, tmp_path / "two.safetensors"
    )
    torch.save({"audio_projector.weight": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, message in (
        ("shape.safetensors", r"misshapen: model.audio_projector.weight is \(64, 32\), the model's is \(64, 64\)"),
        (
            "name.safetensors",
            "holds projector.weight; expected audio_projector.weight, and perhaps audio_markers.weight",
        ),
        ("two.safetensors", "holds model.audio_projector.bias, model.audio_projector.weight; expected"),
        ("evil.pt", "is no file of tensors by name"),
        ("text.safetensors", "is no file of tensors by name"),
        ("missing.pt", "is no file of tensors by name"),
    ):
        with pytest.raises(ValueError, match=message):
            upload.build(bases["qwen2_vl"], bases["whisper"], tmp_path / "out", projector=tmp_path / name)
        assert not (tmp_path / "out").exists() and not (tmp_path / "evil").exists()


def test_trained_checkpoint_of_the_first_layout(bases, repo, tmp_path, ask, sound, photo):
    """Weights under the names that were published first give the same logits, their markers' rows included."""
    generator = torch.Generator().manual_seed(6)
    tensors = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in load(repo).items()
    }
    first = {}
    for name, tensor in tensors.items():
        for now, then in (
            ("model.visual.", "visual."),
            ("model.language_model.", "model."),
            ("model.audio_encoder.", "audio_encoder."),
            ("model.audio_projector.", "audio_projector."),
        ):
            if name.startswith(now):
                name = then + name.removeprefix(now)
                break
        first[name] = tensor
    (tmp_path / "first").mkdir()
    save_file(first, tmp_path / "first" / "model.safetensors")
    built = upload.build(bases["qwen2_vl"], bases["whisper"], tmp_path / "out", adapter=tmp_path / "first")
    after = load(built)
    assert after.keys() == tensors.keys() and all(torch.equal(after[name], tensors[name]) for name in after)

    before = AutoModel.from_pretrained(repo, trust_remote_code=True)
    before.load_state_dict(tensors)
    inputs = ask(image(str(photo)), audio(sound(0.5)), text("?"))
    with torch.no_grad():
        now = AutoModel.from_pretrained(built, trust_remote_code=True)
        assert torch.equal(before(**inputs).logits, now(**inputs).logits)

    del first["audio_projector.weight"]
    save_file(first, tmp_path / "first" / "model.safetensors")
    with pytest.raises(ValueError, match="missing: model.audio_projector.weight"):
        upload.build(bases["qwen2_vl"], bases["whisper"], tmp_path / "incomplete", adapter=tmp_path / "first")


def test_a_full_disk_is_seen_first(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: collections.namedtuple("usage", "free")(10**7))
    with pytest.raises(ValueError, match=r"needs 0.1 GB, but its disk has 0.0 GB free"):
        upload.build(bases["qwen2_vl"], bases["whisper"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_files_that_are_cut_short_are_refused(bases, tmp_path):
    for size in (0, 5, 1000, 10**6):
        base = copy_base(bases["qwen2_vl"], tmp_path / str(size))
        os.truncate(base / "model.safetensors", size)
        with pytest.raises(ValueError, match="cut short"):
            upload.build(base, bases["whisper"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_killed_build_leaves_nothing_that_looks_complete(bases, repo, tmp_path):
    """Eight kills at random moments, half of them while it writes; after each a run gives the very same folder."""
    code = f"""
        import os, random, shutil, signal, sys, time
        from pathlib import Path
        sys.path.insert(0, {str(paths.ROOT)!r})
        import torch, upload
        from publishing import checkpoints, paths
        torch.set_num_threads(1)
        checkpoints.CHUNK = 2**16
        target = Path({str(tmp_path / "out")!r})

        def unfinished():
            return any(target.parent.glob(".out.*.unfinished"))

        def build():
            upload.build({str(bases["qwen2_vl"])!r}, {str(bases["whisper"])!r}, target)

        def content():
            return {{name: (target / name).read_bytes() for name in paths.files_of(target)}}

        build()
        shutil.rmtree(target)
        start = time.monotonic()
        build()  # once more, warm as the children are
        took, expected = time.monotonic() - start, content()
        generator, early, writing = random.Random(0), 0, 0
        for number in range(8):
            shutil.rmtree(target)
            child = os.fork()
            if not child:
                build()
                os._exit(0)
            if number % 2:
                start = time.monotonic()
                while not unfinished() and time.monotonic() < start + 10 * took:
                    time.sleep(0.001)
                time.sleep(generator.uniform(0, took / 10))
            else:
                time.sleep(generator.uniform(0, took))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            early += not target.exists()
            writing += unfinished()
            if target.exists():
                assert content() == expected
            else:
                build()
            assert content() == expected and [path.name for path in target.parent.iterdir()] == ["out"]
        print(early, writing)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    early, writing = map(int, done.stdout.split())
    assert early >= 2 and writing >= 1  # the kills hit builds, some of them while they wrote
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (repo / "SHA256SUMS").read_bytes()


def test_check_refuses_what_must_not_be_published(repo, tmp_path):
    """By files alone, so nothing is loaded."""

    def damaged(change) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(repo, tmp_path / "copy")
        change(tmp_path / "copy")
        return tmp_path / "copy"

    def flip(name):
        def change(folder):
            content = bytearray((folder / name).read_bytes())
            content[len(content) // 2] ^= 1
            (folder / name).write_bytes(content)

        return change

    def link(name):
        def change(folder):
            (folder / name).unlink()
            (folder / name).symlink_to("/etc/hostname")
            paths.write_checksums(folder, {})

        return change

    def map_elsewhere(folder):
        settings = json.loads((folder / "config.json").read_text())
        settings["auto_map"]["AutoModel"] = "someone/else--" + settings["auto_map"]["AutoModel"]
        (folder / "config.json").write_text(json.dumps(settings))
        paths.write_checksums(folder, {})

    def add_code(folder):
        with (folder / "audio_utils.py").open("a") as file:
            file.write("raise RuntimeError('must not run')\n")
        paths.write_checksums(folder, {})

    def lose_a_tensor(folder):
        tensors = load(folder)
        del tensors["model.language_model.norm.weight"]
        save_file(tensors, folder / "model.safetensors")
        paths.write_checksums(folder, {})

    def change_card(old, new):
        def change(folder):
            card = folder / "README.md"
            card.write_text(card.read_text().replace(old, new))
            paths.write_checksums(folder, {})

        return change

    for change, message in (
        (lambda folder: (folder / "model.bin").touch(), "unexpected files: model.bin .* never pickle"),
        (lambda folder: (folder / "notes.txt").touch(), "unexpected files: notes.txt"),
        (lambda folder: (folder / "audio_utils.py").unlink(), "missing files: audio_utils.py"),
        (lambda folder: (folder / "LICENSE").unlink(), "differ in LICENSE"),
        (flip("model.safetensors"), "content of model.safetensors is not what SHA256SUMS says"),
        (flip("modeling_qwen2_audio_vl.py"), "content of modeling_qwen2_audio_vl.py"),
        (link("examples/photo.png"), "links to files elsewhere: examples/photo.png"),
        (map_elsewhere, "auto_map of config.json"),
        (add_code, "code in audio_utils.py is not this checkout's"),
        (lose_a_tensor, "missing: model.language_model.norm.weight"),
        (change_card("license: apache-2.0", "licence: apache-2.0"), "README.md has no license"),
        (change_card("examples/photo.png", "examples/other.png"), "shows examples/other.png, which is not there"),
    ):
        with pytest.raises(ValueError, match=message):
            checking.check_files(damaged(change))
    assert (
        checking.check_files(damaged(lambda folder: None))["weights"] == "96 tensors, names and shapes are the model's"
    )


def run_main(*arguments) -> int:
    """upload.py's exit code. In this process, as starting another one takes 5 s."""
    try:
        upload.main(list(map(str, arguments)))
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "nowhere/", "no\\where"])
def test_a_folder_that_is_not_there_is_named(name, bases, tmp_path, capsys):
    """By every tool that takes a folder or a Hub id; nothing else is read or written before."""
    build = ["build", "--output", tmp_path / "out"]
    parts = ["--base", bases["qwen2_vl"], "--audio-encoder", bases["whisper"]]
    data = ["--data", tmp_path / "rows.jsonl"]  # which is not there either
    for tool, *arguments in (
        (upload, *build, "--base", name, *parts[2:]),
        (upload, *build, *parts[:2], "--audio-encoder", name),
        (upload, *build, *parts, "--adapter", name),
        (upload, *build, "--checkpoint", name),
        (upload, "check", name),
        (evaluation, "predict", name, *data, "--output", tmp_path / "out"),
        (train, "--model", name, *data, "--output_dir", tmp_path / "out"),
    ):
        with pytest.raises(SystemExit, match="1"):
            tool.main(list(map(str, arguments)))
        assert capsys.readouterr().err.endswith(f": There is no folder {name}, and it is no Hub id either.\n")
    for tool, *arguments in ((upload, "push", name, "a/b"), (evaluation, "score", name)):
        with pytest.raises(SystemExit, match="1"):
            tool.main(arguments)
        assert re.search(
            rf": There is no folder ({re.escape(name)}|{re.escape(str(Path(name)))}); .* makes one",
            capsys.readouterr().err,
        )
    for tool, *arguments in (
        (evaluation, "predict", tmp_path, *data, "--output", tmp_path / "out"),
        (train, "--model", tmp_path, *data, "--output_dir", tmp_path / "out"),
    ):
        with pytest.raises(SystemExit, match="1"):
            tool.main(list(map(str, arguments)))
        assert f"{tmp_path} lacks config.json, processor_config.json, tokenizer.json" in capsys.readouterr().err
    assert run_main("smoke", name) == 1 and f"{name} is no Hub id; `upload.py check`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["serve.py", pytest.param("app.py", marks=pytest.mark.app)])
def test_servers_name_a_folder_that_is_not_there(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "./nowhere"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(paths.ROOT / script), run_name="__main__")
    message = f"{script}: There is no folder ./nowhere, and it is no Hub id either."
    assert message in (str(end.value), capsys.readouterr().err.strip())


def test_a_model_that_is_not_on_the_hub_is_named(capsys):
    """The name could be a folder's or a Hub id, so the message is about both; the tests have no network."""
    assert run_main("check", "nobody/nothing") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "upload.py check: There is no folder nobody/nothing, and it cannot be downloaded from the Hub: "
    )


def test_check_tells_by_its_exit_code(repo, tmp_path, capsys):
    """A folder whose code does not load: its files alone look right."""
    shutil.copytree(repo, tmp_path / "broken")
    with (tmp_path / "broken" / "processing_qwen2_audio_vl.py").open("a") as file:
        file.write("\nraise RuntimeError('broken code')\n")
    paths.write_checksums(tmp_path / "broken", {})
    assert run_main("check", repo) == 0 and "answer to audio and picture" in capsys.readouterr().out
    assert run_main("check", tmp_path / "broken") == 1
    assert "code in processing_qwen2_audio_vl.py is not this checkout's" in capsys.readouterr().err
    assert run_main("check", tmp_path / "broken", "--trust-code") == 1
    errors = capsys.readouterr().err
    assert "does not load or answer" in errors and "broken code" in errors


def test_hostile_headers_are_refused(bases, tmp_path):
    """Offsets that overlap, are negative, twice the same or beyond the file, and an index that leaves its folder."""
    base = copy_base(bases["qwen2_vl"], tmp_path / "base")
    content = (base / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    first, second = sorted(
        (name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"]
    )[:2]
    for offsets in (header[first]["data_offsets"], [-8, 8], [8, 0], [0, 2**62], [0.5, 8], ["0", 8], [], None):
        changed = header | {second: {**header[second], "data_offsets": offsets}}
        text = json.dumps(changed).encode()
        (base / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
        with pytest.raises(ValueError, match="no safetensors file, or is cut short"):
            upload.build(base, bases["whisper"], tmp_path / "out")
    for text in (b"[]", b"null", b"[" * 10**6, b"\xff\xfe", b'{"x": 3}'):
        (base / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(ValueError, match="no safetensors file, or is cut short"):
            upload.build(base, bases["whisper"], tmp_path / "out")
    (base / "model.safetensors").unlink()
    for name in ("../whisper/model.safetensors", "/etc/hostname", "linked.safetensors"):
        (base / "linked.safetensors").unlink(missing_ok=True)
        (base / "linked.safetensors").symlink_to(bases["whisper"] / "model.safetensors")
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(ValueError, match="expected the name of a file beside it"):
            upload.build(base, bases["whisper"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hostile_folders_end_in_a_sentence(repo, tmp_path, capsys):
    for number, (name, content) in enumerate(
        [
            ("config.json", b"[]"),
            ("config.json", b'{"model_type": "qwen2_audio_vl", "text_config": 3}'),
            ("config.json", b"{" * 10**5),
            ("config.json", b"\xff\xfe"),
            ("model.safetensors.index.json", b'{"weight_map": []}'),
            ("processor_config.json", b"3"),
            ("tokenizer.json", b"{}"),
            ("examples/photo.png", None),
        ]
    ):
        folder = Path(shutil.copytree(repo, tmp_path / str(number)))
        if content is None:
            (folder / name).unlink()
            (folder / name).symlink_to("/etc/hostname")
        else:
            (folder / name).write_bytes(content)
        assert run_main("build", "--checkpoint", folder, "--output", tmp_path / "out") == 1, name
        (line, *more) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("upload.py build: ")]
        assert line and not more and not (tmp_path / "out").exists()


def test_two_builds_into_one_folder(bases, repo, tmp_path):
    """One of them makes it, whole; the other says so."""
    command = [sys.executable, paths.ROOT / "upload.py", "build", "--base", bases["qwen2_vl"], "--audio-encoder"]
    command += [bases["whisper"], "--output", tmp_path / "out"]
    builds = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [build.communicate(timeout=300)[1] for build in builds]
    assert sorted(build.returncode for build in builds) == [0, 1]
    assert sum("was made by another build" in text or "is not empty" in text for text in errors) == 1
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (repo / "SHA256SUMS").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_wrong_parts_are_refused_before_anything_is_written(bases, tmp_path):
    norm = "model.norm.weight"
    missing = copy_base(bases["qwen2_vl"], tmp_path / "missing", drop=(norm,))
    extra = copy_base(bases["qwen2_vl"], tmp_path / "extra", lambda name: "model.other" if name == norm else name)
    integers = copy_base(bases["qwen2_vl"], tmp_path / "integers")
    tensors = load(integers)
    save_file(tensors | {norm: tensors[norm].to(torch.int8)}, integers / "model.safetensors")
    extractor, whisper = (copy_base(bases["whisper"], tmp_path / name) for name in ("extractor", "whisper"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bases["qwen2_vl"] / name, whisper / name)
    settings = json.loads((extractor / "preprocessor_config.json").read_text())
    (extractor / "preprocessor_config.json").write_text(json.dumps(settings | {"feature_size": 80}))
    for base, encoder, message in (
        (missing, bases["whisper"], "missing: model.language_model.norm.weight"),
        (extra, bases["whisper"], r"unexpected: model.other \(there as model.other\)"),
        (integers, bases["whisper"], "of dtype I8: model.language_model.norm.weight; expected one of F32, F16, BF16"),
        (bases["qwen2_vl"], extractor, "feature_size is 80, but the model's num_mel_bins is 128"),
        (whisper, bases["whisper"], "holds a whisper model; --base has to be a Qwen2-VL checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            upload.build(base, encoder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="There is no folder nowhere; `upload.py build`"):
        upload.push("nowhere", "someone/model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        upload.build(bases["qwen2_vl"], bases["whisper"], tmp_path / "full")


def test_command_line(bases, tmp_path, monkeypatch, capsys):
    arguments = ["build", "--base", bases["qwen2_vl"], "--audio-encoder", bases["whisper"], "--output", "out"]
    command = [sys.executable, paths.ROOT / "upload.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "out is ready" in done.stdout and (tmp_path / "out" / "model.safetensors").is_file()
    monkeypatch.chdir(tmp_path)
    assert run_main(*arguments) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("upload.py build: out is not empty")
