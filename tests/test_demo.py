"""The trained checkpoint in `demo/`: what it answers about real files, and that training makes such a model."""

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

from audio_utils import fetch_audio
from configuration_qwen2_audio_vl import CODE_FILES
from demo.ask import EXAMPLES, ask, ask_example, load, write_transcripts
from demo.run import BUILD
from demo.world import PHRASES, QUESTIONS, SKILLS, WORLD, content
from publishing import check as checking
from publishing import paths
from publishing.build import build


@pytest.fixture(scope="module")
def loaded(demo_repo):
    return load(demo_repo)


def test_folder_is_a_small_checkpoint_without_code(demo_repo):
    tracked = subprocess.run(["git", "ls-files", "demo"], cwd=paths.ROOT, capture_output=True, text=True, check=True)
    files = [paths.ROOT / name for name in tracked.stdout.splitlines()]
    assert sum(file.stat().st_size for file in files) < 10e6
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


def test_answers_about_files_are_right(loaded, examples):
    assert {example["skill"] for example in examples} == set(SKILLS)
    for example in examples:
        assert example["answer"] in SKILLS[example["skill"]]["answers"]
        assert ask_example(*loaded, example) == example["answer"], example


def test_the_audio_decides_the_answer(loaded, examples):
    """Asked about silence, or about another clip, it does not say what it said."""
    processor, model = loaded
    asked = [example for example in examples if example["skill"] == "transcribe"]
    silence, other = torch.zeros(24_000), str(EXAMPLES / asked[0]["audio"][0])
    assert asked[0]["answer"] not in ask(processor, model, [content("transcribe", [silence], None)])
    assert ask(processor, model, [content("transcribe", [other], None)] * 2) == [asked[0]["answer"]] * 2
    # A spoken question about the same picture decides which answer is given.
    questions = [example for example in examples if example["skill"] == "question"]
    by_question = {example["said"][0]: str(EXAMPLES / example["audio"][0]) for example in questions}
    assert len(by_question) > 1
    picture = str(EXAMPLES / questions[0]["image"])
    given = ask(processor, model, [content("question", [file], picture) for file in by_question.values()])
    assert len(set(given)) == len(by_question)


def test_clips_at_other_rates_in_longer_silence_and_without_a_question(loaded, examples):
    processor, model = loaded
    for example in (example for example in examples if example["skill"] == "transcribe"):
        samples = fetch_audio(EXAMPLES / example["audio"][0])
        late = torch.cat([torch.zeros(8_000), samples, torch.zeros(4_000)])
        quiet = {"audio": {"array": (samples * 0.2).numpy(), "sampling_rate": 16_000}}
        contents = [content("transcribe", [late], None), content("transcribe", [quiet["audio"]], None)]
        assert ask(processor, model, contents) == [example["answer"]] * 2
        assert ask(processor, model, [contents[0][:1]]) == [example["answer"]]


def test_asking_imports_no_page():
    assert not {"app", "gradio"} & set(sys.modules)


def test_make_demo_answers_and_draws(examples):
    done = subprocess.run([sys.executable, "-m", "demo.run"], cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{len(examples)} of {len(examples)} right" in done.stdout
    for example in examples:
        for name in example["audio"]:
            assert Image.open(BUILD / f"{Path(name).stem}.png").width > 500


def test_training_from_two_base_folders_to_a_repository_that_transcribes(demo_repo, tmp_path):
    """The halves of the checkpoint as they would be published, and a projector that learns from nothing."""
    config = json.loads((demo_repo / "config.json").read_text())
    tensors = {name: tensor.float() for name, tensor in load_file(demo_repo / "model.safetensors").items()}
    base, encoder = tmp_path / "qwen2-vl", tmp_path / "whisper"
    parts = {"text_config": config["text_config"], "vision_config": config["vision_config"]}
    ids = {name: value for name, value in config.items() if name.endswith("_token_id") and "audio" not in name}
    Qwen2VLConfig(**parts, **ids, dtype="float32", tie_word_embeddings=False).save_pretrained(base)
    WhisperConfig(**config["audio_config"]).save_pretrained(encoder)
    encoder_tensors = {name: tensor for name, tensor in tensors.items() if ".audio_encoder." in name}
    save_file(
        {name.replace(".audio_encoder.", ".encoder."): tensor for name, tensor in encoder_tensors.items()},
        encoder / "model.safetensors",
    )
    rest = {name: tensor for name, tensor in tensors.items() if "audio" not in name}
    save_file(rest, base / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(demo_repo / name, base / name)
    processors = json.loads((demo_repo / "processor_config.json").read_text())
    (base / "preprocessor_config.json").write_text(json.dumps(processors["image_processor"]))
    (encoder / "preprocessor_config.json").write_text(json.dumps(processors["feature_extractor"]))
    start = build(base, encoder, tmp_path / "start")

    rows = write_transcripts(tmp_path / "clips.jsonl")
    given = {"model": start, "data": tmp_path / "clips.jsonl", "eval": tmp_path / "clips.jsonl"}
    settings = {"max_steps": 150, "learning_rate": 0.01, "train_markers": True, "max_new_tokens": 8, "use_cpu": True}
    settings["encoder_cache"] = tmp_path / "cache"  # the same to the bit, and faster from the second epoch on
    words = [str(word) for name, value in (given | settings).items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "training", *words, "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_wer"] < 0.1 and summary["eval_cer"] < 0.1
    assert list((tmp_path / "run" / "runs").rglob("events.out.tfevents.*"))  # TensorBoard's

    projector = tmp_path / "run" / "audio_projector.safetensors"
    built = build(checkpoint=start, projector=projector, output=tmp_path / "trained")
    processor, model = load(built)
    answers = [row["messages"][1]["content"] for row in rows]
    given = ask(processor, model, [row["messages"][0]["content"] for row in rows])
    assert sum(text == said for text, said in zip(given, answers, strict=True)) > 0.9 * len(rows)
    checking.check(built)
