"""What the tests of servers share: the forms of a request, and servers in threads and processes."""

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import uvicorn
from huggingface_hub import InferenceClient
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse
from starlette.routing import Route

from demo.ask import EXAMPLES
from demo.world import SKILLS
from publishing.paths import ROOT


VLLM = ROOT / ".venv" / "vllm" / ".ready"  # of an environment of its own, as it pins another torch
SETTINGS = (
    *("--trust-remote-code", "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096"),
    *("--limit-mm-per-prompt", '{"image":2,"audio":2,"video":0}', "--host", "127.0.0.1", "--served-model-name", "demo"),
)
# Of huggingface-inference-toolkit at 833b5a2, without pictures; what else is sent is refused.
CONTENT_TYPES = {
    *("application/json", "application/json; charset=UTF-8"),
    *("audio/x-flac", "audio/flac", "audio/mpeg", "audio/x-mpeg-3", "audio/wave", "audio/wav", "audio/x-wav"),
    *("audio/ogg", "audio/x-audio", "audio/webm", "audio/webm;codecs=opus", "audio/AMR", "audio/amr"),
    *("audio/AMR-WB", "audio/AMR-WB+", "audio/m4a", "audio/x-m4a"),
}


def read_base64(name: str) -> str:
    return base64.b64encode((EXAMPLES / name).read_bytes()).decode()


def short_form(example: dict) -> dict:
    """The handler's `inputs` for an example of the demo checkpoint."""
    inputs = {"text": SKILLS[example["skill"]]["instruction"]}
    if example["audio"]:
        inputs["audio"] = [read_base64(name) for name in example["audio"]]
    if example["image"]:
        inputs["image"] = read_base64(example["image"])
    return inputs


def openai_form(example: dict) -> list[dict]:
    """Messages as OpenAI's clients send them."""
    sounds = iter(example["audio"])
    kinds = SKILLS[example["skill"]]["inputs"]
    content = [picture(example["image"]) if kind == "image" else sound(next(sounds)) for kind in kinds]
    content.append({"type": "text", "text": SKILLS[example["skill"]]["instruction"]})
    return [{"role": "user", "content": content}]


def sound(name: str) -> dict:
    return {"type": "input_audio", "input_audio": {"data": read_base64(name), "format": "wav"}}


def picture(name: str) -> dict:
    return {"type": "image_url", "image_url": {"url": png(read_base64(name))}}


def png(content: str) -> str:
    return f"data:image/png;base64,{content}"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def make_endpoint(handler) -> Starlette:
    """What an Inference Endpoint does around a handler, without its limit of one request at a time."""

    async def predict(request):
        try:
            body, kind = await request.body(), request.headers.get("content-type")
            if kind not in CONTENT_TYPES:
                raise ValueError(f"Content type {kind} not supported.")
            body = {"inputs": body} if kind.startswith("audio/") else json.loads(body)
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


@contextlib.contextmanager
def serve_process(command: list[str], address: str, log: Path, timeout: float, **environment):
    """Runs a server in a process of its own from when it answers at `address` until the end of the block."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, **environment}, cwd=log.parent, start_new_session=True
        )
        try:
            end = time.monotonic() + timeout
            while True:
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(address, timeout=5).status_code == 200:
                        break
                time.sleep(0.5)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


@contextlib.contextmanager
def serve_vllm(repo: Path, folder: Path, *settings: str, **environment: str):
    """Yields the address of `vllm serve`; its log lies in `folder`."""
    port, python = free_port(), VLLM.parent / "bin" / "python"
    command = [str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(repo), *SETTINGS, *settings]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1"} | environment
    address, log = f"http://127.0.0.1:{port}", folder / "log.txt"
    command += ["--port", str(port)]
    with serve_process(command, f"{address}/health", log, timeout=300, **environment):
        yield address


@contextlib.contextmanager
def serve_transformers(repo: Path, folder: Path):
    """Yields the address of `serve.py`, which calls the model by the path of the folder; its log lies in `folder`."""
    port = free_port()
    address, command = f"http://127.0.0.1:{port}", [sys.executable, str(repo / "serve.py"), str(repo)]
    with serve_process([*command, "--port", str(port)], f"{address}/health", folder / "log.txt", timeout=300):
        yield address


def answers_by_client(address: str, model: str, messages: list[dict]) -> dict[str, str]:
    """The greedy answers that other people's clients get from a server with OpenAI's API, streamed and not."""
    clients = {
        "openai": openai.OpenAI(base_url=f"{address}/v1", api_key="none").chat.completions.create,
        "huggingface_hub": InferenceClient(base_url=address).chat_completion,
    }
    settings, answers = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 12}, {}
    for name, create in clients.items():
        answers[name] = create(**settings).choices[0].message.content
        chunks = [chunk for chunk in create(**settings, stream=True) if chunk.choices]
        answers[f"{name}, streamed"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert len(chunks) > 1
    return answers


def run_curl_lines(folder: Path, variable: str, **environment: str) -> list[dict]:
    """Runs the lines of the card in a folder that ask `$variable`, as they stand, and returns what is answered."""
    lines = [line for line in (folder / "README.md").read_text().splitlines() if f"curl ${variable}" in line]
    settings = {"cwd": folder, "env": {**os.environ, **environment}, "capture_output": True, "check": True}
    return [json.loads(subprocess.run(["bash", "-c", line], **settings).stdout) for line in lines]
