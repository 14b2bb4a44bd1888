"""make test ONLY=tests/test_remote_code.py: the folder in fresh processes, alone, with few packages, and in several."""

import os
import re
import shutil
import subprocess
import textwrap

import pytest
from helpers import answer, finish, greedy, start_python

from configuration_qwen2_audio_vl import NEWEST_PROVED
from demo.ask import content_of, user


USE = """
    from transformers import AutoModel, AutoProcessor
    processor = AutoProcessor.from_pretrained(REPO, trust_remote_code=True)
    model = AutoModel.from_pretrained(REPO, trust_remote_code=True, dtype="auto")
    messages = [{"role": "user", "content": CONTENT}]
    inputs = processor.make_inputs(messages).to(model.device)
    output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    print("TOKENS", output[0, inputs.input_ids.shape[1]:].tolist())
"""
HIDE = """
    import sys
    from importlib.machinery import PathFinder
    HIDDEN = {"torchaudio", "librosa", "soundfile", "torchcodec", "soxr", "scipy"}
    class Hide(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)
    sys.meta_path[sys.meta_path.index(PathFinder)] = Hide
    import importlib.util
    assert all(importlib.util.find_spec(name) is None for name in HIDDEN)
"""


@pytest.fixture
def content(photo, speech) -> list[dict]:
    items = [{"type": "image", "url": str(photo)}, {"type": "audio", "url": str(speech)}]
    return [*items, {"type": "text", "text": "Answer the question about the photo."}]


@pytest.fixture
def start(content, repo, tmp_path):
    """`start(code, ..., NAME=constant)` starts Python on pieces of code in an empty folder with an empty cache."""

    def run(*codes: str, **constants) -> subprocess.Popen:
        constants = {"REPO": str(repo), "CONTENT": content, **constants}
        values = [f"{name} = {value!r}\n" for name, value in constants.items()]
        code = "".join([*values, *map(textwrap.dedent, codes)])
        return start_python(code, env={**os.environ, "HF_HOME": str(tmp_path)}, cwd=tmp_path)

    return run


@pytest.fixture
def plain_answer(processor, model, content) -> str:
    """What `USE` has to print, computed in this process."""
    return f"TOKENS {greedy(model, processor.make_inputs(user(content)))[0].tolist()}"


def test_the_folder_is_enough(start, demo_repo, examples):
    """The model, the collator and the handler, where Python finds nothing but the folder and installed packages."""
    example = next(example for example in examples if example["skill"] == "transcribe")
    code = """
        import os, sys
        assert not any(os.path.exists(os.path.join(place, "audio_utils.py")) for place in sys.path), sys.path
    """
    use_files = """
        assert processor.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]).count(ANSWER) == 1
        sys.path.insert(0, REPO)
        from collator import ChatCollator
        from handler import EndpointHandler
        import transformers
        from packaging.version import Version
        if Version(transformers.__version__) >= Version("5.18"):  # which marks the tokens of answers
            row = {"messages": [*messages, {"role": "assistant", "content": ANSWER}]}
            batch = ChatCollator(processor)([row])
            assert ANSWER in processor.decode(batch["labels"][batch["labels"] != -100])
        with open(CONTENT[0]["audio"], "rb") as file:
            assert EndpointHandler(REPO)({"inputs": file.read()})["text"] == ANSWER
    """
    constants = {"REPO": str(demo_repo), "CONTENT": content_of(example), "ANSWER": example["answer"]}
    finish(start(code, USE, use_files, **constants))


def test_loads_and_answers_where_other_audio_libraries_are_absent(start, plain_answer):
    assert answer(start(HIDE, USE, "assert 'torchaudio' not in sys.modules")) == plain_answer


@pytest.mark.long
def test_two_processes_load_into_one_empty_cache_at_once(start):
    assert len({answer(process) for process in [start(USE), start(USE)]}) == 1


def test_unsupported_release_is_one_clear_sentence(start):
    """For a release that is too old and one that is too new, with the processor or the model loaded first."""
    code = """
        import importlib.metadata
        from transformers import AutoModel, AutoProcessor
        version = importlib.metadata.version
        for auto in (AutoProcessor, AutoModel):
            for release in ("5.15.1", "6.0.0"):
                importlib.metadata.version = lambda name: release if name == "transformers" else version(name)
                try:
                    auto.from_pretrained(REPO, trust_remote_code=True)
                except ImportError as error:
                    assert "transformers>=5.16.1,<6 is required" in str(error), error
                    assert release in str(error) and "pip install" in str(error), error
                else:
                    raise AssertionError(release)
    """
    finish(start(code))


def test_release_newer_than_the_newest_tested_is_one_warning(start, repo, tmp_path):
    """However many folders are loaded, each of which runs the code anew, with the processor or the model first."""
    for name in ("one", "other"):
        shutil.copytree(repo, tmp_path / name)
    code = """
        import importlib.metadata
        from transformers import AutoModel, AutoProcessor
        version = importlib.metadata.version
        for folder, release, *autos in (
            (REPO, NEWEST, AutoProcessor, AutoModel),
            ("one", "5.99.0.dev0", AutoProcessor, AutoModel),
            ("other", "5.99.0.dev0", AutoModel, AutoProcessor),
        ):
            importlib.metadata.version = lambda name: release if name == "transformers" else version(name)
            for auto in autos:
                auto.from_pretrained(folder, trust_remote_code=True)
    """
    process = start(code, NEWEST=NEWEST_PROVED)
    _, errors = process.communicate(timeout=300)
    (warning,) = re.findall(r"transformers \S+ is newer than .*", errors)
    assert process.returncode == 0 and warning.startswith(f"transformers 5.99.0.dev0 is newer than {NEWEST_PROVED}, ")


def test_model_needs_no_audio_library(start):
    code = """
        from transformers import AutoModel
        AutoModel.from_pretrained(REPO, trust_remote_code=True)
    """
    finish(start(HIDE.replace('"torchaudio"', '"torchaudio", "av"'), code))


def test_saved_model_brings_its_code(start, plain_answer, tmp_path):
    code = """
        from transformers import AutoModelForMultimodalLM, AutoProcessor
        AutoModelForMultimodalLM.from_pretrained(REPO, trust_remote_code=True).save_pretrained("saved")
        AutoProcessor.from_pretrained(REPO, trust_remote_code=True).save_pretrained("saved")
    """
    finish(start(code))
    assert (tmp_path / "saved" / "processing_qwen2_audio_vl.py").is_file()
    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    assert answer(start(USE, REPO=str(moved))) == plain_answer


def test_importing_the_code_touches_nothing(start):
    """Python's audit hooks see no socket, no process and no file that is opened to write."""
    code = """
        import importlib, os, sys, types
        sys.dont_write_bytecode = True
        package = types.ModuleType("remote")
        package.__path__ = [REPO]
        sys.modules["remote"] = package
        names = ["configuration_qwen2_audio_vl", "mrope_positions", "audio_decoding", "content_items", "audio_utils"]
        names += ["processing_qwen2_audio_vl", "modeling_qwen2_audio_vl"]

        def load():
            for name in names:
                importlib.import_module(f"remote.{name}")

        load()  # what the libraries do when they are loaded themselves is not ours
        for name in names:
            del sys.modules[f"remote.{name}"]
        seen, opened = [], []

        def hook(event, arguments):
            if event == "open":
                path, mode, flags = arguments
                opened.append(str(path))
                if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    seen.append((event, path, mode))
            elif event.startswith(("socket.", "subprocess.", "os.", "shutil.", "ctypes.", "urllib.")):
                if event not in ("os.listdir", "os.scandir"):
                    seen.append((event, arguments))

        sys.addaudithook(hook)
        load()
        assert any("modeling_qwen2_audio_vl" in path for path in opened)
        assert not seen, seen
    """
    finish(start(code))
