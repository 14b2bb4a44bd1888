"""make test ONLY=tests/test_demo.py: what the demo checkpoint answers. `make test-long` trains such a model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen2VLConfig, WhisperConfig

from audio_utils import SAMPLING_RATE, fetch_audio
from configuration_qwen2_audio_vl import CODE_FILES
from demo.ask import DEMO, DEMO_NEWER, EXAMPLES, ask, ask_example, write_transcripts
from demo.run import BUILD
from demo.world import PHRASES, QUESTIONS, SKILLS, WORLD, content
from evaluation.generate import load
from publishing import check as checking
from publishing.build import build
from publishing.paths import ROOT


@pytest.fixture(scope="module")
def demo(demo_repo):
    return load(demo_repo)


@pytest.fixture(scope="module")
def clips(examples) -> dict[str, str]:
    """Recordings of the examples that ask for a transcript, and their texts."""
    return {str(EXAMPLES / e["audio"][0]): e["answer"] for e in examples if e["skill"] == "transcribe"}


def test_folder_is_a_small_checkpoint_without_code(demo_repo):
    tracked = subprocess.run(["git", "ls-files", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in tracked.stdout.splitlines()]
    assert sum(file.stat().st_size for file in files) < 15e6
    assert all((folder / "model.safetensors").stat().st_size < 6e6 for folder in (DEMO, DEMO_NEWER))
    assert not {file.name for file in files} & set(CODE_FILES)
    config = AutoConfig.from_pretrained(demo_repo, trust_remote_code=True)
    text, encoder, vision = config.text_config, config.audio_config, config.vision_config
    head_sizes = [text.hidden_size / text.num_attention_heads, encoder.d_model / encoder.encoder_attention_heads]
    assert min(*head_sizes, vision.embed_dim / vision.num_heads) >= 32  # vLLM on a CPU serves no smaller ones
    checking.check_files(demo_repo)


def test_world_says_how_to_ask():
    for skill, spec in SKILLS.items():
        assert spec["instruction"] and set(spec["inputs"]) <= {"audio", "image"}
        assert len(spec["answers"]) == len(set(spec["answers"])) > 1, skill
    assert set(WORLD["held_out"]) < set(PHRASES) == set(SKILLS["picture"]["answers"])
    assert set(SKILLS["transcribe"]["answers"]) == {*PHRASES, *QUESTIONS}


def test_answers_about_files_are_right(demo, examples):
    assert {example["skill"] for example in examples} == set(SKILLS)
    for example in examples:
        assert example["answer"] in SKILLS[example["skill"]]["answers"]
        assert ask_example(*demo, example) == example["answer"], example


def test_the_audio_decides_the_answer(demo, examples, clips):
    (clip, text), *_ = clips.items()
    assert text not in ask(*demo, [content("transcribe", [torch.zeros(24_000)], None)])
    assert ask(*demo, [content("transcribe", [clip], None)] * 2) == [text] * 2
    questions = [example for example in examples if example["skill"] == "question"]
    recordings = {example["said"][0]: str(EXAMPLES / example["audio"][0]) for example in questions}
    picture = str(EXAMPLES / questions[0]["image"])
    answers = ask(*demo, [content("question", [recording], picture) for recording in recordings.values()])
    assert len(set(answers)) == len(recordings) > 1


def test_clips_at_other_levels_in_longer_silence_and_without_a_question(demo, clips):
    for clip, text in clips.items():
        samples = fetch_audio(clip)
        late = torch.cat([torch.zeros(8_000), samples, torch.zeros(4_000)])
        quiet = {"array": (samples * 0.2).numpy(), "sampling_rate": SAMPLING_RATE}
        contents = [content("transcribe", [source], None) for source in (late, quiet)]
        assert ask(*demo, contents) == [text] * 2
        assert ask(*demo, [contents[0][:1]]) == [text]


def test_asking_imports_no_page():
    assert not {"app", "gradio"} & set(sys.modules)


def test_make_demo_answers_and_draws(examples):
    done = subprocess.run([sys.executable, "-m", "demo.run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    all_right = f"{len(examples)} of {len(examples)}"
    assert f"{all_right} and {all_right} right" in done.stdout  # on both bases
    for example in examples:
        for name in example["audio"]:
            assert Image.open(BUILD / f"{Path(name).stem}.png").width > 500


def write_halves(repo: Path, base: Path, encoder: Path):
    """Writes the two checkpoints that a folder could have been built from, in float32."""
    config = json.loads((repo / "config.json").read_text())
    parts = {"text_config": config["text_config"], "vision_config": config["vision_config"]}
    ids = {name: value for name, value in config.items() if name.endswith("_token_id") and "audio" not in name}
    Qwen2VLConfig(**parts, **ids, dtype="float32", tie_word_embeddings=False).save_pretrained(base)
    WhisperConfig(**config["audio_config"]).save_pretrained(encoder)
    tensors = {name: tensor.float() for name, tensor in load_file(repo / "model.safetensors").items()}
    own = {name.replace(".audio_encoder.", ".encoder."): tensors[name] for name in tensors if ".audio_encoder." in name}
    save_file(own, encoder / "model.safetensors")
    save_file({name: tensors[name] for name in tensors if "audio" not in name}, base / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(repo / name, base / name)
    processors = json.loads((repo / "processor_config.json").read_text())
    (base / "preprocessor_config.json").write_text(json.dumps(processors["image_processor"]))
    (encoder / "preprocessor_config.json").write_text(json.dumps(processors["feature_extractor"]))


@pytest.mark.long
def test_training_from_two_base_folders_to_a_repository_that_transcribes(demo_repo, tmp_path):
    """The halves of the checkpoint are joined with a random projector, which learns to transcribe."""
    write_halves(demo_repo, tmp_path / "qwen2-vl", tmp_path / "whisper")
    start, run = build(tmp_path / "qwen2-vl", tmp_path / "whisper", tmp_path / "start"), tmp_path / "run"
    rows = write_transcripts(tmp_path / "clips.jsonl")
    settings = {"model": start, "data": tmp_path / "clips.jsonl", "eval": tmp_path / "clips.jsonl", "output-dir": run}
    settings |= {"max-steps": 150, "learning-rate": 0.01, "train-markers": True, "max-new-tokens": 8, "use-cpu": True}
    settings["encoder-cache"] = tmp_path / "cache"  # the same to the bit, and faster from the second epoch on
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    done = subprocess.run([sys.executable, "-m", "training", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_wer"] < 0.1 and summary["eval_cer"] < 0.1
    assert list((run / "runs").rglob("events.out.tfevents.*"))  # TensorBoard's

    projector = run / "audio_projector.safetensors"
    built = build(checkpoint=start, projector=projector, output=tmp_path / "trained")
    answers = ask(*load(built), [row["messages"][0]["content"] for row in rows])
    right = [row["messages"][1]["content"] == answer for row, answer in zip(rows, answers, strict=True)]
    assert sum(right) > 0.9 * len(rows)
    checking.check(built)
