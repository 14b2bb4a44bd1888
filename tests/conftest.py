"""Fixtures of all tests: checkpoints, built folders, models, clips, pictures, model inputs."""

import os
import tempfile


# Remote code is copied to a cache of the Hub's client; the tests use a cache of their own and no network.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="qwen2-audio-vl-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Workers side by side, and what they start, share the cores.
os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BASE, KINDS, WITHOUT_AUDIO, audio, image, text, video
from PIL import Image
from transformers import AutoModel, AutoProcessor

from demo.ask import DEMO, read_examples, user
from demo.bases import ASSETS, SMALL, make_base, make_bases, make_whisper
from publishing.build import build
from publishing.paths import type_on


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_ignore_collect(collection_path, config):
    """Importing transformers' own tests takes seconds; `make test-common` alone asks for them."""
    return (collection_path.name == "test_common.py" and config.option.markexpr != "common") or None


def pytest_generate_tests(metafunc):
    """A test with the marker `bases` is run with each base, others with the one that BASE names."""
    if metafunc.definition.get_closest_marker("bases"):
        bases = [BASE] if "BASE" in os.environ else [*SMALL]
        metafunc.parametrize("base_type", bases, indirect=True, scope="session")


@pytest.fixture(scope="session")
def base_type(request) -> str:
    """The type of the base that the model of the tests has."""
    return getattr(request, "param", BASE)


@pytest.fixture(scope="session")
def model_type(base_type) -> str:
    """The type of that model."""
    return type_on(base_type)


@pytest.fixture(scope="session")
def bases(base_type, tmp_path_factory) -> dict[str, Path]:
    """Small checkpoints as published: a base, Whisper with windows of 1 s, Whisper with its own 30 s."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "base": make_base(folder / "base", base_type),
        "whisper": make_whisper(folder / "whisper", window_seconds=1),
        "whisper_30s": make_whisper(folder / "whisper-30s"),
    }


@pytest.fixture(scope="session")
def repo(bases, tmp_path_factory) -> Path:
    """A built repository folder whose windows are 1 s long, 50 tokens, so that prompts stay short."""
    return build(bases["base"], bases["whisper"], tmp_path_factory.mktemp("repo"))


@pytest.fixture(scope="session")
def repo_30s(bases, tmp_path_factory) -> Path:
    """A built repository folder with Whisper's own windows: 30 s, 1500 tokens."""
    return build(bases["base"], bases["whisper_30s"], tmp_path_factory.mktemp("repo-30s"))


@pytest.fixture(scope="session")
def repo_of_few_words(bases, tmp_path_factory) -> Path:
    """The same with the 448 words of the demo, because files for llama.cpp with 152,064 take long to read."""
    base, _ = make_bases(tmp_path_factory.mktemp("few"), BASE)
    return build(base, bases["whisper_30s"], tmp_path_factory.mktemp("repo-few") / "few")


@pytest.fixture(scope="session")
def demo_repo(tmp_path_factory) -> Path:
    """The trained demo checkpoint, built."""
    return build(checkpoint=DEMO, output=tmp_path_factory.mktemp("demo") / "repo")


@pytest.fixture(scope="session")
def examples() -> list[dict]:
    """What the demo checkpoint can be asked, with files and answers."""
    return read_examples()


@pytest.fixture(scope="session")
def processor(repo):
    return AutoProcessor.from_pretrained(repo, trust_remote_code=True)


@pytest.fixture(scope="session")
def trimmed_processor(repo):
    return AutoProcessor.from_pretrained(repo, trust_remote_code=True, audio_tokens="trimmed")


@pytest.fixture(scope="session")
def shared_model(repo):
    return AutoModel.from_pretrained(repo, trust_remote_code=True, dtype="auto")


@pytest.fixture
def model(shared_model):
    """The model of all tests, which computes no gradients."""
    with torch.no_grad():
        yield shared_model.eval()


@pytest.fixture
def fresh_model(repo):
    """A model of the test's own, to train or to change."""
    return AutoModel.from_pretrained(repo, trust_remote_code=True, dtype="auto")


@pytest.fixture(scope="session")
def speech() -> Path:
    return ASSETS / "audio" / "jfk.wav"  # 11.0 s, 16 kHz mono


@pytest.fixture(scope="session")
def photo() -> Path:
    return ASSETS / "images" / "chelsea.png"


@pytest.fixture
def picture(photo):
    """Small, so that it is few tokens."""
    return Image.open(photo).convert("RGB").resize((112, 84))


@pytest.fixture
def kinds(ask, speech, picture, sound):
    """`kinds(name)`: model inputs of each kind that a user has, see `KINDS` in helpers.py."""
    frames = np.stack([np.roll(np.asarray(picture), shift, axis=1) for shift in range(4)])
    items = {"clip": audio(str(speech)), "picture": image(picture), "film": video(frames)}

    def item(name: str):
        """An item by its name; of a sound the name is `seconds/seed`, and other names are texts."""
        seconds, is_sound, seed = name.partition("/")
        return items.get(name) or (audio(sound(float(seconds), int(seed))) if is_sound else text(name))

    return lambda kind: ask(*([item(name) for name in row] for row in {**KINDS, **WITHOUT_AUDIO}[kind]))


@pytest.fixture(scope="module")
def browser():
    """Chromium, for tests with the marker `app`."""
    from playwright.sync_api import sync_playwright  # which no other test needs

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("The page is tested in Chromium: apt-get install chromium.")
    with sync_playwright() as playwright:
        # Without these it asks its maker's servers about updates and more.
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=chromium, args=[*quiet, "--disable-sync"])
        yield browser
        browser.close()


@pytest.fixture
def sound():
    """Clips that differ: `sound(seconds, seed)` is a tone in noise, float32 samples at 16 kHz."""

    def make(seconds: float, seed: int = 0):
        time = torch.arange(round(seconds * 16_000)) / 16_000
        noise = torch.randn(len(time), generator=torch.Generator().manual_seed(seed))
        return (0.5 * torch.sin(2 * torch.pi * 150 * 2**seed * time) + 0.01 * noise).numpy()

    return make


@pytest.fixture
def ask(processor):
    """`ask(item, item, ...)` or `ask([item, ...], [item, ...])` for a batch: model inputs of user messages."""

    def make(*items):
        rows = items if isinstance(items[0], list) else [list(items)]
        return processor.make_inputs([user(row) for row in rows])

    return make
