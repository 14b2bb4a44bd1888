"""
The ways to serve, side by side on this machine with the demo checkpoint: `generate` in a loop, `handler.py` behind
HTTP, and vLLM if `make test-vllm` has installed it; each with fixed and with trimmed audio tokens. Then `handler.py`
under load: many clients at once, and short requests beside long ones.

    python -m benchmarks.serving [--readme]
"""

import base64
import io
import itertools
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from PIL import Image

import upload
from benchmarks.measure import Clock, where
from benchmarks.report import report
from configuration_qwen2_audio_vl import AUDIO_TOKEN_COUNTS
from demo.ask import DEMO, load, read_examples
from handler import EndpointHandler
from tests.serving import VLLM, make_endpoint, openai_form, serve, serve_vllm, short_form


REQUESTS, CLIENTS, STEPS = 96, 16, 12
LONG_CLIENTS = 8


def time_requests(send, examples: list[dict], clients: tuple[int, ...] = (1, CLIENTS)) -> tuple[list[float], float]:
    """
    Args:
        send: Answers an example; returns the answer and the seconds to its first token.
        clients: How many ask at once, each number for itself.

    Returns:
        Requests per second for each number of clients, and the median of milliseconds to the first token at the first.
    """
    crowd = list(itertools.islice(itertools.cycle(examples), REQUESTS))
    for example in examples[:5]:
        send(example)
    rates, firsts = [], []
    for number in clients:
        begin = time.perf_counter()
        with ThreadPoolExecutor(number) as pool:
            answers = list(pool.map(send, crowd))
        rates.append(REQUESTS / (time.perf_counter() - begin))
        firsts.append(statistics.median(first for _, first in answers) * 1e3)
        wrong = [e for e, (text, _) in zip(crowd, answers, strict=True) if text != e["answer"]]
        if wrong:
            raise ValueError(f"{len(wrong)} answers are wrong, the first to {wrong[0]}")
    return rates, firsts[0]


def by_generate(processor, model):
    def send(example):
        begin, clock = time.perf_counter(), Clock()
        inputs = processor.make_inputs(openai_form(example))
        output = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, stopping_criteria=[clock])
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text, clock.times[0] - begin

    return send


def by_handler(address: str, client: httpx.Client):
    def send(example):
        begin = time.perf_counter()
        body = {"inputs": short_form(example), "parameters": {"max_new_tokens": STEPS}}
        text = client.post(address, json=body).json()["text"]
        return text, time.perf_counter() - begin

    return send


def by_vllm(address: str, client: httpx.Client):
    def send(example):
        begin, first, text = time.perf_counter(), None, ""
        body = {
            "model": "demo",
            "messages": openai_form(example),
            "temperature": 0,
            "max_tokens": STEPS,
            "stream": True,
        }
        with client.stream("POST", f"{address}/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    piece = json.loads(line[6:])["choices"][0]["delta"].get("content")
                    if piece:
                        first = first or time.perf_counter() - begin
                        text += piece
        return text, first

    return send


def measure_folder(repo: Path, folder: Path, client: httpx.Client) -> dict[str, list[str]]:
    """For each way to serve: requests per second of one client and of many, and the time to the first token."""
    examples, results = read_examples(), {}
    processor, model = load(repo)
    (one,), first = time_requests(by_generate(processor, model.float()), examples, clients=(1,))
    results["`generate` in a loop"] = [f"{one:.1f}", "", f"{first:.0f} ms"]
    handler = EndpointHandler(str(repo))
    handler.model.float()
    with serve(make_endpoint(handler)) as address:
        (one, many), first = time_requests(by_handler(address, client), examples)
    results["`handler.py` behind HTTP, the whole answer"] = [f"{one:.1f}", f"{many:.1f}", f"{first:.0f} ms"]
    if VLLM.exists():
        with serve_vllm(repo, folder, VLLM_CPU_NUM_OF_RESERVED_CPU="0") as address:
            (one, many), first = time_requests(by_vllm(address, client), examples)
        results["`vllm serve`"] = [f"{one:.1f}", f"{many:.1f}", f"{first:.0f} ms"]
    return results


def time_load(address: str, client: httpx.Client, bodies: list[dict], clients: int) -> tuple[list[float], float, int]:
    """Returns the seconds of each request, sorted, the requests per second, and how many were refused."""

    def send(body):
        begin = time.perf_counter()
        answer = client.post(address, json=body).json()
        return time.perf_counter() - begin, "text" not in answer

    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        seconds, refused = zip(*pool.map(send, bodies), strict=True)
    return sorted(seconds), len(bodies) / (time.perf_counter() - begin), sum(refused)


def measure_load(repo: Path, client: httpx.Client) -> list[str]:
    """The lines of a table: what requests to one process take while others ask as well."""
    rows = ["| | requests per second | median | slowest | refused |", "|---|---|---|---|---|"]
    handler, examples = EndpointHandler(str(repo)), read_examples()
    handler.model.float()
    crowd = [{"inputs": short_form(example), "parameters": {"max_new_tokens": STEPS}} for example in examples]
    picture = io.BytesIO()
    Image.new("RGB", (100, 100)).save(picture, "PNG")  # the answer to which does not end by itself
    endless = {"image": base64.b64encode(picture.getvalue()).decode()}
    long = {"inputs": endless, "parameters": {"max_new_tokens": 1024}}
    short = {"inputs": {"text": "Hi."}, "parameters": {"max_new_tokens": 1, "repetition_penalty": 1.1}}
    with serve(make_endpoint(handler)) as address:

        def add(name: str, bodies: list[dict], clients: int):
            seconds, rate, refused = time_load(address, client, bodies, clients)
            median = statistics.median(seconds)
            rows.append(f"| {name} | {rate:.1f} | {median:.2f} s | {seconds[-1]:.2f} s | {refused} |")

        for clients in (1, 8, 64):
            bodies = list(itertools.islice(itertools.cycle(crowd), max(REQUESTS, 4 * clients)))
            add(f"{clients} client{'s' * (clients > 1)}", bodies, clients)
        add("one token, one client", [short] * REQUESTS, 1)
        with ThreadPoolExecutor(LONG_CLIENTS) as pool:
            others = [pool.submit(client.post, address, json=long) for _ in range(LONG_CLIENTS)]
            time.sleep(1)
            add(f"the same beside {LONG_CLIENTS} of 1,024 tokens and other parameters", [short] * REQUESTS, 1)
            if any(other.done() for other in others):
                raise ValueError("The long requests ended before the short ones.")
    return rows


def measure(_) -> str:
    results, load = [], []
    for kind in AUDIO_TOKEN_COUNTS:
        with tempfile.TemporaryDirectory() as folder, httpx.Client(timeout=300) as client:
            repo = upload.build(checkpoint=DEMO, output=Path(folder) / "demo", audio_tokens=kind)
            results.append(measure_folder(repo, Path(folder), client))
            load = load or measure_load(repo, client)
    columns = ("requests per second, one client", "sixteen clients", "first token, one client")
    rows = ["| | " + " | ".join(f"{column}, fixed | trimmed" for column in columns) + " |", "|---" * 7 + "|"]
    for name in results[0]:
        cells = (cell for pair in zip(*(result[name] for result in results), strict=True) for cell in pair)
        rows.append(f"| {name} | {' | '.join(cells)} |")
    rows.append(f"\n{where()}, float32; {REQUESTS} requests of all skills, the processor's work included.")
    rows += ["\n`handler.py` under load, with fixed audio tokens:\n", *load]
    return "\n".join(rows)


if __name__ == "__main__":
    report(__file__, __doc__, measure)
