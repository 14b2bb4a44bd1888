"""Other people's clients, over HTTP: `openai`, `huggingface_hub.InferenceClient` and the curl lines of the card."""

import base64
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import BadRequestError, HfHubHTTPError
from serving import (
    answers_by_client,
    make_endpoint,
    openai_form,
    png,
    read_base64,
    run_curl_lines,
    serve,
    serve_transformers,
)
from sounds import encode
from transformers import AutoProcessor

from audio_utils import fetch_audio
from demo.ask import EXAMPLES
from demo.world import SKILLS
from handler import EndpointHandler


GARBAGE = base64.b64encode(b"this is no file").decode()
SPOKEN = "how many are there"  # in examples/speech.mp3


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """`InferenceClient` asks no server at all, this machine's neither, while the Hub is switched off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def endpoint(demo_repo):
    with serve(make_endpoint(EndpointHandler(str(demo_repo)))) as address:
        yield address


@pytest.fixture(scope="module")
def server(demo_repo, tmp_path_factory):
    with serve_transformers(demo_repo, tmp_path_factory.mktemp("serve")) as address:
        yield address


def ask_openai(address: str, model, content: list[dict] | str, **settings):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    messages = content if isinstance(content, list) and "role" in content[0] else [{"role": "user", "content": content}]
    settings = {"temperature": 0, "max_tokens": 12, **settings}
    return client.chat.completions.create(model=str(model), messages=messages, **settings)


def test_inference_client_transcribes_at_an_endpoint(endpoint, examples):
    client = InferenceClient(model=endpoint)
    for example in examples:
        if example["skill"] == "transcribe":
            (name,) = example["audio"]
            assert client.automatic_speech_recognition(EXAMPLES / name).text == example["answer"]
            # With parameters the clip is sent as base64, which a short clip must not turn into a question in words.
            short = client.automatic_speech_recognition(EXAMPLES / name, extra_body={"max_new_tokens": 1})
            assert example["answer"].startswith(short.text) and len(short.text.split()) == 1


def test_inference_client_sends_other_files_as_json(endpoint, examples, tmp_path):
    example = next(example for example in examples if example["skill"] == "transcribe")
    path, client = tmp_path / "clip.m4a", InferenceClient(model=endpoint)
    path.write_bytes(encode(fetch_audio(EXAMPLES / example["audio"][0]).numpy(), "aac.m4a"))
    for clip in (path, path.read_bytes()):
        with pytest.raises(BadRequestError, match="Content type .* not supported"):
            client.automatic_speech_recognition(clip)
        answer = client.automatic_speech_recognition(clip, extra_body={"max_new_tokens": 12})
        assert answer.text == example["answer"]


def test_errors_of_an_endpoint_are_those_of_the_client(endpoint, examples, tmp_path):
    client = InferenceClient(model=endpoint)
    (tmp_path / "clip.wav").write_bytes(b"this is no file")
    with pytest.raises(BadRequestError, match="cannot be decoded"):
        client.automatic_speech_recognition(tmp_path / "clip.wav")
    with pytest.raises(BadRequestError, match="max_new_tokens must be an int from 1 to 1024, got 5000"):
        client.automatic_speech_recognition(EXAMPLES / "speech.mp3", extra_body={"max_new_tokens": 5000})
    with pytest.raises(HfHubHTTPError) as caught:  # the toolkit has no such route for a handler
        client.chat_completion(openai_form(examples[0]))
    assert caught.value.response.status_code == 404
    assert client.automatic_speech_recognition(EXAMPLES / "speech.mp3").text == SPOKEN


def test_curl_lines_of_the_card_ask_an_endpoint(endpoint, demo_repo):
    photo = (demo_repo / "examples" / "photo.png").read_bytes()
    described = httpx.post(endpoint, json={"inputs": {"image": base64.b64encode(photo).decode()}}, timeout=60).json()
    assert run_curl_lines(demo_repo, "ENDPOINT", ENDPOINT=endpoint) == [{"text": SPOKEN}, described]


def test_curl_line_of_the_card_asks_a_server(server, demo_repo):
    (answer,) = run_curl_lines(demo_repo, "SERVER", SERVER=server, REPO=str(demo_repo))
    assert answer["choices"][0]["message"]["content"] == SPOKEN


def test_clients_of_a_server(server, demo_repo, examples):
    for example in examples[: len(SKILLS)]:
        answers = answers_by_client(server, str(demo_repo), openai_form(example))
        assert set(answers.values()) == {example["answer"]}, (example, answers)
    (model,) = openai.OpenAI(base_url=f"{server}/v1", api_key="none").models.list().data
    assert model.id == str(demo_repo)


def test_a_conversation_with_a_server(server, demo_repo, examples):
    first, second = examples[0], next(example for example in examples if example["skill"] == "picture")
    messages = [*openai_form(first), {"role": "assistant", "content": first["answer"]}, *openai_form(second)]
    alone = ask_openai(server, demo_repo, openai_form(second)).usage.prompt_tokens
    answer = ask_openai(server, demo_repo, [{"role": "system", "content": "Be short."}, *messages])
    assert answer.choices[0].message.content == second["answer"]
    assert answer.usage.prompt_tokens > alone + 100  # the clip of the first turn is there


def test_sixteen_requests_at_once_to_a_server(server, demo_repo, examples):
    crowd = [examples[number % len(examples)] for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda example: ask_openai(server, demo_repo, openai_form(example)), crowd))
    assert [answer.choices[0].message.content for answer in answers] == [example["answer"] for example in crowd]


def test_transformers_chat(server, demo_repo):
    """The command asks a server, line by line; audio it cannot send."""
    asked = ["What is in the photo?", "How many are there?"]
    first = ask_openai(server, demo_repo, asked[0]).choices[0].message.content
    history = [*zip(("user", "assistant", "user"), (asked[0], first, asked[1]), strict=True)]
    messages = [{"role": role, "content": content} for role, content in history]
    second = ask_openai(server, demo_repo, messages).choices[0].message.content
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", str(demo_repo), f"{server}/v1"]
    lines = "\n".join([*asked, "!exit", ""])
    command += ["do_sample=False", "max_new_tokens=12"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    chat = subprocess.run(command, input=lines, env=environment, capture_output=True, text=True, timeout=120)
    assert chat.returncode == 0, chat.stderr
    assert second in chat.stdout.partition(first)[2], chat.stdout


BAD = {
    "no sound": ([{"type": "input_audio", "input_audio": {"data": GARBAGE, "format": "wav"}}], "cannot be decoded"),
    "no picture": ([{"type": "image_url", "image_url": {"url": png(GARBAGE)}}], "image"),
    "half a picture": ([{"type": "image_url", "image_url": {"url": png(read_base64("photo.png")[:400])}}], "[a-z]{3}"),
    "no such picture": ([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}], "[a-z]{3}"),
    "too many tokens": ("why " * 5_000, "4096 positions"),
    "no type": ([{}], "'type'"),
    "no address": ([{"type": "image_url", "image_url": {}}], "'url'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_to_a_server_are_told_why(name, server, demo_repo, examples):
    content, words = BAD[name]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=words):
            ask_openai(server, demo_repo, content, stream=stream)
    assert ask_openai(server, demo_repo, openai_form(examples[0])).choices[0].message.content == examples[0]["answer"]


def test_routes_that_a_server_does_not_have(server, demo_repo):
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="Ask for transcripts at /v1/chat/completions"):
        client.audio.transcriptions.create(model=str(demo_repo), file=(EXAMPLES / "speech.mp3").open("rb"))
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=str(demo_repo), input="Hi.")


def test_code_of_other_repositories_does_not_run(server, demo_repo, tmp_path):
    """A request may name any model, but the server was not told to trust remote code."""
    trace = tmp_path / "trace"
    (tmp_path / "other.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "other.Config", "AutoProcessor": "other.Processor", "AutoModel": "other.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other", "auto_map": auto_map}))
    response = httpx.post(f"{server}/load_model", json={"model": str(tmp_path)}, timeout=60)
    assert '"status": "error"' in response.text and not trace.exists()
    with pytest.raises(openai.BadRequestError) as caught:
        ask_openai(server, tmp_path, "Hi.")
    assert "pinned" in caught.value.response.text
    with pytest.raises(AttributeError):
        AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert trace.exists()
