"""make test-vllm: the answers of `vllm serve`, in an environment of its own, are those of `generate` in this one."""

import base64
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import openai
import pytest
import serving
import torch
from data_rows import chat, write_lines
from helpers import text
from sounds import encode

from audio_utils import fetch_audio
from demo.ask import EXAMPLES, load, write_questions
from demo.bases import make_base
from demo.world import SKILLS
from evaluation import __main__ as evaluation
from evaluation.scoring import read_predictions
from publishing.build import build
from publishing.paths import ROOT
from transcribe import transcribe


pytestmark = pytest.mark.vllm
STEPS = 12


@pytest.fixture(scope="module")
def address(demo_repo, tmp_path_factory):
    with serving.serve_vllm(demo_repo, tmp_path_factory.mktemp("vllm")) as address:
        yield address


@pytest.fixture(scope="module")
def loaded(demo_repo):
    return load(demo_repo, torch.float32)


def check_ids(address: str, loaded, messages: list[dict], local: list[dict] | None = None):
    """Compares the token ids that the server answers with those of `generate`, which may get other messages."""
    processor, model = loaded
    choice = serving.complete(address, "demo", messages, extra_body={"return_token_ids": True}).choices[0]
    inputs = processor.make_inputs(local or messages)
    output = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    assert choice.token_ids == output[0, inputs["input_ids"].shape[1] :].tolist(), messages


def wav(samples: np.ndarray, name: str = "s16.wav", **settings) -> dict:
    """Makes a content item of float32 `[samples]` at 16 kHz."""
    return serving.input_audio(base64.b64encode(encode(samples, name, **settings)).decode())


def test_examples_are_answered_right(address, loaded, examples):
    for example in examples:
        messages = serving.openai_form(example)
        assert serving.answer_of(address, "demo", messages) == example["answer"], example
        check_ids(address, loaded, messages)


def test_greedy_ids_equal_those_of_generate(address, loaded, examples):
    """Content that no example has: text alone, a bare clip, both kinds of media in turns, and a conversation."""
    names = sorted((name for e in examples for name in e["audio"]), key=lambda name: (EXAMPLES / name).stat().st_size)
    short, long = serving.sound(names[0]), serving.sound(names[-1])
    image = serving.picture(serving.read_base64(serving.of_skill(examples, "picture")["image"]))
    photo = serving.picture(serving.read_base64("photo.png"))
    answer = {"role": "assistant", "content": [text("two yellow stars")]}
    for messages in (
        serving.user(text("What is in the photo?")),
        serving.user(short),
        serving.user(image, short, text("and"), photo, long),
        [*serving.user(short, text("Transcribe the audio.")), answer, *serving.user(image, text("Do they agree?"))],
    ):
        check_ids(address, loaded, messages)


def test_clip_in_stereo_at_44100_hz(address, examples):
    """vLLM itself resamples it and mixes it down, so the answer is compared and not the ids."""
    example = serving.of_skill(examples, "transcribe")
    clip = wav(fetch_audio(EXAMPLES / example["audio"][0]).numpy(), "s24.wav", layout="stereo")
    messages = serving.user(clip, text("Transcribe the audio."))
    assert serving.answer_of(address, "demo", messages) == example["answer"]


@pytest.mark.parametrize("seconds", [4, 31])
def test_clips_of_several_windows(seconds, address, loaded, examples):
    """2 and 11 windows of this checkpoint, alone and beside a clip of one."""
    example = serving.of_skill(examples, "transcribe")
    long = np.zeros(seconds * 16_000, np.float32)
    clip = fetch_audio(EXAMPLES / example["audio"][0]).numpy()
    long[-len(clip) :] = clip
    for content in ([wav(long)], [serving.sound(example["audio"][0]), wav(long)]):
        messages = serving.user(*content, text("Transcribe the audio."))
        assert serving.complete(address, "demo", messages).usage.prompt_tokens > seconds * 50
        check_ids(address, loaded, messages)


@pytest.mark.parametrize("what", ["no sound", "no picture", "too many clips", "too long a prompt", "too long a clip"])
def test_bad_requests_are_400_and_the_engine_lives(what, address, examples):
    example = serving.of_skill(examples, "transcribe")
    messages = {
        "no sound": serving.user(serving.input_audio(serving.GARBAGE)),
        "no picture": serving.user(serving.picture(serving.GARBAGE)),
        "too many clips": serving.user(*[serving.sound(example["audio"][0])] * 3),
        "too long a prompt": serving.user(text("two red circles " * 3_000)),
        "too long a clip": serving.user(wav(np.zeros(90 * 16_000, np.float32))),
    }[what]
    with pytest.raises(openai.BadRequestError) as caught:
        serving.complete(address, "demo", messages)
    assert "Traceback" not in caught.value.response.text
    assert serving.answer_of(address, "demo", serving.openai_form(example)) == example["answer"]


def test_other_clients_get_the_same_answers(address, demo_repo, examples):
    for example in examples[: len(SKILLS)]:
        answers = serving.answers_by_client(address, "demo", serving.openai_form(example))
        assert set(answers) == {example["answer"]}, (example, answers)
    (answer,) = serving.run_curl_lines(demo_repo, "SERVER", SERVER=address, REPO="demo")
    assert answer["choices"][0]["message"]["content"] == serving.SPOKEN


def test_64_requests_at_once(address, examples):
    crowd = [examples[number % len(examples)] for number in range(64)]
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(partial(serving.answer_of, address, "demo"), map(serving.openai_form, crowd)))
    assert answers == [example["answer"] for example in crowd]


def test_rows_are_evaluated_as_by_generate(address, demo_repo, tmp_path):
    write_questions(tmp_path / "questions.jsonl")
    for name, more in (("served", ["--backend", "vllm", "--url", f"{address}/v1"]), ("here", ["--dtype", "float32"])):
        words = ["predict", str(demo_repo), "--data", str(tmp_path / "questions.jsonl"), "--max-new-tokens", str(STEPS)]
        evaluation.main([*words, "--output", str(tmp_path / name), "--no-media", *more])
    served, here = (read_predictions(tmp_path / name / "predictions.jsonl") for name in ("served", "here"))
    assert [row["pred_text"] for row in served] == [row["pred_text"] for row in here]
    assert sum(row["time"] for row in served) > 0


def test_long_recordings_are_transcribed_as_here(address, demo_repo, loaded, examples, tmp_path):
    """By `transcribe.py --url` and by an evaluation: pieces of at most 3 s, 8 requests at once."""
    clips = [fetch_audio(EXAMPLES / name).numpy() for example in examples for name in example["audio"]]
    joined = np.concatenate([part for clip in clips[:12] for part in (clip, np.zeros(8_000, np.float32))])
    path = tmp_path / "talk.wav"
    path.write_bytes(encode(joined, "s16.wav"))
    expected = transcribe(*reversed(loaded), str(path), max_seconds=3.0)
    command = [sys.executable, "transcribe.py", "--url", f"{address}/v1", str(path), "--max-seconds", "3"]
    subprocess.run([*command, "--output-dir", str(tmp_path)], cwd=ROOT, check=True)
    answered = json.loads((tmp_path / "talk.json").read_text())
    assert [segment["text"] for segment in answered["segments"]] == [segment.text for segment in expected.segments]
    rows = [chat({"type": "audio", "path": "talk.wav"}, text("Transcribe the audio."), answer=expected.text)]
    words = ["predict", str(demo_repo), "--data", str(write_lines(tmp_path / "rows.jsonl", rows)), "--long-form"]
    words += ["--backend", "vllm", "--url", f"{address}/v1", "--output", str(tmp_path / "results")]
    evaluation.main(words)
    (row,) = read_predictions(tmp_path / "results" / "predictions.jsonl")
    assert row["pred_text"] == expected.text


def test_trimmed_audio_tokens(repo_30s, tmp_path):
    """Windows of 30 s, random weights: clips of a part of a window, of one, and of some, alone and together."""
    folder = build(checkpoint=repo_30s, output=tmp_path / "trimmed", audio_tokens="trimmed")
    loaded, rng = load(folder, torch.float32), np.random.default_rng(0)

    def clip(seconds: float) -> dict:
        return wav(rng.normal(0, 0.1, round(seconds * 16_000)).astype(np.float32))

    with serving.serve_vllm(folder, tmp_path, "--max-num-batched-tokens", "4096") as address:
        for lengths in ((0.3,), (3,), (29.99,), (30,), (30.01,), (70,), (0.3, 31), (31, 3)):
            messages = serving.user(*[clip(seconds) for seconds in lengths], text("What is said?"))
            tokens = sum(-(-round(seconds * 16_000) // 320) for seconds in lengths)
            assert tokens < serving.complete(address, "demo", messages).usage.prompt_tokens < tokens + 100, lengths
            check_ids(address, loaded, messages)


def test_tensor_parallel_on_two_ranks(demo_repo, loaded, examples, tmp_path):
    """One thread each: vLLM would by itself give every rank a NUMA node of its own."""
    settings = ("--tensor-parallel-size", "2")
    with serving.serve_vllm(demo_repo, tmp_path, *settings, VLLM_CPU_OMP_THREADS_BIND="0|1") as address:
        for example in examples[: len(SKILLS)]:
            check_ids(address, loaded, serving.openai_form(example))


def film_messages(sound, folder: Path) -> list[list[dict]]:
    """Makes messages with a film and a clip, for the server and for `generate`, which opens a file."""
    film = folder / "film.mp4"
    film.write_bytes(encode(sound(1.9), "aac.m4a", video=True))
    url = {"url": f"data:video/mp4;base64,{base64.b64encode(film.read_bytes()).decode()}"}
    forms = {"type": "video_url", "video_url": url}, {"type": "video", "video": str(film)}
    return [serving.user(form, wav(sound(0.7, 1)), text("?")) for form in forms]


def test_video(address, loaded, sound, tmp_path):
    check_ids(address, loaded, *film_messages(sound, tmp_path))


@pytest.mark.parametrize("name, refused", [("qwen2_5_vl", ["video"]), ("qwen3_vl", ["image", "video"])])
def test_newer_bases(name, refused, bases, sound, tmp_path):
    """Random models answer as `generate` does. What vLLM would silently get wrong is HTTP 400, and the engine lives."""
    repo = build(make_base(tmp_path / name, name), bases["whisper"], tmp_path / "repo")
    picture = serving.user(serving.picture(serving.read_base64("photo.png")), wav(sound(0.7, 1)), text("?"))
    film, _ = film_messages(sound, tmp_path)
    loaded = load(repo, torch.float32)
    with serving.serve_vllm(repo, tmp_path) as address:
        for kind, messages in (("image", picture), ("video", film)):
            if kind in refused:
                with pytest.raises(openai.BadRequestError, match="Failed to apply"):
                    serving.complete(address, "demo", messages)
                assert f"its answers about {kind}s would be wrong" in (tmp_path / "log.txt").read_text()
            else:
                check_ids(address, loaded, messages)
        check_ids(address, loaded, serving.user(text("What is in the photo?")))
        check_ids(address, loaded, serving.user(wav(sound(0.7, 1)), text("and"), wav(sound(1.9, 2)), text("?")))
