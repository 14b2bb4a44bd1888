"""
Measures the ways to serve side by side with the demo checkpoint: `generate` in a loop, `handler.py` behind HTTP, and
vLLM if `make test-vllm` has installed it; each with fixed and with trimmed audio tokens. Then it measures `handler.py`
under load: many clients at once, and short requests beside long ones.

    python -m benchmarks.serving [--readme]
"""

import base64
import contextlib
import io
import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
from openai import OpenAI
from PIL import Image

from benchmarks.measure import Clock, where
from benchmarks.report import report, table
from configuration_qwen2_audio_vl import AUDIO_TOKEN_COUNTS
from demo.ask import built_demo, read_examples
from evaluation.generate import load
from handler import EndpointHandler
from tests.serving import VLLM, make_endpoint, openai_form, serve, serve_vllm, short_form


REQUESTS, CLIENTS, STEPS = 96, 16, 12
LONG_CLIENTS = 8


def send_all(send: Callable, requests: list, clients: int) -> tuple[list, float]:
    """Sends requests from so many threads. Returns what `send` returns for each, and the requests per second."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(send, requests))
    return results, len(requests) / (time.perf_counter() - start)


def repeat(requests: list, count: int = REQUESTS) -> list:
    return list(itertools.islice(itertools.cycle(requests), count))


def send_to_model(processor, model, example: dict) -> tuple[str, float]:
    """Returns the answer and the seconds to its first token."""
    start, clock = time.perf_counter(), Clock()
    (text,) = processor.answer(model, [openai_form(example)], STEPS, stopping_criteria=[clock])
    return text, clock.times[0] - start


def handler_form(example: dict) -> dict:
    return {"inputs": short_form(example), "parameters": {"max_new_tokens": STEPS}}


def send_to_handler(client: httpx.Client, address: str, body: dict) -> tuple[str | None, float]:
    """Returns the whole answer, or None if the request was refused, and its seconds."""
    start = time.perf_counter()
    text = client.post(address, json=body).json().get("text")
    return text, time.perf_counter() - start


def send_to_vllm(client: OpenAI, example: dict) -> tuple[str, float]:
    """Returns the answer and the seconds to its first token."""
    start, times, pieces = time.perf_counter(), [], []
    body = {"model": "demo", "messages": openai_form(example), "temperature": 0, "max_tokens": STEPS}
    for chunk in client.chat.completions.create(**body, stream=True):
        if piece := chunk.choices[0].delta.content:
            times.append(time.perf_counter() - start)
            pieces.append(piece)
    return "".join(pieces), times[0]


def time_examples(send: Callable, many: int | None = CLIENTS) -> list[str]:
    """
    Returns three cells: requests per second of one client and of many, and the time to the first token of one client.
    `send` sends an example of the demo checkpoint, and returns the answer and the seconds to its first token. Raises a
    ValueError if an answer is wrong.
    """
    examples = read_examples()
    for example in examples[:5]:
        send(example)
    requests, rates, firsts = repeat(examples), [], []
    for clients in (1, many) if many else (1,):
        answers, rate = send_all(send, requests, clients)
        rates.append(f"{rate:.1f}")
        firsts.append(statistics.median(first for _, first in answers))
        if [text for text, _ in answers] != [example["answer"] for example in requests]:
            raise ValueError(f"Answers are wrong: {answers}")
    return [rates[0], "".join(rates[1:]), f"{firsts[0] * 1e3:.0f} ms"]


@contextlib.contextmanager
def serve_handler(repo: Path):
    """Yields the address of the handler of a folder, which computes in float32."""
    handler = EndpointHandler(str(repo))
    handler.model.float()
    with serve(make_endpoint(handler)) as address:
        yield address


def compare_ways(repo: Path, client: httpx.Client) -> dict[str, list[str]]:
    """Returns the cells of [`time_examples`] for each way to serve."""
    processor, model = load(repo)
    cells = {"`generate` in a loop": time_examples(partial(send_to_model, processor, model.float()), None)}
    with serve_handler(repo) as address:
        cells["`handler.py` behind HTTP, the whole answer"] = time_examples(
            lambda example: send_to_handler(client, address, handler_form(example))
        )
    if VLLM.exists():
        with serve_vllm(repo, repo.parent, VLLM_CPU_NUM_OF_RESERVED_CPU="0") as address:
            server = OpenAI(base_url=f"{address}/v1", api_key="none")
            cells["`vllm serve`"] = time_examples(partial(send_to_vllm, server))
    return cells


def measure_load(repo: Path, client: httpx.Client) -> str:
    """Measures the requests to one process while others ask as well."""
    examples = [handler_form(example) for example in read_examples()]
    picture = io.BytesIO()
    Image.new("RGB", (100, 100)).save(picture, "PNG")  # the answer to it does not end by itself
    endless = {"image": base64.b64encode(picture.getvalue()).decode()}
    long = {"inputs": endless, "parameters": {"max_new_tokens": 1024}}
    short = {"inputs": {"text": "Hi."}, "parameters": {"max_new_tokens": 1, "repetition_penalty": 1.1}}

    def row_of(name: str, bodies: list[dict], clients: int) -> tuple:
        answers, rate = send_all(partial(send_to_handler, client, address), bodies, clients)
        texts, seconds = zip(*answers, strict=True)
        times = (f"{figure:.2f} s" for figure in (statistics.median(seconds), max(seconds)))
        return name, f"{rate:.1f}", *times, texts.count(None)

    with serve_handler(repo) as address:
        rows = [
            row_of(f"{clients} client{'s' * (clients > 1)}", repeat(examples, max(REQUESTS, 4 * clients)), clients)
            for clients in (1, 8, 64)
        ]
        rows.append(row_of("one token, one client", [short] * REQUESTS, 1))
        with ThreadPoolExecutor(LONG_CLIENTS) as pool:
            others = [pool.submit(client.post, address, json=long) for _ in range(LONG_CLIENTS)]
            time.sleep(1)
            name = f"the same beside {LONG_CLIENTS} of 1,024 tokens and other parameters"
            rows.append(row_of(name, [short] * REQUESTS, 1))
            if any(other.done() for other in others):
                raise ValueError("The long requests ended before the short ones.")
    return table(("", "requests per second", "median", "slowest", "refused"), rows)


def main() -> list[str]:
    ways, loads = [], []
    for audio_tokens in AUDIO_TOKEN_COUNTS:
        with built_demo(audio_tokens=audio_tokens) as repo, httpx.Client(timeout=300) as client:
            ways.append(compare_ways(repo, client))
            if audio_tokens == "fixed":
                loads = ["`handler.py` under load, with fixed audio tokens:", measure_load(repo, client)]
    columns = ("requests per second, one client", "sixteen clients", "first token, one client")
    head = ("", *(cell for column in columns for cell in (f"{column}, fixed", "trimmed")))
    fixed, trimmed = ways
    rows = [(name, *itertools.chain(*zip(fixed[name], trimmed[name], strict=True))) for name in fixed]
    note = f"{where()}, float32; {REQUESTS} requests of all skills, the processor's work included."
    return [table(head, rows), note, *loads]


if __name__ == "__main__":
    report(__file__, __doc__, main)
