"""What the tests of servers share: requests, good and bad, and one way to start each kind of server."""

import base64
import contextlib
import http.server
import io
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from unittest import mock
from urllib.parse import unquote

import httpx
import openai
import pytest
import trustme
import uvicorn
from huggingface_hub import InferenceClient
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse
from starlette.routing import Route

from demo.ask import EXAMPLES
from demo.bases import ASSETS
from demo.world import SKILLS
from publishing.paths import ROOT


LLAMA_CPP = ROOT / ".venv" / "llama-cpp" / "bin" / "python"  # an environment of its own, made by `make test-gguf`
VLLM = ROOT / ".venv" / "vllm" / ".ready"  # vLLM has an environment of its own, because it pins another torch
SETTINGS = (
    *("--trust-remote-code", "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096"),
    *("--limit-mm-per-prompt", '{"image":2,"audio":2,"video":1}', "--host", "127.0.0.1", "--served-model-name", "demo"),
)
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1"}
# huggingface-inference-toolkit at 833b5a2 takes these, and pictures; it refuses all others.
CONTENT_TYPES = {
    *("application/json", "application/json; charset=UTF-8"),
    *("audio/x-flac", "audio/flac", "audio/mpeg", "audio/x-mpeg-3", "audio/wave", "audio/wav", "audio/x-wav"),
    *("audio/ogg", "audio/x-audio", "audio/webm", "audio/webm;codecs=opus", "audio/AMR", "audio/amr"),
    *("audio/AMR-WB", "audio/AMR-WB+", "audio/m4a", "audio/x-m4a"),
}
SPOKEN = "how many are there"  # what is said in speech.mp3


def read_base64(name: str) -> str:
    return base64.b64encode((EXAMPLES / name).read_bytes()).decode()


GARBAGE = base64.b64encode(b"this is no file").decode()
HALF_A_PICTURE = read_base64("photo.png")[:400]


def of_skill(examples: list[dict], skill: str) -> dict:
    return next(example for example in examples if example["skill"] == skill)


def short_form(example: dict) -> dict:
    """Returns the handler's `inputs` for an example of the demo checkpoint."""
    inputs = {"text": SKILLS[example["skill"]]["instruction"]}
    if example["audio"]:
        inputs["audio"] = [read_base64(name) for name in example["audio"]]
    if example["image"]:
        inputs["image"] = read_base64(example["image"])
    return inputs


def openai_form(example: dict) -> list[dict]:
    """Returns messages as OpenAI's clients send them."""
    clips = iter(example["audio"])
    modalities = SKILLS[example["skill"]]["inputs"]
    content = [picture(read_base64(example["image"])) if m == "image" else sound(next(clips)) for m in modalities]
    return user(*content, {"type": "text", "text": SKILLS[example["skill"]]["instruction"]})


def user(*content: dict) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


def input_audio(content: str, format: str = "wav") -> dict:
    return {"type": "input_audio", "input_audio": {"data": content, "format": format}}


def sound(name: str) -> dict:
    return input_audio(read_base64(name))


def picture(content: str) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}


def blank_picture(width: int, height: int) -> str:
    """Returns base64 of a PNG, of a few kilobytes however many pixels it has."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def ask(inputs, **parameters) -> dict:
    return {"inputs": inputs, "parameters": parameters}


# Requests that `handler.py` refuses, and words of its answer.
BAD = {
    "no inputs": ({"parameters": {}}, "inputs"),
    "an unknown key": ({"inputs": "Hi.", "stream": True}, "inputs"),
    "no content": (ask({}), "nothing"),
    "audio that is null": (ask({"audio": None}), "audio have null or an empty list"),
    "no picture in a list": (ask({"text": "Hi.", "image": []}), "null or an empty list"),
    "an unknown input": (ask({"sound": "x"}), "sound"),
    "a number": (ask(3), "list of 1 to 64"),
    "no message": (ask([]), "list of 1 to 64"),
    "a message without a role": (ask([{"content": "Hi."}]), "role"),
    "a strange role": (ask([{"role": "tool", "content": "Hi."}]), "system, user, assistant"),
    "the assistant last": (ask([{"role": "assistant", "content": "Hi."}]), "last message"),
    "a number for content": (ask([{"role": "user", "content": 3}]), "a text or a list of items, got a int"),
    "a video": (ask(user({"type": "video", "video": "x"})), "video is not served"),
    "a local sound": (ask({"audio": str(EXAMPLES / "speech.mp3")}), "local files"),
    "a local picture": (ask({"image": str(EXAMPLES / "photo.png")}), "local files"),
    "a private address": (ask({"image": "http://127.0.0.1/x.png"}), "an address that is not public"),
    "no sound": (ask({"audio": GARBAGE}), "cannot be decoded"),
    "no picture": (ask({"image": GARBAGE}), "PNG"),
    "half a picture": (ask({"image": HALF_A_PICTURE}), "broken"),
    "a bomb of a picture": (ask({"image": blank_picture(8192, 8193)}), "pixels"),
    # Each has an eighth and a little more of the pixels that a request may have.
    "eight large pictures": (ask({"image": [blank_picture(8192, 1025)] * 8}), "pixels together"),
    "half a character": (ask("\ud800"), "surrogate"),
    "a million items": (ask({"text": [""] * 1_000_000}), "1000000 items"),
    "a thousand items and more": (ask(user(*[{"type": "text", "text": ""}] * 1_025)), "1025 items"),
    "nine clips": (ask({"audio": [read_base64("speech.mp3")] * 9}), "9 items of type audio"),
    "too much text": (ask("a " * 50_001), "characters"),
    "too many tokens": (ask("a b " * 2_000), "it must have at most 4096"),
    "too long an answer": (ask("Hi.", max_new_tokens=10**5), "must be an int from 1 to 1024, got 100000"),
    "no number": (ask("Hi.", temperature="hot"), "temperature"),
    "a truth for a number": (ask("Hi.", max_new_tokens=True), "max_new_tokens"),
    "not a number": (ask("Hi.", top_p=float("nan")), "top_p"),
    "an unknown parameter": (ask("Hi.", max_tokens=3), "no parameter max_tokens"),
    "no parameters": ({"inputs": "Hi.", "parameters": "fast"}, "Parameters"),
    "a contradiction": (ask("Hi.", do_sample=False, top_k=3), "top_k must not be given with do_sample false"),
}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def make_endpoint(handler) -> Starlette:
    """Makes what an Inference Endpoint has around a handler, without its limit of one request at a time."""

    async def predict(request):
        try:
            body, content_type = await request.body(), request.headers.get("content-type")
            if content_type not in CONTENT_TYPES:
                raise ValueError(f"Content type {content_type} not supported.")
            body = {"inputs": body} if content_type.startswith("audio/") else json.loads(body)
            return JSONResponse(await run_in_threadpool(handler, body))
        except Exception as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    return Starlette(routes=[Route(path, predict, methods=["POST"]) for path in ("/", "/predict")])


@contextlib.contextmanager
def serve(app: Starlette):
    """Yields the address of an app behind a real server."""
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.config.port}"
    server.should_exit = True
    thread.join()


class ByPath(http.server.BaseHTTPRequestHandler):
    """Behaves as the path says, and sends english.wav where nothing is wrong."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        with contextlib.suppress(OSError):
            self.answer(self.path[1:], (ASSETS / "audio" / "english.wav").read_bytes(), self.server.stopped.wait)

    def start(self, status: int, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def answer(self, path: str, recording: bytes, wait):
        name, _, target = path.partition("=")
        if path == "slow-header":
            while not wait(0.2):
                self.wfile.write(b"H")
        elif path == "missing":
            self.send_error(404)
        elif name in ("to", "late-to"):
            wait(name == "late-to")  # 1 s
            self.start(302, Location=unquote(target))
        elif path == "loop":
            self.start(302, Location="/loop")
        elif path in ("endless", "endless-redirect", "slow"):
            self.start(302 if path == "endless-redirect" else 200, Location="/clip.wav")
            while not wait(0.2 if path == "slow" else 0):
                self.wfile.write(bytes(1 if path == "slow" else 2**16))
        elif path == "chunked":
            self.protocol_version = "HTTP/1.1"
            self.start(200, Transfer_Encoding="chunked")
            for piece in (recording[:50_000], recording[50_000:], b""):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        else:
            self.start(206 if path == "partial" else 200, Content_Length=len(recording) + 1000 * (path == "short"))
            self.wfile.write(recording)


@contextlib.contextmanager
def serve_by_path(certificate: trustme.LeafCert | None = None):
    """Yields the address of the root of a server that behaves as the path of a request says, see `ByPath`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ByPath)
    server.stopped = threading.Event()
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with server:
        yield f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}/"
        server.stopped.set()
        server.shutdown()


@contextlib.contextmanager
def serve_process(command: list[str], folder: Path, health: str = "/health", **environment: str):
    """Yields the address of a server in a process of its own, once it answers at `health`; its log lies in `folder`."""
    port, log, end = free_port(), folder / "log.txt", time.monotonic() + 600
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        settings = {"stdout": file, "stderr": file, "cwd": folder, "start_new_session": True}
        process = subprocess.Popen([*command, "--port", str(port)], env={**os.environ, **environment}, **settings)
        try:
            while True:
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(address + health, timeout=5).status_code == 200:
                        break
                time.sleep(0.5)
            yield address
        finally:
            for signal in (15, 9):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signal)
                    process.wait(30)


def serve_vllm(repo: Path, folder: Path, *settings: str, **environment: str):
    """Serves a repository by `vllm serve` under the name `demo`, or skips the test where vLLM is not installed."""
    if not VLLM.exists():
        pytest.skip("vLLM is not installed; `make test-vllm` installs it where it can be had for this machine.")
    command = [str(VLLM.parent / "bin" / "python"), "-m", "vllm.entrypoints.cli.main", "serve", str(repo)]
    return serve_process([*command, *SETTINGS, *settings], folder, **VLLM_ENVIRONMENT, **environment)


def serve_llama_cpp(files: tuple[Path, Path], folder: Path, threads: int = 2):
    """Serves what `upload.py gguf` wrote by llama.cpp."""
    command = [str(LLAMA_CPP), str(Path(__file__).with_name("llama_server.py")), *map(str, files), str(threads)]
    return serve_process(command, folder)


def serve_transformers(repo: Path, folder: Path):
    """Serves a repository by its `serve.py` under the name of its path."""
    return serve_process([sys.executable, str(repo / "serve.py"), str(repo)], folder)


def serve_page(repo: Path, folder: Path):
    """Serves the page of a repository, its `app.py`."""
    return serve_process([sys.executable, str(repo / "app.py")], folder, "/", GRADIO_ANALYTICS_ENABLED="False")


def complete(address: str, model, messages: list[dict], **settings):
    """Returns the greedy completion that OpenAI's client gets. It asks once, also where the server fails."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    settings = {"temperature": 0, "max_tokens": 12, **settings}
    return client.chat.completions.create(model=str(model), messages=messages, **settings)


def answer_of(address: str, model, messages: list[dict]) -> str:
    return complete(address, model, messages).choices[0].message.content


@mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # or `InferenceClient` asks no server at all
def answers_by_client(address: str, model, messages: list[dict]) -> list[str]:
    """Returns the greedy answers of `openai` and `huggingface_hub`, each whole and streamed."""
    hub = InferenceClient(base_url=address).chat_completion
    create_by_hub = partial(hub, model=str(model), messages=messages, temperature=0, max_tokens=12)
    answers = []
    for create in (partial(complete, address, model, messages), create_by_hub):
        answers.append(create().choices[0].message.content)
        chunks = [chunk for chunk in create(stream=True) if chunk.choices]
        answers.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
        assert len(chunks) > 1
    return answers


def run_curl_lines(folder: Path, variable: str, **environment: str) -> list[dict]:
    """Runs the lines of docs/serving.md that ask `$variable`, in a built folder, and returns what is answered."""
    lines = (ROOT / "docs" / "serving.md").read_text().splitlines()
    settings = {"cwd": folder, "env": {**os.environ, **environment}, "capture_output": True, "check": True}
    asking = [line for line in lines if f"curl ${variable}" in line]
    return [json.loads(subprocess.run(["bash", "-c", line], **settings).stdout) for line in asking]
