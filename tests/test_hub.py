"""make test ONLY=tests/test_hub.py: a folder -> the Hub and back over HTTP, with the real client and empty caches."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers import answer, finish, start_python
from hub import LocalHub
from huggingface_hub import ModelCard

from demo.world import WORLD
from publishing import paths


REAL = os.environ.get("QWEN2_AUDIO_VL_TEST_REPO")  # a new repository on a real Hub, instead of the local one
ID = REAL or "someone/qwen2-audio-vl"
local = pytest.mark.skipif(bool(REAL), reason="looks into the local Hub, or lets it fail")
LOAD = """
    import sys
    from transformers import AutoModel, AutoProcessor
    name, pins = sys.argv[1], {} if sys.argv[2] == "main" else {"revision": sys.argv[2]}
    pins |= {"code_revision": sys.argv[3]} if len(sys.argv) > 3 else {}
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, **pins)
    model = AutoModel.from_pretrained(name, trust_remote_code=True, **pins)
    inputs = processor(text="<|vision_start|>What?", return_tensors="pt")
    print("TOKENS", model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist())
    print("VERSION", getattr(sys.modules[type(processor).__module__], "VERSION", None))
"""


class RealHub:
    """The Hub itself, or the one at HF_ENDPOINT, for whoever the token in HF_TOKEN belongs to."""

    token = os.environ.get("HF_TOKEN")

    def environment(self, cache: Path, token: str | None = None) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        return {**kept, "HF_HOME": str(cache), **({"HF_TOKEN": token} if token else {})}


@pytest.fixture(scope="module")
def hub():
    with nullcontext(RealHub()) if REAL else LocalHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(demo_repo, tmp_path_factory):
    """A folder that push may change, of the demo checkpoint, whose small tokenizer loads fast."""
    folder = Path(shutil.copytree(demo_repo, tmp_path_factory.mktemp("pushed") / "folder"))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "unchecked.bin").write_bytes(b"must not be pushed")
    return folder


@pytest.fixture(scope="module")
def upload_py(hub, tmp_path_factory):
    """Runs a command of upload.py as a user of the Hub does, and returns its output or error. The token is in none."""
    environment = hub.environment(tmp_path_factory.mktemp("home"), hub.token)

    def run(*arguments, code: int = 0) -> str:
        command = [sys.executable, paths.ROOT / "upload.py", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        assert hub.token not in done.stdout + done.stderr
        return done.stderr if code else done.stdout

    return run


@pytest.fixture
def load(hub, tmp_path):
    """Starts a process with a cache of its own that loads from the Hub."""

    def start(*arguments, cache: str = "cache") -> subprocess.Popen:
        return start_python(LOAD, *arguments, env=hub.environment(tmp_path / cache, hub.token), cwd=tmp_path)

    return start


@pytest.fixture(scope="module")
def commit(hub, folder, upload_py):
    """The first push, after one whose weights were not taken."""
    if not REAL:
        hub.refuse_uploads = True
        upload_py("push", folder, ID, code=1)
        hub.refuse_uploads = False
        assert [set(commit["files"]) for commit in hub.repositories[ID].history()] == [{".gitattributes"}]
    url, commit = upload_py("push", folder, ID).strip().splitlines()[-2:]
    assert url.endswith(f"/{ID}/commit/{commit.removeprefix('commit ')}")
    return commit.removeprefix("commit ")


@local
def test_push_makes_one_commit_of_all_files(hub, folder, commit):
    repository = hub.repositories[ID]
    pushed, first = repository.history()
    assert repository.private and pushed["id"] == commit and first["message"] == "initial commit"
    assert re.fullmatch(r"Upload qwen2-audio-vl: [0-9,]+ parameters in bfloat16", pushed["message"])
    assert sorted(pushed["files"]) == paths.files_of(folder)
    assert all(repository.read(name) == (folder / name).read_bytes() for name in pushed["files"])
    paths.check_content(folder, paths.read_checksums(folder))


@local
def test_the_card_shows_what_the_model_answered(hub, commit):
    card = ModelCard(hub.repositories[ID].read("README.md").decode())
    assert all(isinstance(widget["output"]["text"], str) for widget in card.data.widget)
    assert f'REPO = "{ID}"\nprocessor = ' in card.text


@pytest.mark.long
def test_new_processes_with_one_empty_cache_load_the_commit_at_once(load, commit, demo_repo):
    processes = [load(ID, commit), load(ID, commit), load(str(demo_repo), "main", cache="other")]
    assert len({answer(process) for process in processes}) == 1


def test_the_first_block_of_the_card_runs_as_pasted(hub, folder, commit, demo_repo, tmp_path):
    """The line for the shell, then those for Python; in an empty folder with an empty cache, and in a built folder."""
    card = (folder / "README.md").read_text()  # as it was pushed
    (install, code) = re.search(r"```\n(pip install [^\n]+)\n```\n```python\n(.*?)```", card, re.DOTALL).groups()
    environment = hub.environment(tmp_path / "cache", hub.token)
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PIP_NO_INDEX": "1"}
    subprocess.run(install, shell=True, cwd=tmp_path, env=environment, check=True)
    number, *_ = WORLD["held_out"][1].split()  # the question is how many there are in the picture
    built = code.replace(f'REPO = "{ID}"\n', 'REPO = "."\n')
    assert built != code and built in (demo_repo / "README.md").read_text()
    for lines, place in ((code, tmp_path), (built, demo_repo)):
        assert finish(start_python(lines, cwd=place, env=environment)).strip() == number


def test_smoke(upload_py, commit):
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in upload_py("smoke", ID).splitlines())
    assert rows["commit"] == commit and "answer to audio and picture" in rows
    upload_py("check", ID, "--revision", commit)


@pytest.mark.long
@local
def test_a_download_that_is_not_what_was_built(hub, upload_py, commit):
    """The Hub's client sees that a file is too short, but not that it holds something else."""
    hub.corrupt = "model.safetensors"
    assert "content of model.safetensors is not what SHA256SUMS says" in upload_py("smoke", ID, code=1)
    hub.corrupt, hub.truncate = None, "model.safetensors"
    assert "does not load or answer" in upload_py("smoke", ID, code=1)
    hub.truncate = None


@pytest.mark.long
@local
def test_a_changed_folder_is_pushed_to_branches_and_pull_requests(hub, folder, commit, upload_py, load, tmp_path):
    """Code and weights are pinned apart: `code_revision` gives the weights of one commit the code of another."""
    changed = shutil.copytree(folder, tmp_path / "changed")
    with (changed / "processing_qwen2_audio_vl.py").open("a") as file:
        file.write('\nVERSION = "changed"\n')
    assert "content of processing_qwen2_audio_vl.py is not what" in upload_py("push", changed, ID, code=1)
    assert hub.repositories[ID].refs == {"main": commit}

    paths.write_checksums(changed, {})
    upload_py("push", changed, ID, "--revision", "next", "--trust-code")
    repository = hub.repositories[ID]
    newer = repository.refs["next"]
    assert repository.refs["main"] == commit and repository.history("next")[1]["id"] == commit
    pull = upload_py("push", changed, ID, "--pr", "--trust-code")
    assert f"{ID}/discussions/1" in pull and "refs/pr/1" in repository.refs

    for revision, pins, version in ((commit, (), None), (newer, (), "changed"), (commit, (newer,), "changed")):
        assert f"VERSION {version}" in finish(load(ID, revision, *pins))


@pytest.mark.long
@local
def test_files_of_an_earlier_push_go(hub, folder, commit, upload_py):
    """Weights in other shards than before must not stay beside the new ones, nor scores of other weights."""
    repository = hub.repositories[ID]
    oid = repository.resolve("main")["files"]["model.safetensors"]["sha256"]
    stale = {"key": "lfsFile", "value": {"path": "model-00001-of-00002.safetensors", "oid": oid}}
    names = ("evaluation/predictions-silence.jsonl", ".eval_results/open_asr_leaderboard.yaml", "notes.txt")
    files = [{"key": "file", "value": {"path": name, "content": ""}} for name in names]
    repository.commit("main", {"summary": "by hand"}, [stale, *files], create_pr=False)
    upload_py("push", folder, ID)
    assert sorted(repository.resolve("main")["files"]) == sorted([*paths.files_of(folder), "notes.txt"])


@pytest.mark.long
@local
def test_files_for_llama_cpp_go_to_the_hub_and_come_from_it(hub, repo_of_few_words, upload_py, tmp_path):
    folder, name = shutil.copytree(repo_of_few_words, tmp_path / "few"), "someone/few"
    upload_py("gguf", folder, "--output", tmp_path / "files")
    names = [f"{start}few-F16.gguf" for start in ("", "mmproj-")]
    upload_py("push", folder, name, "--gguf", tmp_path / "files")
    files = hub.repositories[name].resolve("main")["files"]
    assert {file for file in files if file.endswith(".gguf")} == {*names}
    assert "parameters in" in upload_py("smoke", name)  # it loads as before
    upload_py("gguf", name, "--output", tmp_path / "again")
    for file in names:
        one, two = (gguf.GGUFReader(tmp_path / place / file) for place in ("files", "again"))
        assert all(np.array_equal(a.data, b.data) for a, b in zip(one.tensors, two.tensors, strict=True))
        commit = hub.repositories[name].refs["main"]
        assert two.get_field("general.source.repo_url").contents().endswith(f"/{name}/tree/{commit}")


@local
def test_build_from_the_hub_names_its_commits(hub, bases, repo, upload_py, tmp_path):
    hf, environment = Path(sys.executable).with_name("hf"), hub.environment(tmp_path, hub.token)
    names = ["someone/base", "someone/whisper"]
    for name in names:
        subprocess.run([hf, "upload", name, bases[Path(name).name]], env=environment, check=True)
    base, encoder = (hub.repositories[name].refs["main"] for name in names)
    sources = ["--base", f"{names[0]}@{base}", "--audio-encoder", names[1]]
    upload_py("build", *sources, "--output", tmp_path / "built")
    card = ModelCard.load(tmp_path / "built" / "README.md")
    assert card.data.base_model == names and card.data.base_model_relation == "merge"
    assert (tmp_path / "built" / "model.safetensors").read_bytes() == (repo / "model.safetensors").read_bytes()
    assert f"at commit `{base}`" in card.text and f"at commit `{encoder}`" in card.text
