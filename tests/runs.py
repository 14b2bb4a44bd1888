"""Short runs of training on tones: fixtures and helpers."""

import json
from pathlib import Path

import pytest
import soundfile
import torch
from data_rows import chat, write_lines
from helpers import BASE, audio, text
from safetensors.torch import load_file
from transformers import AutoProcessor

from collator import ChatCollator
from demo.bases import make_bases
from publishing.build import build
from training import train
from training.arguments import Arguments
from training.resuming import newest_checkpoint


TONES = {"low": 200, "middle": 600, "high": 1800}  # Hz


def words(settings: dict) -> list[str]:
    """The same settings for the command line."""
    values = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
    return [str(word) for name, value in values.items() for word in (f"--{name}", *value)]


def projector(output: Path) -> torch.Tensor:
    return load_file(output / "audio_projector.safetensors")["audio_projector.weight"]


def losses(output: Path) -> list[float]:
    """The loss of every step, from the state that the last checkpoint holds."""
    state = json.loads((Path(newest_checkpoint(output)) / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


def changed(*folders: Path) -> set[str]:
    """The names of the weights in which two folders differ."""
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """A built folder of a small model with a small vocabulary, windows of 3 s, untrained; its parts lie beside it."""
    folder = tmp_path_factory.mktemp("start")
    return build(*make_bases(folder, BASE), folder / "repo")


@pytest.fixture(scope="session")
def tones(tmp_path_factory) -> Path:
    """16 rows about tones of 1 s and 8 others to ask about, in JSON lines beside their wav files."""
    folder = tmp_path_factory.mktemp("tones")
    seconds = torch.arange(16_000) / 16_000
    for file, count in (("train", 16), ("test", 8)):
        chats = []
        for number in range(count):
            name = list(TONES)[number % len(TONES)]
            samples = 0.3 * torch.sin(2 * torch.pi * TONES[name] * (1 + number / 100) * seconds)
            soundfile.write(folder / f"{file}-{number}.wav", samples.numpy(), 16_000)
            chats.append(chat(audio(f"{file}-{number}.wav"), text("Which tone?" + "?" * number), answer=name))
        write_lines(folder / f"{file}.jsonl", chats)
    return folder


@pytest.fixture(scope="session")
def collator(start) -> ChatCollator:
    return ChatCollator(AutoProcessor.from_pretrained(start, trust_remote_code=True))


@pytest.fixture(scope="session")
def settings(start, tones):
    """`settings(output, **more)`: those of a run of 6 steps."""

    def make(output: Path, **more) -> dict:
        usual = {"per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 1, "learning_rate": 0.02}
        usual |= {"model": start, "data": [tones / "train.jsonl"], "output_dir": output}
        return usual | {"report_to": "none", "disable_tqdm": True, "use_cpu": True} | more

    return make


@pytest.fixture(scope="session")
def run(settings):
    """`run(output, **more)` trains and returns the summary."""
    return lambda output, **more: train.train(Arguments(**settings(output, **more)))


@pytest.fixture(scope="session")
def trained(run, tmp_path_factory) -> Path:
    """A run of 6 steps that nothing interrupted."""
    output = tmp_path_factory.mktemp("trained")
    run(output)
    return output
