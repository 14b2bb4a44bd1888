"""
The demo checkpoint behind `vllm serve`, asked over HTTP: `make test-vllm`. vLLM has a virtual environment of its own,
as it pins another torch; what it answers is compared with `generate` in this one.
"""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import av
import httpx
import numpy as np
import openai
import pytest
import torch
from helpers import text
from huggingface_hub import InferenceClient
from huggingface_hub.errors import BadRequestError
from serving import VLLM, answers_by_client, openai_form, picture, png, run_curl_lines, serve_vllm, sound
from transformers import AutoModel, AutoProcessor

import upload
from audio_utils import fetch_audio
from demo.ask import EXAMPLES, write_questions
from demo.world import SKILLS
from evaluation import __main__ as evaluation
from evaluation.scoring import read_predictions


pytestmark = pytest.mark.vllm
STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def installed():
    if not VLLM.exists():
        pytest.skip("vLLM is not installed; `make test-vllm` installs it where it can be had for this machine.")


@pytest.fixture(scope="module")
def address(installed, demo_repo, tmp_path_factory):
    with serve_vllm(demo_repo, tmp_path_factory.mktemp("vllm")) as address:
        yield address


@pytest.fixture(scope="module")
def loaded(demo_repo):
    processor = AutoProcessor.from_pretrained(demo_repo, trust_remote_code=True)
    return processor, AutoModel.from_pretrained(demo_repo, trust_remote_code=True, dtype=torch.float32).eval()


def post(address: str, messages: list[dict], **settings) -> httpx.Response:
    body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": STEPS, **settings}
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=300)


def served_ids(address: str, messages: list[dict]) -> list[int]:
    response = post(address, messages, return_token_ids=True)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


def generated_ids(loaded, messages: list[dict]) -> list[int]:
    processor, model = loaded
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def wav(samples: np.ndarray, rate: int) -> dict:
    """A content item of sound, float `[channels, samples]`, as 16 bit wav."""
    file = io.BytesIO()
    layout = "stereo" if len(samples) == 2 else "mono"
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout=layout)
        interleaved = np.ascontiguousarray((samples * 32767).astype(np.int16).T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(interleaved, format="s16", layout=layout)
        frame.sample_rate = rate
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}}


def user(*content: dict) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


def test_examples_are_answered_right(address, loaded, examples):
    for example in examples:
        messages = openai_form(example)
        assert post(address, messages).json()["choices"][0]["message"]["content"] == example["answer"], example
        assert served_ids(address, messages) == generated_ids(loaded, messages), example


KINDS = {
    "text": lambda names: user(text("What is in the photo?")),
    "image": lambda names: user(picture(names["image"]), text("What is in the photo?")),
    "audio": lambda names: user(sound(names["audio"])),
    "audio and image": lambda names: user(sound(names["audio"]), picture(names["image"]), text("Do they agree?")),
    "two clips": lambda names: user(sound(names["audio"]), sound(names["long"]), text("Do both clips say the same?")),
    "interleaved": lambda names: user(
        picture(names["image"]),
        sound(names["audio"]),
        text("and"),
        picture("photo.png"),
        sound(names["long"]),
    ),
    "a conversation": lambda names: [
        *user(sound(names["audio"]), text("Transcribe the audio.")),
        {"role": "assistant", "content": "two yellow stars"},
        *user(picture(names["image"]), text("Do the audio and the photo agree?")),
    ],
}


@pytest.fixture(scope="module")
def names(examples) -> dict[str, str]:
    sounds = sorted((name for e in examples for name in e["audio"]), key=lambda name: (EXAMPLES / name).stat().st_size)
    return {"audio": sounds[0], "long": sounds[-1], "image": next(e["image"] for e in examples if e["image"])}


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_ids_equal_those_of_generate(kind, address, loaded, names):
    messages = KINDS[kind](names)
    assert served_ids(address, messages) == generated_ids(loaded, messages)


def test_clip_in_stereo_at_44100_hz(address, examples):
    """Resampled and mixed down by vLLM itself, so the answer is compared and not the ids."""
    example = next(example for example in examples if example["skill"] == "transcribe")
    clip = fetch_audio(EXAMPLES / example["audio"][0], 44_100).numpy()
    response = post(address, user(wav(np.stack([clip, clip]), 44_100), text("Transcribe the audio.")))
    assert response.json()["choices"][0]["message"]["content"] == example["answer"]


@pytest.mark.parametrize("seconds", [4, 31])
def test_clips_of_several_windows(seconds, address, loaded, examples):
    """2 and 11 windows of this checkpoint, alone and beside a clip of one."""
    example = next(example for example in examples if example["skill"] == "transcribe")
    long = np.zeros((1, seconds * 16_000), np.float32)
    clip = fetch_audio(EXAMPLES / example["audio"][0]).numpy()
    long[0, -len(clip) :] = clip
    for content in ([wav(long, 16_000)], [sound(example["audio"][0]), wav(long, 16_000)]):
        messages = user(*content, text("Transcribe the audio."))
        assert post(address, messages).json()["usage"]["prompt_tokens"] > seconds * 50
        assert served_ids(address, messages) == generated_ids(loaded, messages)


@pytest.mark.parametrize("what", ["no sound", "no picture", "too many clips", "too long a prompt", "too long a clip"])
def test_bad_requests_are_400_and_the_engine_lives(what, address, names, examples):
    garbage = base64.b64encode(b"this is no file").decode()
    messages = {
        "no sound": user({"type": "input_audio", "input_audio": {"data": garbage, "format": "wav"}}),
        "no picture": user({"type": "image_url", "image_url": {"url": png(garbage)}}),
        "too many clips": user(*[sound(names["audio"])] * 3),
        "too long a prompt": user(text("two red circles " * 3_000)),
        "too long a clip": user(wav(np.zeros((1, 90 * 16_000), np.float32), 16_000)),
    }[what]
    response = post(address, messages)
    assert response.status_code == 400, response.text[:500]
    assert "Traceback" not in response.text
    example = next(example for example in examples if example["skill"] == "transcribe")
    assert post(address, openai_form(example)).json()["choices"][0]["message"]["content"] == example["answer"]


@pytest.fixture
def online(monkeypatch):
    """`InferenceClient` asks no server at all, this machine's neither, while the Hub is switched off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_other_clients_get_the_same_answers(address, online, demo_repo, examples):
    for example in examples[: len(SKILLS)]:
        answers = answers_by_client(address, "demo", openai_form(example))
        assert set(answers.values()) == {example["answer"]}, (example, answers)
    (answer,) = run_curl_lines(demo_repo, "SERVER", SERVER=address, REPO="demo")
    assert answer["choices"][0]["message"]["content"] == "how many are there"


@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_those_of_the_clients(stream, address, online):
    garbage = base64.b64encode(b"this is no file").decode()
    content = [{"type": "input_audio", "input_audio": {"data": garbage, "format": "wav"}}]
    request = {"model": "demo", "messages": user(*content), "stream": stream}
    with pytest.raises(openai.BadRequestError, match="audio"):
        openai.OpenAI(base_url=f"{address}/v1", api_key="none").chat.completions.create(**request)
    with pytest.raises(BadRequestError, match="audio"):
        InferenceClient(base_url=address).chat_completion(**request)


def test_64_requests_at_once(address, examples):
    crowd = [examples[number % len(examples)] for number in range(64)]
    with ThreadPoolExecutor(64) as pool:
        responses = list(pool.map(lambda example: post(address, openai_form(example)), crowd))
    assert [response.json()["choices"][0]["message"]["content"] for response in responses] == [
        example["answer"] for example in crowd
    ]


def test_rows_are_evaluated_as_by_generate(address, online, demo_repo, tmp_path):
    write_questions(tmp_path / "questions.jsonl")
    for name, more in (("served", ["--backend", "vllm", "--url", f"{address}/v1"]), ("here", ["--dtype", "float32"])):
        words = ["predict", str(demo_repo), "--data", str(tmp_path / "questions.jsonl"), "--max-new-tokens", str(STEPS)]
        evaluation.main([*words, "--output", str(tmp_path / name), "--no-media", *more])
    served, here = (read_predictions(tmp_path / name / "predictions.jsonl") for name in ("served", "here"))
    assert [row["pred_text"] for row in served] == [row["pred_text"] for row in here]
    assert sum(row["time"] for row in served) > 0


def test_trimmed_audio_tokens(repo_30s, tmp_path):
    """Windows of 30 s, random weights: clips of a part of a window, of one, and of some, alone and together."""
    folder = upload.build(checkpoint=repo_30s, output=tmp_path / "trimmed", audio_tokens="trimmed")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    loaded = processor, AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)

    def clip(seconds: float) -> dict:
        return wav(rng.normal(0, 0.1, (1, round(seconds * 16_000))).astype(np.float32), 16_000)

    with serve_vllm(folder, tmp_path, "--max-num-batched-tokens", "4096") as address:
        for lengths in ((0.3,), (3,), (29.99,), (30,), (30.01,), (70,), (0.3, 31), (31, 3)):
            messages = user(*[clip(seconds) for seconds in lengths], text("What is said?"))
            tokens = sum(-(-round(seconds * 16_000) // 320) for seconds in lengths)
            response = post(address, messages)
            assert response.status_code == 200, (lengths, response.text)
            assert tokens < response.json()["usage"]["prompt_tokens"] < tokens + 100, lengths
            assert served_ids(address, messages) == generated_ids(loaded, messages), lengths


def test_tensor_parallel_on_two_ranks(demo_repo, loaded, examples, tmp_path):
    """One thread each: vLLM would by itself give every rank a NUMA node of its own."""
    settings = ("--tensor-parallel-size", "2")
    with serve_vllm(demo_repo, tmp_path, *settings, VLLM_CPU_OMP_THREADS_BIND="0|1") as address:
        for example in examples[: len(SKILLS)]:
            messages = openai_form(example)
            assert served_ids(address, messages) == generated_ids(loaded, messages), example
