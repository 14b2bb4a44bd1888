"""make test ONLY=tests/test_upload.py: the command line of upload.py, and what `check` refuses to publish."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from helpers import start_python
from safetensors.torch import load_file, save_file

import upload
from evaluation import __main__ as evaluation
from publishing import check as checking
from publishing import paths
from training import __main__ as training


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
    base, encoder = ["--base", bases["base"]], ["--audio-encoder", bases["whisper"]]
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


def test_an_aligner_that_is_not_there_is_named_at_the_start(demo_repo, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve.py", str(demo_repo), "--aligner", "./nowhere"])
    with pytest.raises(SystemExit, match="serve.py: There is no folder ./nowhere"):
        runpy.run_path(str(paths.ROOT / "serve.py"), run_name="__main__")


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
