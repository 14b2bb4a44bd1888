"""make test ONLY=tests/test_clients.py: other people's clients over HTTP, and the curl lines of docs/serving.md."""

import base64
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import quote

import httpx
import openai
import pytest
import serving
from helpers import text
from huggingface_hub import InferenceClient
from huggingface_hub.errors import BadRequestError
from sounds import encode
from transformers import AutoProcessor

from audio_utils import fetch_audio
from configuration_qwen2_audio_vl import SHORTEST_PIECE
from demo.ask import EXAMPLES
from demo.world import SKILLS
from handler import EndpointHandler


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """`InferenceClient` asks no server at all, this machine's neither, while the Hub is switched off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def endpoint(demo_repo):
    with serving.serve(serving.make_endpoint(EndpointHandler(str(demo_repo)))) as address:
        yield address


@pytest.fixture(scope="module")
def server(demo_repo, tmp_path_factory):
    with serving.serve_transformers(demo_repo, tmp_path_factory.mktemp("serve")) as address:
        yield address


def is_short(clip) -> bool:
    """Longer pieces are asked again in halves if the voice is slow, as some voices of the demo are."""
    return len(fetch_audio(clip)) < SHORTEST_PIECE * 16_000


def test_inference_client_transcribes_at_an_endpoint(endpoint, examples):
    transcribe = InferenceClient(model=endpoint).automatic_speech_recognition
    for example in examples:
        if example["skill"] == "transcribe":
            clip = EXAMPLES / example["audio"][0]
            assert transcribe(clip).text == example["answer"]
            # With parameters the clip is sent as base64, which a short clip must not turn into a question in words.
            short = transcribe(clip, extra_body={"max_new_tokens": 1}).text
            assert example["answer"].startswith(short) and len(short.split()) == 1
            if not is_short(clip):
                continue
            (chunk,) = transcribe(clip, extra_body={"return_timestamps": True}).chunks
            assert chunk.text == example["answer"] and 0 <= chunk.timestamp[0] < chunk.timestamp[1] <= 2


def test_inference_client_sends_other_files_as_json(endpoint, examples, tmp_path):
    example, path = serving.of_skill(examples, "transcribe"), tmp_path / "clip.m4a"
    transcribe = InferenceClient(model=endpoint).automatic_speech_recognition
    path.write_bytes(encode(fetch_audio(EXAMPLES / example["audio"][0]).numpy(), "aac.m4a"))
    for clip in (path, path.read_bytes()):
        with pytest.raises(BadRequestError, match="Content type .* not supported"):
            transcribe(clip)
        assert transcribe(clip, extra_body={"max_new_tokens": 12}).text == example["answer"]


def test_curl_lines_ask_an_endpoint(endpoint, demo_repo):
    photo = serving.read_base64(demo_repo / "examples" / "photo.png")
    described = httpx.post(endpoint, json={"inputs": {"image": photo}}, timeout=60).json()
    assert serving.run_curl_lines(demo_repo, "ENDPOINT", ENDPOINT=endpoint) == [{"text": serving.SPOKEN}, described]


def test_clients_of_a_server(server, demo_repo, examples):
    for example in examples[: len(SKILLS)]:
        answers = serving.answers_by_client(server, demo_repo, serving.openai_form(example))
        assert set(answers) == {example["answer"]}, (example, answers)
    (model,) = openai.OpenAI(base_url=f"{server}/v1", api_key="none").models.list().data
    assert model.id == str(demo_repo)
    (answer,) = serving.run_curl_lines(demo_repo, "SERVER", SERVER=server, REPO=str(demo_repo))
    assert answer["choices"][0]["message"]["content"] == serving.SPOKEN


def test_a_conversation_with_a_server(server, demo_repo, examples):
    first, second = examples[0], serving.of_skill(examples, "picture")
    messages = [
        *serving.openai_form(first),
        {"role": "assistant", "content": first["answer"]},
        *serving.openai_form(second),
    ]
    alone = serving.complete(server, demo_repo, serving.openai_form(second)).usage.prompt_tokens
    completion = serving.complete(server, demo_repo, [{"role": "system", "content": "Be short."}, *messages])
    assert completion.choices[0].message.content == second["answer"]
    assert completion.usage.prompt_tokens > alone + 100  # the clip of the first turn is there


def test_sixteen_requests_at_once_to_a_server(server, demo_repo, examples):
    crowd = [examples[number % len(examples)] for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(partial(serving.answer_of, server, demo_repo), map(serving.openai_form, crowd)))
    assert answers == [example["answer"] for example in crowd]


def test_transformers_chat(server, demo_repo):
    """The command asks a server, line by line. It cannot send audio."""
    asked, history, answers = ["What is in the photo?", "How many are there?"], [], []
    for question in asked:
        history.append({"role": "user", "content": question})
        answers.append(serving.answer_of(server, demo_repo, history))
        history.append({"role": "assistant", "content": answers[-1]})
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", str(demo_repo), f"{server}/v1"]
    command += ["do_sample=False", "max_new_tokens=12"]
    settings = {"env": {**os.environ, "HF_HUB_OFFLINE": "0"}, "capture_output": True, "text": True, "timeout": 120}
    chat = subprocess.run(command, input="\n".join([*asked, "!exit", ""]), **settings)
    assert chat.returncode == 0, chat.stderr
    assert answers[1] in chat.stdout.partition(answers[0])[2], chat.stdout


NOWHERE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}
BAD = {
    "no sound": (serving.user(serving.input_audio(serving.GARBAGE)), "cannot be decoded"),
    "no picture": (serving.user(serving.picture(serving.GARBAGE)), "image"),
    "half a picture": (serving.user(serving.picture(serving.HALF_A_PICTURE)), "[a-z]{3}"),
    "no such picture": (serving.user(NOWHERE), "[a-z]{3}"),
    "too many tokens": (serving.user(text("why " * 5_000)), "4096 positions"),
    "no type": (serving.user({}), "type None"),
    "another type": (serving.user({"type": "file", "file": {"file_data": "x"}}), "type 'file'"),
    "no address": (serving.user({"type": "image_url", "image_url": {}}), "exactly one source"),
    "a tool's answer": ([{"role": "tool", "content": "7", "tool_call_id": "x"}], "role of a message"),
    "the model's turn": ([*serving.user(text("Hi.")), {"role": "assistant", "content": "Hi."}], "last message"),
    "several chats": ([serving.user(text("Hi."))] * 2, "one conversation"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_requests_to_a_server_are_told_why(name, stream, server, demo_repo, examples):
    messages, words = BAD[name]
    with pytest.raises(openai.BadRequestError, match=words):
        serving.complete(server, demo_repo, messages, stream=stream)
    assert serving.answer_of(server, demo_repo, serving.openai_form(examples[0])) == examples[0]["answer"]


SAID = {"messages": serving.user(text("Hi."))}
BAD_FIELDS = {  # the body of a request -> the field at fault, and words of the error
    "no messages": ({}, "messages", "no messages"),
    "a text for messages": ({"messages": "Hi."}, "messages", "list of messages"),
    "an unknown field": ({**SAID, "min_p": 0.1}, "min_p", "not supported"),
    "two answers": ({**SAID, "n": 2}, "n", "n must be 1, got 2"),
    "true for a number": ({**SAID, "n": True}, "n", "n must be 1"),
    "JSON as the answer": ({**SAID, "response_format": {"type": "json_object"}}, "response_format", "must be"),
    "probabilities": ({**SAID, "logprobs": True}, "logprobs", "must be false"),
    "a penalty": ({**SAID, "presence_penalty": 1.0}, "presence_penalty", "must be 0"),
    "speech": ({**SAID, "modalities": ["text", "audio"]}, "modalities", "must be"),
    "a tool": ({**SAID, "tools": [{"type": "function"}]}, "tools", "must be []"),
    "a stop": ({**SAID, "stop": "."}, "stop", "not supported"),
    "a text for a number": ({**SAID, "max_tokens": "7"}, "max_tokens", "whole number from 1"),
    "no tokens": ({**SAID, "max_completion_tokens": 0}, "max_completion_tokens", "whole number from 1"),
    "two limits": ({**SAID, "max_tokens": 7, "max_completion_tokens": 7}, "max_tokens", "one of them"),
    "a hot temperature": ({**SAID, "temperature": 2.5}, "temperature", "from 0 to 2"),
    "no number": ({**SAID, "temperature": "NaN"}, "temperature", "from 0 to 2"),
    "no tokens to draw": ({**SAID, "top_p": 0}, "top_p", "above 0"),
    "a bias that is no number": ({**SAID, "logit_bias": {"7": "x"}}, "logit_bias", "an object"),
    "a bias of a word": ({**SAID, "logit_bias": {"seven": 1}}, "logit_bias", "an object"),
    "settings in settings": ({**SAID, "generation_config": "[" * 10**5}, "generation_config", "the JSON of"),
    "a setting that is none": ({**SAID, "generation_config": '{"beams": 4}'}, "generation_config", "not supported"),
    "a method for a setting": ({**SAID, "generation_config": '{"to_dict": 4}'}, "generation_config", "not supported"),
    "several answers": (
        {**SAID, "generation_config": '{"do_sample": true, "num_return_sequences": 3}'},
        "generation_config",
        "not supported",
    ),
    "another limit": ({**SAID, "generation_config": '{"max_length": 28}'}, "generation_config", "not supported"),
    "a word for a number of tokens": (
        {**SAID, "generation_config": '{"max_new_tokens": "x"}'},
        "generation_config",
        "whole number from 1",
    ),
    "a word for the end": (
        {**SAID, "generation_config": '{"eos_token_id": "a"}'},
        "generation_config",
        "a list of them",
    ),
    "streamed beams": (
        {**SAID, "stream": True, "generation_config": '{"num_beams": 2}'},
        "generation_config",
        "cannot be streamed",
    ),
    "no template": ({**SAID, "chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs", "must not have"),
    "a limit of files": ({**SAID, "chat_template_kwargs": {"max_bytes": 10}}, "chat_template_kwargs", "must not have"),
    "another rate": (
        {**SAID, "chat_template_kwargs": {"sampling_rate": 8000}},
        "chat_template_kwargs",
        "must not have",
    ),
    "a number of 400 digits": ({**SAID, "temperature": 10**400}, "temperature", "from 0 to 2"),
    "a token that is none": ({**SAID, "stream": True, "logit_bias": {"999999": 1}}, "logit_bias", "tokens"),
    "a long token": ({**SAID, "logit_bias": {"9" * 5000: 1}}, "logit_bias", "an object"),
    "half a character": ({**SAID, "model": "\ud800"}, "model", "the request names ?"),
    "a greedy draw": (
        {**SAID, "temperature": 0.7, "generation_config": '{"do_sample": false}'},
        "temperature",
        "do_sample false",
    ),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_fields_without_effect_are_refused(name, server):
    body, param, words = BAD_FIELDS[name]
    headers = {"Content-Type": "application/json"}  # httpx would refuse half of a surrogate pair
    response = httpx.post(f"{server}/v1/chat/completions", content=json.dumps(body), headers=headers, timeout=60)
    error = response.json()["error"]
    assert (
        response.status_code == (404 if param == "model" else 400)
        and error["param"] == param
        and words in error["message"]
    ), response.text
    assert error["type"] == "invalid_request_error"


def test_errors_of_a_server_are_those_of_openai(server):
    for body in ("{", "[]"):
        headers = {"Content-Type": "application/json"}
        response = httpx.post(f"{server}/v1/chat/completions", content=body, headers=headers, timeout=60)
        assert (response.status_code, "JSON object" in response.json()["error"]["message"]) == (400, True)
    with pytest.raises(openai.NotFoundError) as caught:
        serving.complete(server, "other/model", SAID["messages"])
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_downloads_of_a_chat_hold_up_no_other_request(server, demo_repo):
    with serving.serve_by_path() as web, ThreadPoolExecutor(1) as pool:
        clip = {"type": "audio_url", "audio_url": {"url": f"{web}late-to={quote('/late-to=/clip.wav')}"}}  # after 2 s
        answer = pool.submit(serving.answer_of, server, demo_repo, serving.user(clip, text("Transcribe the audio.")))
        time.sleep(0.5)
        start = time.monotonic()
        assert httpx.get(f"{server}/health", timeout=60).status_code == 200
        assert time.monotonic() - start < 1 and not answer.done()
        assert isinstance(answer.result(), str)


def test_fields_that_ask_for_what_happens_anyway(server, demo_repo, examples):
    settings = {"n": 1, "logprobs": False, "presence_penalty": 0.0, "response_format": {"type": "text"}, "user": "me"}
    settings |= {"modalities": ["text"], "tools": [], "top_p": 1.0, "metadata": {}, "stop": None, "logit_bias": {}}
    settings |= {"safety_identifier": "me", "prompt_cache_key": "x"}
    messages = [{"role": "developer", "content": "Be short."}, *serving.openai_form(examples[0])]
    completion = serving.complete(server, demo_repo, messages, **settings)
    system = [{"role": "system", "content": "Be short."}, *serving.openai_form(examples[0])]
    assert completion.usage == serving.complete(server, demo_repo, system).usage
    assert completion.choices[0].message.content == serving.answer_of(server, demo_repo, system)


def test_answers_of_a_server_are_drawn_where_that_is_asked_for(server, demo_repo, examples):
    """The generation_config.json of the folder is greedy."""

    def ask(**settings) -> str:
        completion = serving.complete(server, demo_repo, serving.openai_form(examples[0]), **settings)
        return completion.choices[0].message.content

    answers = [ask(temperature=2.0, seed=seed) for seed in (1, 1, 2, 3)]
    assert answers[0] == answers[1] and len(set(answers)) > 1
    assert ask(temperature=1.9, top_p=1e-3) == examples[0]["answer"]
    assert len({ask(temperature=openai.omit, top_p=0.999, seed=seed, max_tokens=40) for seed in range(8)}) > 1


def test_a_seed_draws_the_same_answer_beside_others(server, demo_repo, examples):
    def ask(seed: int) -> str:
        settings = {"temperature": 2.0, "seed": seed, "max_tokens": 40}
        return serving.complete(server, demo_repo, SAID["messages"], **settings).choices[0].message.content

    alone = ask(7)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, [7, 1, 7, 2, 7, 3, 7, 4]))
    assert answers[::2] == [alone] * 4 and len({*answers}) > 2


def test_pictures_and_clips_of_a_chat_come_in_any_form(server, demo_repo, examples):
    """Base64 in lines, an address that is not quoted; and several downloads, beside which others are answered."""
    clip = (EXAMPLES / "speech.mp3").read_bytes()
    asked = text("Transcribe the audio.")
    lines = {"type": "audio_url", "audio_url": {"url": f"data:audio/mp3;base64,{base64.encodebytes(clip).decode()}"}}
    assert serving.answer_of(server, demo_repo, serving.user(lines, asked)) == serving.SPOKEN
    with serving.serve_by_path() as web, ThreadPoolExecutor(8) as pool:
        late = [{"type": "audio_url", "audio_url": {"url": f"{web}late-to=/clip é.wav"}}] * 4  # after 1 s
        start = time.monotonic()
        slow = [pool.submit(serving.answer_of, server, demo_repo, serving.user(*late, asked)) for _ in range(2)]
        time.sleep(0.3)
        serving.answer_of(server, demo_repo, SAID["messages"])
        assert time.monotonic() - start < 1.3
        assert all(isinstance(answer.result(), str) for answer in slow) and time.monotonic() - start < 6


def test_a_bias_keeps_tokens_from_an_answer(server, demo_repo, examples):
    tokenizer = AutoProcessor.from_pretrained(demo_repo, trust_remote_code=True).tokenizer
    messages, answer = serving.openai_form(examples[0]), examples[0]["answer"]
    tokens = tokenizer(answer).input_ids
    other = serving.complete(server, demo_repo, messages, logit_bias={str(token): -100 for token in tokens})
    assert not set(tokenizer(other.choices[0].message.content).input_ids) & set(tokens)


def test_transcriptions_of_a_server(server, demo_repo, examples):
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    for example in examples:
        if example["skill"] == "transcribe" and is_short(clip := EXAMPLES / example["audio"][0]):
            answer = client.audio.transcriptions.create(model=str(demo_repo), file=clip)
            assert answer.text == example["answer"]


def test_a_route_that_a_server_does_not_have(server, demo_repo):
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=str(demo_repo), input="Hi.")


def test_code_of_other_repositories_does_not_run(server, tmp_path):
    """A request may name any model, but the server was not told to trust remote code."""
    trace = tmp_path / "trace"
    (tmp_path / "other.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "other.Config", "AutoProcessor": "other.Processor", "AutoModel": "other.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other", "auto_map": auto_map}))
    response = httpx.post(f"{server}/load_model", json={"model": str(tmp_path)}, timeout=60)
    assert '"status": "error"' in response.text and not trace.exists()
    with pytest.raises(openai.NotFoundError) as caught:
        serving.complete(server, tmp_path, serving.user(text("Hi.")))
    assert "the request names" in caught.value.response.text
    with pytest.raises(AttributeError):
        AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert trace.exists()
