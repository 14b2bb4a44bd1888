"""make test ONLY=tests/test_upload.py: base weights -> repository folder, and the command line of upload.py."""

import collections
import hashlib
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import audio, image, start_python, text
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, Qwen2VLForConditionalGeneration, WhisperForConditionalGeneration

import upload
from configuration_qwen2_audio_vl import EXAMPLES, SHIPPED_FILES
from demo.bases import make_qwen2_vl, make_whisper
from evaluation import __main__ as evaluation
from publishing import check as checking
from publishing import checkpoints, paths
from publishing.build import build, build_tokenizer
from publishing.card import replace_section
from training import __main__ as training


NORM = "model.norm.weight"


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def copy_base(folder: Path, target: Path, change_names=lambda name: name, **changed: torch.Tensor | None) -> Path:
    """A copy of a checkpoint with other names; `norm` is another norm, or None to leave it out."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {change_names(name): tensor for name, tensor in load(folder).items()}
    if changed:
        tensors[NORM] = changed["norm"]
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def change_json(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def refuse(bases, tmp_path):
    """Expects an error of a build, which writes nothing. The bases are the small ones unless others are given."""

    def check(message: str, **sources):
        if "checkpoint" not in sources:
            sources = {"base": bases["qwen2_vl"], "audio_encoder": bases["whisper"], **sources}
        with pytest.raises(ValueError, match=message):
            build(output=tmp_path / "out", **sources)
        assert not (tmp_path / "out").exists()

    return check


@pytest.fixture
def run_main(capsys):
    """Runs upload.py, or the `main` of another module, in this process: its exit code, stdout and stderr."""

    def run(*arguments, tool=upload) -> tuple[int, str, str]:
        try:
            tool.main(list(map(str, arguments)))
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_folder_holds_all_that_a_user_loads(repo):
    assert set(paths.files_of(repo)) == {
        *(".gitattributes", "LICENSE", "README.md", "SHA256SUMS", "requirements.txt", "model.safetensors"),
        *("app.py", "collator.py", "handler.py", "serve.py", "audio_decoding.py", "audio_download.py"),
        *("audio_utils.py", "mrope_positions.py", "configuration_qwen2_audio_vl.py", "modeling_qwen2_audio_vl.py"),
        *("processing_qwen2_audio_vl.py", "chat_template.jinja", "config.json", "generation_config.json"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("examples/photo.png", "examples/speech.mp3"),
    }
    for name, source in {"chat_template.jinja": "chat_template.jinja", **SHIPPED_FILES}.items():
        assert (repo / name).read_bytes() == (paths.ROOT / source).read_bytes()
    sums = [line.split("  ") for line in (repo / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in sums} == set(paths.files_of(repo)) - {"SHA256SUMS"}
    assert all(hashlib.sha256((repo / name).read_bytes()).hexdigest() == checksum for checksum, name in sums)
    assert checking.check_files(repo)["weights"] == "96 tensors, names and shapes are the model's"


def test_weights_are_those_of_the_bases(repo, bases):
    built, base = load(repo), load(bases["qwen2_vl"])
    stock = Qwen2VLForConditionalGeneration.from_pretrained(bases["qwen2_vl"]).state_dict()
    whisper = WhisperForConditionalGeneration.from_pretrained(bases["whisper"]).model.encoder.state_dict()
    assert any(name.startswith("visual.") for name in base)  # the base has the names of published checkpoints
    for marker, teacher in ((151658, 151652), (151659, 151653)):
        stock[checkpoints.EMBEDDINGS][marker] = stock[checkpoints.EMBEDDINGS][teacher]
    projector = built.pop("model.audio_projector.weight")
    expected = stock | {f"model.audio_encoder.{name}": tensor for name, tensor in whisper.items()}
    assert built.keys() == expected.keys()
    assert [name for name in built if not torch.equal(built[name], expected[name])] == []
    assert projector.shape == (64, 64) and abs(projector.std() - 0.02) < 0.002 and abs(projector.mean()) < 0.002


def test_tokens(repo):
    tokenizer = AutoTokenizer.from_pretrained(repo)
    tokens = ["<|audio_pad|>", "<|audio_bos|>", "<|audio_eos|>"]
    assert tokenizer.convert_tokens_to_ids(tokens) == [151657, 151658, 151659]
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 32768
    assert set(tokens) <= set(tokenizer.all_special_tokens)


def test_the_left_is_padded_also_if_the_base_names_no_side(bases, tmp_path):
    shutil.copytree(bases["qwen2_vl"], tmp_path / "base")
    config = tmp_path / "base" / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings.pop("padding_side", None)
    config.write_text(json.dumps(settings | {"tokenizer_class": "TokenizersBackend"}))
    build_tokenizer(tmp_path / "base").save_pretrained(tmp_path / "built")
    assert json.loads((tmp_path / "built" / "tokenizer_config.json").read_text())["padding_side"] == "left"


@pytest.mark.parametrize("names", [["tokenizer.json"], ["tokenizer_config.json", "tokenizer.json"], ["config.json"]])
@pytest.mark.parametrize("part", ["base", "audio_encoder", "checkpoint"])
def test_missing_files_of_the_bases_are_named(part, names, bases, repo, tmp_path, refuse):
    """transformers would make a tokenizer of no words, or a configuration of its own defaults."""
    folder = {"base": bases["qwen2_vl"], "audio_encoder": bases["whisper"], "checkpoint": repo}[part]
    if part == "audio_encoder" and names != ["config.json"]:
        pytest.skip("an encoder has no tokenizer")
    copy = shutil.copytree(folder, tmp_path / part, ignore=shutil.ignore_patterns(*names))
    refuse(f"^{re.escape(str(copy))} lacks {', '.join(names)}; copy what", **{part: copy})


def test_current_tensor_names_give_the_same_folder(bases, repo, tmp_path):
    rename, rules = checkpoints.rename, checkpoints.BASE_NAMES
    base = copy_base(bases["qwen2_vl"], tmp_path / "base", lambda name: rename(name, rules))
    encoder = copy_base(bases["whisper"], tmp_path / "encoder", lambda name: name.removeprefix("model."))
    built = build(base, encoder, tmp_path / "out")
    assert (built / "model.safetensors").read_bytes() == (repo / "model.safetensors").read_bytes()


def test_card(repo):
    card = ModelCard.load(repo / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "any-to-any"
    assert card.data.license == "apache-2.0" and "custom_code" in card.data.tags
    assert [widget["src"] for widget in card.data.widget] == list(EXAMPLES)
    assert card.text.strip().startswith("# qwen2-audio-vl\n")
    facts = re.search(r"<!-- facts of the build -->\n(.*)<!-- end of the facts -->\n", card.text, re.DOTALL)[1]
    assert "untrained" in facts and re.search(r"\n- [0-9,]{10} parameters in float32, 0.08 GB\n", facts)
    for section in ("What it takes", "Limits", "Licence and citation"):
        assert f"\n## {section}\n" in card.text
    for words in ("make test", "make demo", "development", "benchmarks/", "upload.py push", "build/demo"):
        assert words not in card.text


def test_a_section_is_replaced_between_its_marks():
    first = replace_section("# Card\n", "results", "one\n")
    assert first == "# Card\n\n<!-- results -->\none\n<!-- end of results -->\n"
    assert replace_section(f"{first}\n## Limits\n", "results", "two\n") == first.replace("one", "two") + "\n## Limits\n"
    assert replace_section("# Card\n", "results", "") == "# Card\n"


def test_tied_embeddings(bases, tmp_path):
    base = make_qwen2_vl(tmp_path / "base", tie_word_embeddings=True)
    built = build(base, bases["whisper"], tmp_path / "out")
    assert "lm_head.weight" not in load(built)
    model, info = AutoModel.from_pretrained(built, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_bf16_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_SHARD_SIZE", "25MB")
    base = make_qwen2_vl(tmp_path / "base", dtype=torch.bfloat16)
    encoder = make_whisper(tmp_path / "encoder", window_seconds=1, dtype=torch.float16)
    built = build(base, encoder, tmp_path / "out")
    index = json.loads((built / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    tensors = load(built)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    model, info = AutoModel.from_pretrained(built, trust_remote_code=True, dtype="auto", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not info["missing_keys"] and not info["unexpected_keys"]


def test_seed_decides_the_projector(bases, tmp_path):
    first, again, other = (
        load(build(bases["qwen2_vl"], bases["whisper"], tmp_path / str(n), seed=seed))[checkpoints.PROJECTOR]
        for n, seed in enumerate((0, 0, 1))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("chunk", [24, 1000, 2**24])
def test_weights_do_not_depend_on_the_chunks_they_are_copied_in(chunk, bases, tmp_path, monkeypatch):
    """Rows of the markers lie across chunks, and float32 becomes bfloat16."""
    base = tmp_path / "base"
    shutil.copytree(bases["qwen2_vl"], base)
    embeddings = load(base)["model.embed_tokens.weight"][151_600:151_700].clone()
    tensors = load(base) | {"model.embed_tokens.weight": embeddings}
    save_file(tensors, base / "model.safetensors")
    plan = {tensor.name: tensor for tensor in checkpoints.stored_tensors(base)}
    monkeypatch.setattr(checkpoints, "CHUNK", chunk)
    for name in ("model.embed_tokens.weight", NORM, "visual.patch_embed.proj.weight"):
        for dtype in (torch.float32, torch.bfloat16):
            content = b"".join(checkpoints.read_bytes(plan[name], dtype))
            assert content == tensors[name].to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    stored = plan["model.embed_tokens.weight"]
    row = b"".join(checkpoints.read_bytes(stored, torch.float32, slice(3, 4)))
    chunks = checkpoints.replace_rows(checkpoints.read_bytes(stored, torch.float32), {7: row, 9: row})
    embeddings[7] = embeddings[9] = embeddings[3]
    assert b"".join(chunks) == embeddings.numpy().tobytes()


@pytest.mark.parametrize("name", ["projector.safetensors", "projector.pt"])
def test_trained_projector(name, bases, tmp_path):
    trained = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    if name.endswith(".pt"):
        torch.save({"model.audio_projector.weight": trained}, tmp_path / name)
    else:
        save_file({"audio_projector.weight": trained}, tmp_path / name)
    built = build(bases["qwen2_vl"], bases["whisper"], tmp_path / "out", projector=tmp_path / name)
    assert torch.equal(load(built)[checkpoints.PROJECTOR], trained)
    card = (built / "README.md").read_text()
    assert "The projector is trained." in card and "untrained" not in card


def test_trained_checkpoint_without_code(repo, tmp_path):
    """What a trained model was saved as; its code, card and checksums come with the build."""
    added = (*SHIPPED_FILES, "README.md", paths.CHECKSUMS, "chat_template.jinja")
    trained = shutil.copytree(repo, tmp_path / "trained", ignore=lambda _, names: {*names} & {*added, "examples"})
    built = build(checkpoint=trained, output=tmp_path / "built")
    assert paths.files_of(built) == paths.files_of(repo)
    same = set(paths.files_of(repo)) - {"README.md", paths.CHECKSUMS, "tokenizer_config.json"}
    assert all((built / name).read_bytes() == (repo / name).read_bytes() for name in same)
    assert "The projector is trained." in (built / "README.md").read_text()
    checking.check_files(built)


@pytest.mark.parametrize("names", [(), ("checkpoint", "base"), ("base",), ("checkpoint", "adapter")])
def test_build_takes_either_bases_or_a_checkpoint(names, bases, repo, tmp_path, run_main):
    sources = {"checkpoint": repo, "base": bases["qwen2_vl"], "adapter": repo}
    message = "Give either --base and --audio-encoder, or --checkpoint."
    with pytest.raises(ValueError, match=message):
        build(output=tmp_path / "out", **{name: sources[name] for name in names})
    options = [option for name in names for option in (f"--{name}", sources[name])]
    assert run_main("build", *options, "--output", tmp_path / "out") == (1, "", f"upload.py build: {message}\n")


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return (os.mkdir, (self.folder,))


def test_wrong_projectors_are_refused(tmp_path, refuse):
    for name, tensors in {
        "shape": {"audio_projector.weight": torch.zeros(64, 32)},
        "name": {"projector.weight": torch.zeros(64, 64)},
        "two": {name: torch.zeros(2) for name in ("audio_projector.weight", "audio_projector.bias")},
    }.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    torch.save({"audio_projector.weight": Evil(tmp_path / "evil")}, tmp_path / "evil.pt")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, message in {
        "shape.safetensors": r"misshapen: model.audio_projector.weight is \(64, 32\), the model's is \(64, 64\)",
        "name.safetensors": "holds projector.weight; expected audio_projector.weight, and perhaps audio_markers.weight",
        "two.safetensors": "holds model.audio_projector.bias, model.audio_projector.weight; expected",
        "evil.pt": "is no file of tensors by name",
        "text.safetensors": "is no file of tensors by name",
        "missing.pt": "is no file of tensors by name",
    }.items():
        refuse(message, projector=tmp_path / name)
    assert not (tmp_path / "evil").exists()


def test_trained_checkpoint_of_the_first_layout(bases, repo, tmp_path, ask, sound, photo, refuse):
    """Weights under the names that were published first give the same logits, their markers' rows included."""
    generator = torch.Generator().manual_seed(6)
    tensors = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in load(repo).items()
    }
    first = {
        re.sub(r"^model\.(visual|audio_encoder|audio_projector)\.", r"\1.", name).replace(
            ".language_model.", "."
        ): tensor
        for name, tensor in tensors.items()
    }
    adapter = tmp_path / "first"
    adapter.mkdir()
    save_file(first, adapter / "model.safetensors")
    built = build(bases["qwen2_vl"], bases["whisper"], tmp_path / "built", adapter=adapter)
    after = load(built)
    assert after.keys() == tensors.keys() and all(torch.equal(after[name], tensors[name]) for name in after)

    before = AutoModel.from_pretrained(repo, trust_remote_code=True)
    before.load_state_dict(tensors)
    inputs = ask(image(str(photo)), audio(sound(0.5)), text("?"))
    with torch.no_grad():
        now = AutoModel.from_pretrained(built, trust_remote_code=True)
        assert torch.equal(before(**inputs).logits, now(**inputs).logits)

    del first["audio_projector.weight"]
    save_file(first, adapter / "model.safetensors")
    refuse("missing: model.audio_projector.weight", adapter=adapter)


def test_a_full_disk_is_seen_first(refuse, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: collections.namedtuple("usage", "free")(10**7))
    refuse(r"needs 0.1 GB, but its disk has 0.0 GB free")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 5, 1000, 10**6])
def test_files_that_are_cut_short_are_refused(size, bases, tmp_path, refuse):
    base = copy_base(bases["qwen2_vl"], tmp_path / "base")
    os.truncate(base / "model.safetensors", size)
    refuse("cut short", base=base)


KILLED = """
    import os, random, shutil, signal, sys, time
    from pathlib import Path
    import torch
    from publishing import build, checkpoints, paths
    torch.set_num_threads(1)
    checkpoints.CHUNK = 2**16
    base, encoder, target = map(Path, sys.argv[1:])

    def make() -> dict:
        build.build(base, encoder, target)
        return content()

    def content() -> dict:
        assert [path.name for path in target.parent.iterdir()] == ["out"]
        return {name: (target / name).read_bytes() for name in paths.files_of(target)}

    expected, early, writing = make(), 0, 0
    for number in range(9):
        shutil.rmtree(target)
        start = time.monotonic()
        if number == 0:  # it is as warm as the children are
            assert make() == expected
            took = time.monotonic() - start
            continue
        child = os.fork()
        if not child:
            make()
            os._exit(0)
        unfinished = lambda: any(target.parent.glob(".out.*.unfinished"))
        while number % 2 and not unfinished() and time.monotonic() < start + 10 * took:
            time.sleep(0.001)
        time.sleep(random.Random(number).uniform(0, took / 10 if number % 2 else took))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        early += not target.exists()
        writing += unfinished()
        assert (content() if target.exists() else make()) == expected
    print(early, writing)
"""


def test_a_killed_build_leaves_nothing_that_looks_complete(bases, repo, tmp_path):
    """Eight kills at random moments, half of them while it writes; after each a run gives the very same folder."""
    process = start_python(KILLED, bases["qwen2_vl"], bases["whisper"], tmp_path / "out", cwd=paths.ROOT)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    early, writing = map(int, output.split())
    assert early >= 2 and writing >= 1  # the kills hit builds, some of them while they wrote
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (repo / "SHA256SUMS").read_bytes()


def replace(old: str, new: str):
    return lambda path: path.write_text(path.read_text().replace(old, new))


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path):
    path.unlink()
    path.symlink_to("/etc/hostname")


def lose_a_tensor(path: Path):
    tensors = load_file(path)
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("name", "change", "with_checksums", "message"),
    [
        ("model.bin", Path.touch, False, "unexpected files: model.bin .* never pickle"),
        ("notes.txt", Path.touch, False, "unexpected files: notes.txt"),
        ("audio_utils.py", Path.unlink, False, "missing files: audio_utils.py"),
        ("LICENSE", Path.unlink, False, "differ in LICENSE"),
        ("model.safetensors", flip, False, "content of model.safetensors is not what SHA256SUMS says"),
        ("modeling_qwen2_audio_vl.py", flip, False, "content of modeling_qwen2_audio_vl.py"),
        ("examples/photo.png", link, True, "links to files elsewhere: examples/photo.png"),
        ("config.json", replace('"AutoModel": "', '"AutoModel": "someone/else--'), True, "auto_map of config.json"),
        ("audio_utils.py", replace("\nimport ", "\nraise 1\nimport "), True, "audio_utils.py is not this checkout's"),
        ("model.safetensors", lose_a_tensor, True, "missing: model.language_model.norm.weight"),
        ("README.md", replace("license: apache", "licence: apache"), True, "README.md has no license"),
        ("README.md", replace("src: examples/photo", "src: other"), True, "shows other.png, which is not there"),
    ],
)
def test_check_refuses_what_must_not_be_published(name, change, with_checksums, message, repo, tmp_path):
    """By files alone, so nothing is loaded."""
    folder = shutil.copytree(repo, tmp_path / "copy")
    change(folder / name)
    if with_checksums:
        paths.write_checksums(folder, {})
    with pytest.raises(ValueError, match=message):
        checking.check_files(folder)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "nowhere/", "no\\where"])
def test_a_folder_that_is_not_there_is_named(name, bases, tmp_path, run_main):
    """By every tool that takes a folder or a Hub id; nothing else is read or written before."""
    output, data = ["--output", tmp_path / "out"], ["--data", tmp_path / "rows.jsonl"]  # neither is there
    base, encoder = ["--base", bases["qwen2_vl"]], ["--audio-encoder", bases["whisper"]]
    no_folder = f": There is no folder {name}, and it is no Hub id either."
    folder = f"({re.escape(name)}|{re.escape(str(Path(name)))})"
    for message, tool, *arguments in (
        (re.escape(no_folder), upload, "build", *output, "--base", name, *encoder),
        (re.escape(no_folder), upload, "build", *output, *base, "--audio-encoder", name),
        (re.escape(no_folder), upload, "build", *output, *base, *encoder, "--adapter", name),
        (re.escape(no_folder), upload, "build", *output, "--checkpoint", name),
        (re.escape(no_folder), upload, "check", name),
        (f": There is no folder {folder}; .* makes one", upload, "push", name, "a/b"),
        (f"{re.escape(name)} is no Hub id; `upload.py check`", upload, "smoke", name),
        (re.escape(no_folder), evaluation, "predict", name, *data, *output),
        (f": There is no folder {folder}; .* makes one", evaluation, "score", name),
        (f"{tmp_path} lacks config.json, processor_config.json", evaluation, "predict", tmp_path, *data, *output),
        (re.escape(no_folder), training, "--model", name, *data, "--output_dir", tmp_path / "out"),
        (f"{tmp_path} lacks config.json", training, "--model", tmp_path, *data, "--output_dir", tmp_path / "out"),
    ):
        code, _, errors = run_main(*arguments, tool=tool)
        assert code == 1 and re.search(message, errors), errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (0, ["--help"], "Base weights -> repository folder -> Hub."),
        (0, ["build", "--help"], "--audio-encoder"),
        (2, ["build", "--bases", "x"], "the following arguments are required: --output"),
        (2, ["build", "--output", "out", "--bases", "x"], "unrecognized arguments: --bases x"),
        (1, ["build", "--output", "out", "--base", "a/b"], "Give either --base and --audio-encoder, or --checkpoint."),
        (1, ["build", "--output", "out", "--checkpoint", "./nowhere"], "There is no folder ./nowhere"),
        (1, ["check", "./nowhere"], "There is no folder ./nowhere"),
        (1, ["push", "nowhere", "a/b"], "There is no folder nowhere; `upload.py build` makes one."),
        (1, ["push", "tests", "a/b", "--results", "nowhere"], "There is no folder nowhere; `python -m evaluation"),
        (1, ["smoke", "./nowhere"], "./nowhere is no Hub id"),
        (2, ["build", "--output", "out", "--audio-tokens", "half"], "choose from"),
    ],
)
def test_the_command_line_is_read_before_slow_libraries_are_imported(code, arguments, message):
    program = """
        import sys, upload
        try:
            upload.main()
        except SystemExit as end:
            print(end.code, {"torch", "transformers", "huggingface_hub", "datasets", "numpy"} & set(sys.modules))
    """
    output, errors = start_python(program, *arguments, cwd=paths.ROOT).communicate()
    assert message in output + errors and output.splitlines()[-1] == f"{code} set()"


@pytest.mark.parametrize("script", ["serve.py", pytest.param("app.py", marks=pytest.mark.app)])
def test_servers_name_a_folder_that_is_not_there(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "./nowhere"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(paths.ROOT / script), run_name="__main__")
    message = f"{script}: There is no folder ./nowhere, and it is no Hub id either."
    assert message in (str(end.value), capsys.readouterr().err.strip())


def test_a_model_that_is_not_on_the_hub_is_named(run_main):
    """The name could be a folder's or a Hub id, so the message is about both; the tests have no network."""
    code, _, errors = run_main("check", "nobody/nothing")
    message = "upload.py check: There is no folder nobody/nothing, and it cannot be downloaded from the Hub: "
    assert code == 1 and errors.startswith(message) and errors.count("\n") == 1


def test_check_reports_by_its_exit_code(repo, tmp_path, run_main):
    """A folder whose code does not load: its files alone look right."""
    broken = shutil.copytree(repo, tmp_path / "broken")
    with (broken / "processing_qwen2_audio_vl.py").open("a") as file:
        file.write("\nraise RuntimeError('broken code')\n")
    paths.write_checksums(broken, {})
    code, output, _ = run_main("check", repo)
    assert code == 0 and "answer to audio and picture" in output
    code, _, errors = run_main("check", broken)
    assert code == 1 and "code in processing_qwen2_audio_vl.py is not this checkout's" in errors
    code, _, errors = run_main("check", broken, "--trust-code")
    assert code == 1 and "does not load or answer" in errors and "broken code" in errors


def test_a_folder_of_an_earlier_release_answers(demo_repo, tmp_path):
    """Its processor has no `answer` and no `make_inputs`."""
    folder = shutil.copytree(demo_repo, tmp_path / "earlier")
    for name in ("answer", "make_inputs"):
        replace(f"def {name}(", f"def no_{name}(")(folder / "processing_qwen2_audio_vl.py")
    assert checking.ask(str(folder))["answers"] == checking.ask(str(demo_repo))["answers"]
    with pytest.raises(ValueError, match=f"earlier release.*upload.py build --checkpoint {folder} --output NEW"):
        paths.load_processor(folder)


def test_hostile_headers_are_refused(bases, tmp_path, refuse):
    """Offsets that overlap, are negative, twice the same or beyond the file, and an index that leaves its folder."""
    base = copy_base(bases["qwen2_vl"], tmp_path / "base")
    content = (base / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    names = sorted((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    first, second = names[:2]
    headers = [b"[]", b"null", b"[" * 10**6, b"\xff\xfe", b'{"x": 3}']
    for offsets in (header[first]["data_offsets"], [-8, 8], [8, 0], [0, 2**62], [0.5, 8], ["0", 8], [], None):
        headers.append(json.dumps(header | {second: {**header[second], "data_offsets": offsets}}).encode())
    for hostile in headers:
        (base / "model.safetensors").write_bytes(len(hostile).to_bytes(8, "little") + hostile + content[8 + size :])
        refuse("no safetensors file, or is cut short", base=base)
    (base / "model.safetensors").unlink()
    (base / "linked.safetensors").symlink_to(bases["whisper"] / "model.safetensors")
    for name in ("../whisper/model.safetensors", "/etc/hostname", "linked.safetensors"):
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        refuse("expected the name of a file beside it", base=base)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "qwen2_audio_vl", "text_config": 3}'),
        ("config.json", b"{" * 10**5),
        ("config.json", b"\xff\xfe"),
        ("model.safetensors.index.json", b'{"weight_map": []}'),
        ("processor_config.json", b"3"),
        ("tokenizer.json", b"{}"),
        ("examples/photo.png", None),
    ],
)
def test_hostile_folders_end_in_a_sentence(name, content, repo, tmp_path, run_main):
    folder = shutil.copytree(repo, tmp_path / "hostile")
    (folder / name).write_bytes(content) if content else link(folder / name)
    code, _, errors = run_main("build", "--checkpoint", folder, "--output", tmp_path / "out")
    (line,) = [line for line in errors.splitlines() if line.startswith("upload.py build: ")]
    assert code == 1 and line and not (tmp_path / "out").exists()


def test_two_builds_into_one_folder(bases, repo, tmp_path):
    """One of them makes it, whole; the other says so."""
    options = ["--base", bases["qwen2_vl"], "--audio-encoder", bases["whisper"], "--output", tmp_path / "out"]
    builds = [start_python("import upload; upload.main()", "build", *options, cwd=paths.ROOT) for _ in range(2)]
    outputs = [build.communicate(timeout=300) for build in builds]
    assert sorted(build.returncode for build in builds) == [0, 1]
    assert sum("out is ready" in output for output, _ in outputs) == 1
    assert sum("was made by another build" in errors or "is not empty" in errors for _, errors in outputs) == 1
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (repo / "SHA256SUMS").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_wrong_parts_are_refused_before_anything_is_written(bases, repo, tmp_path, refuse, run_main):
    qwen2_vl, whisper = bases["qwen2_vl"], bases["whisper"]
    integers = copy_base(qwen2_vl, tmp_path / "integers", norm=load(qwen2_vl)[NORM].to(torch.int8))
    refuse("of dtype I8: model.language_model.norm.weight; expected one of F32, F16, BF16", base=integers)
    missing = copy_base(qwen2_vl, tmp_path / "missing", norm=None)
    refuse("missing: model.language_model.norm.weight", base=missing)
    extra = copy_base(qwen2_vl, tmp_path / "extra", lambda name: "model.other" if name == NORM else name)
    refuse(r"unexpected: model.other \(there as model.other\)", base=extra)
    extractor = copy_base(whisper, tmp_path / "extractor")
    change_json(extractor / "preprocessor_config.json", feature_size=80)
    refuse("feature_size is 80, but the model's num_mel_bins is 128", audio_encoder=extractor)
    no_vision = copy_base(whisper, tmp_path / "whisper")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(qwen2_vl / name, no_vision / name)
    refuse("holds a whisper model; --base has to be a Qwen2-VL checkpoint", base=no_vision)
    refuse("holds a qwen2_vl model; --checkpoint has to be one", checkpoint=qwen2_vl)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, _, errors = run_main("build", "--checkpoint", repo, "--output", tmp_path / "full")
    assert (
        code == 1 and errors == f"upload.py build: {tmp_path / 'full'} is not empty; name a new folder for --output.\n"
    )
