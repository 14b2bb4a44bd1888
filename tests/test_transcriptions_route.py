"""make test ONLY=tests/test_transcriptions_route.py: OpenAI's route for transcripts, answered by `serve.py`."""

import io
import json
import shutil
import subprocess
import sys
import threading
import wave
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import serving
from helpers import complete_whisper
from sounds import encode
from transformers import AutoModel, AutoProcessor

from audio_utils import fetch_audio
from demo.ask import EXAMPLES
from demo.bases import make_whisper
from publishing.paths import ROOT
from transcribe import transcribe
from transcripts import to_srt, to_vtt


ROUTE = "/v1/audio/transcriptions"
SPEECH = ("speech.mp3", (EXAMPLES / "speech.mp3").read_bytes())
QUIET = np.zeros(8_000, dtype=np.float32)  # half a second


@pytest.fixture(scope="module")
def short_pieces(demo_repo, tmp_path_factory):
    """The demo checkpoint, which knows clips of 2 s, with a processor that says so."""
    folder = shutil.copytree(demo_repo, tmp_path_factory.mktemp("short-pieces") / "repo")
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**settings, "piece_seconds": 2.5}))
    return folder


def make_aligner(folder: Path) -> Path:
    """Writes a complete Whisper of random weights, with a tokenizer and alignment heads."""
    make_whisper(folder)
    return complete_whisper(folder, "how many are there", [[0, 1], [1, 0]])


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return make_aligner(tmp_path_factory.mktemp("aligner") / "whisper")


@pytest.fixture(scope="module")
def server(short_pieces, whisper, tmp_path_factory):
    command = [sys.executable, str(short_pieces / "serve.py"), str(short_pieces), "--aligner", str(whisper)]
    with serving.serve_process(command, tmp_path_factory.mktemp("serve")) as address:
        yield address


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def recording(examples):
    """Clips that the demo checkpoint knows, one after another: a wav file."""
    chosen = [example for example in examples if example["skill"] == "transcribe"]
    clips = [fetch_audio(EXAMPLES / example["audio"][0]).numpy() for example in chosen]
    samples = np.concatenate([part for clip in clips * 4 for part in (QUIET, clip, QUIET)])
    return encode(samples, "s16.wav")


@pytest.fixture(scope="module")
def expected(short_pieces, recording):
    """What the module in this process makes of the recording."""
    processor = AutoProcessor.from_pretrained(short_pieces, trust_remote_code=True)
    model = AutoModel.from_pretrained(short_pieces, trust_remote_code=True, dtype="auto").eval()
    return transcribe(model, processor, recording)


def ask(client, content: bytes, **settings):
    """Asks the server's own model; older releases of transformers do not list the folder that it serves."""
    return client.audio.transcriptions.create(model="", file=("clip.wav", content), **settings)


def test_formats_of_a_recording_of_many_pieces(client, recording, expected):
    assert len(expected.segments) > 4
    assert ask(client, recording).text == expected.text
    assert ask(client, recording, response_format="text") == expected.text + "\n"
    assert ask(client, recording, response_format="srt") == to_srt(expected)
    assert ask(client, recording, response_format="vtt") == to_vtt(expected)
    whole = ask(client, recording, response_format="verbose_json")
    assert (whole.text, whole.duration, whole.task) == (expected.text, expected.duration, "transcribe")
    times = [(number, each.start, each.end, each.text) for number, each in enumerate(expected.segments)]
    assert [(each.id, each.start, each.end, each.text) for each in whole.segments] == times
    assert (whole.language, whole.words) == ("unknown", None)


def test_a_transcript_comes_segment_by_segment(client, recording, expected):
    *deltas, done = ask(client, recording, stream=True)
    assert {each.type for each in deltas} == {"transcript.text.delta"} and done.type == "transcript.text.done"
    assert [each.delta.strip() for each in deltas] == [each.text for each in expected.segments if each.text]
    assert "".join(each.delta for each in deltas) == done.text == expected.text


def test_times_of_words(client, recording, expected):
    both = {"response_format": "verbose_json", "timestamp_granularities": ["word", "segment"]}
    whole = ask(client, recording, language="en", **both)
    assert whole.language == "en" and whole.text
    assert " ".join(each.word for each in whole.words) == whole.text == " ".join(each.text for each in whole.segments)
    times = [time for each in whole.words for time in (each.start, each.end)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= whole.duration == expected.duration
    alone = ask(client, recording, language="en", **{**both, "timestamp_granularities": ["word"]})
    assert alone.words == whole.words and alone.segments is None


def test_language_and_prompt_reach_the_model(client, short_pieces):
    content = SPEECH[1]
    processor = AutoProcessor.from_pretrained(short_pieces, trust_remote_code=True)
    model = AutoModel.from_pretrained(short_pieces, trust_remote_code=True, dtype="auto").eval()
    for settings in ({"prompt": "How many are there?"}, {"language": "de"}):
        assert ask(client, content, **settings).text == transcribe(model, processor, content, **settings).text


def test_the_command_asks_this_server_for_pieces_as_long_as_the_folder_knows(
    server, short_pieces, recording, expected, tmp_path
):
    (tmp_path / "talk.wav").write_bytes(recording)
    line = [sys.executable, ROOT / "transcribe.py", short_pieces, tmp_path / "talk.wav", "--url", f"{server}/v1"]
    line += ["--output-dir", tmp_path, "--output-format", "json"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "talk.json").read_text())["segments"]
    assert [(each["start"], each["text"]) for each in said] == [(each.start, each.text) for each in expected.segments]
    done = subprocess.run([*line, "--served-name", "another"], capture_output=True, text=True)
    assert done.returncode == 1 and "talk.wav failed: HTTP 4" in done.stderr and "another" in done.stderr, done.stderr


def test_chats_are_answered_between_the_pieces_of_a_recording(server, client, short_pieces, recording, examples):
    """The model computes in one thread, and a long recording must not keep it to its end."""
    model, done, results = str(short_pieces), threading.Event(), []

    def transcribe_twice():
        results.extend(ask(client, recording).text for _ in range(2))
        done.set()

    thread = threading.Thread(target=transcribe_twice)
    thread.start()
    answers = []
    while not done.is_set():
        answers.append(serving.answer_of(server, model, serving.openai_form(examples[0])))
    thread.join()
    assert len(answers) >= 2 and set(answers) == {examples[0]["answer"]}
    assert results[0] == results[1] != ""


def form(name: str = SPEECH[0], content: bytes = SPEECH[1], **fields) -> dict:
    return {"files": {"file": (name, content)}, "data": fields}


BAD = {
    "no file": ({"data": {"model": "x"}}, "no file"),
    "a body that is no form": ({"json": {"file": "x"}}, "no file"),
    "two files": ({"files": [("file", SPEECH), ("file", SPEECH)]}, "The field file is given 2 times"),
    "two formats": (form(response_format=["srt", "vtt"]), "The field response_format is given 2 times"),
    "a text for a file": ({"files": {"file": (None, "x")}}, "with a name"),
    "half a form": (
        {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=y"}},
        "form cannot be",
    ),
    "no audio": (form(content=b"this is no file"), "cannot be decoded"),
    "no audio, streamed": (form(content=b"this is no file", stream="true"), "cannot be decoded"),
    "an empty file": (form(content=b""), "decoded"),
    "an unknown field": (form(sounds="x"), "no field sounds; there are file, model"),
    "an unknown format": (form(response_format="docx"), "json, text, srt, vtt, verbose_json; got docx"),
    "an unknown language": (form(language="xx"), "language must be"),
    "a temperature": (form(temperature="0.2"), "temperature must be 0"),
    "a word for a temperature": (form(temperature="hot"), "temperature must be 0"),
    "a strange stream": (form(stream="maybe"), "true or false"),
    "subtitles as a stream": (form(stream="true", response_format="srt"), "stream needs"),
    "times of letters": (form(response_format="srt", **{"timestamp_granularities[]": "letter"}), "got letter"),
    "times in plain json": (form(**{"timestamp_granularities[]": "word"}), "needs a response_format"),
    "another model": (form(model="other/model"), "the request names other/model"),
    "a file for a text": ({"files": {"file": SPEECH, "prompt": SPEECH}}, "prompt must be a text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_told_why(name, server):
    request, words = BAD[name]
    response = httpx.post(server + ROUTE, timeout=60, **request)
    assert response.status_code == (404 if name == "another model" else 400), response.text
    error = response.json()["error"]
    assert set(response.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert words in error["message"] and error["type"] == "invalid_request_error"
    assert name.startswith(("no audio", "an empty", "half a form")) == (error["param"] is None)


def test_limits_of_size_and_length(server, client):
    def chunks():
        yield b'--y\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(258):
            yield bytes(2**20)

    headers = {"content-type": "multipart/form-data; boundary=y"}
    response = httpx.post(server + ROUTE, content=chunks(), headers=headers, timeout=60)
    assert (response.status_code, "larger than the limit" in response.text) == (400, True)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 1, 8_000, 0, "NONE", None))
        writer.writeframes(bytes([128, 129]) * 8_000 * 1_850)
    with pytest.raises(openai.BadRequestError, match="3600 s"):
        ask(client, file.getvalue())


def test_word_times_without_an_aligner_are_refused(demo_repo, tmp_path):
    with serving.serve_transformers(demo_repo, tmp_path) as address:
        asked = form(response_format="verbose_json", **{"timestamp_granularities[]": "word"})
        response = httpx.post(address + ROUTE, timeout=60, **asked)
        assert (response.status_code, "--aligner" in response.text) == (400, True)
        lines = (ROOT / "docs" / "serving.md").read_text().splitlines()
        (line,) = (line for line in lines if 'curl "$SERVER' in line)
        settings = {"cwd": demo_repo, "capture_output": True, "check": True}
        out = subprocess.run(["bash", "-c", f"SERVER={address} REPO={demo_repo}; {line}"], **settings).stdout
        assert json.loads(out) == {"text": serving.SPOKEN}


def test_recordings_of_clients_that_left_are_transcribed_no_further(server, client, recording):
    """Four of them, as many as are transcribed at once, would each take as long as ten minutes of audio take."""
    content = encode(np.tile(fetch_audio(recording).numpy(), 10), "s16.wav")

    def leave():
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server}{ROUTE}", files={"file": ("long.wav", content)}, timeout=3)

    threads = [threading.Thread(target=leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ask(client.with_options(timeout=20), SPEECH[1]).text
