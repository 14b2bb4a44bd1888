"""make test ONLY=tests/test_speech_run.py: `make speech` with small parts and a small adapter, without downloads."""

import shutil

import pytest
import torch
from helpers import audio, text
from peft import LoraConfig, PeftModel, get_peft_model

from configuration_qwen2_audio_vl import TRANSCRIBE
from demo.ask import user
from evaluation.generate import load
from publishing import check as checking
from publishing.build import build
from speech import run
from training.train import LANGUAGE_MODEL


@pytest.fixture
def parts(bases, tmp_path, monkeypatch):
    """Small checkpoints in the place of the downloaded ones."""
    for name, source in {"smollm2": "base", "whisper": "whisper"}.items():
        shutil.copytree(bases[source], tmp_path / name)
    monkeypatch.setattr(run, "BUILD", tmp_path)
    monkeypatch.setattr(run, "make_parts", lambda folder: None)
    return tmp_path


@pytest.mark.long
def test_the_adapter_is_in_the_folder_that_is_built(parts, sound):
    start = build(parts / "smollm2", parts / "whisper", parts / "start", audio_tokens="trimmed")
    learned = LoraConfig(
        r=2, target_modules=LANGUAGE_MODEL, modules_to_save=["audio_projector"], init_lora_weights=False
    )
    get_peft_model(load(start, "float32")[1], learned).save_pretrained(parts / "adapter")
    repo = run.build_repo(parts / "repo", parts / "adapter")
    assert {path.name for path in parts.iterdir()} == {"smollm2", "whisper", "start", "adapter", "repo"}
    checking.check_files(repo)

    processor, built = load(repo)
    assert (processor.audio_tokens, processor.trained_audio_tokens) == ("trimmed", "both")
    adapted = PeftModel.from_pretrained(load(start, "float32")[1], parts / "adapter").eval()
    inputs = processor.make_inputs(user([audio(sound(1.25)), text(TRANSCRIBE)]))
    with torch.no_grad():
        expected, logits = adapted(**inputs).logits, built(**inputs).logits
        untrained = load(start, "float32")[1](**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert (logits - untrained).abs().max() > 0.1


def test_without_an_adapter_it_says_so(parts):
    with pytest.raises(FileNotFoundError, match="holds no adapter_config.json"):
        run.build_repo(parts / "repo", parts / "adapter")


def test_prompts_are_left_out_where_they_cannot_be_downloaded(parts, monkeypatch, capsys):
    def fail(folder):
        raise RuntimeError("there is no apt-get here")

    monkeypatch.setattr(run, "write_recordings", fail)
    assert run.known_recordings() == run.KNOWN and all(path.is_file() for path in run.KNOWN)
    assert "Without the telephone prompts: there is no apt-get here" in capsys.readouterr().out


def test_a_transcript_is_one_line(processor, speech, monkeypatch):
    monkeypatch.setattr(type(processor), "answer", lambda *_: ["And so\n my fellow "])
    assert run.transcribe(processor, None, speech) == "And so my fellow"
