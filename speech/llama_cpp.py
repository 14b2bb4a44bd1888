"""
Measures the speech model in llama.cpp (files of each type) and in PyTorch with the same fixed tokens: seconds to the
first token, tokens a second, memory, and how many answers to telephone prompts are the same.

    python -m speech.llama_cpp [--prompts N] [--readme]

It needs `make speech` and, for llama.cpp, what `make test-gguf` installs. Each row is a process of its own.
"""

import base64
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai
import torch

from benchmarks.measure import Clock, where
from benchmarks.report import report, table
from configuration_qwen2_audio_vl import TRANSCRIBE
from demo.ask import user
from evaluation.generate import load
from publishing.gguf import KINDS, export
from publishing.paths import ROOT
from speech.recordings import short_prompts
from speech.run import DTYPE, REPO
from tests.serving import input_audio, serve_llama_cpp


LONGEST = 48  # tokens of an answer
THREADS = 1, 2
PEAK = r"VmHWM:\s+(\d+) kB"


def choose(count: int) -> list[Path]:
    """Returns telephone prompts of 2 to 8 s."""
    return [Path(row["audio"]) for row in short_prompts()[:count]]


def ask_llama_cpp(kind: str, threads: int, count: int) -> dict:
    """Returns `answers`, medians of `first` (seconds) and `rate` (tokens a second), and `memory` and `size` in MB."""
    with tempfile.TemporaryDirectory() as folder:
        files = export(REPO, folder, kind)
        with serve_llama_cpp(files, Path(folder), threads) as address:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            results = [stream(client, path) for path in choose(count)]
        memory = int(re.search(PEAK, (Path(folder) / "log.txt").read_text())[1]) / 1024
        return summarize(results) | {"memory": memory, "size": sum(path.stat().st_size for path in files) / 1e6}


def stream(client: openai.OpenAI, path: Path) -> tuple[str, list[float]]:
    """Returns the answer, and the seconds from the request to each of its tokens."""
    item = input_audio(base64.b64encode(path.read_bytes()).decode(), path.suffix[1:])
    start, times, answer = time.perf_counter(), [], ""
    for chunk in client.chat.completions.create(
        model="speech",
        messages=user([item, {"type": "text", "text": TRANSCRIBE}]),
        temperature=0,
        max_tokens=LONGEST,
        stream=True,
    ):
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.perf_counter() - start)
            answer += chunk.choices[0].delta.content
    return answer.strip(), times


def ask_torch(threads: int, count: int) -> dict:
    """Runs [`print_torch`] in a process of its own."""
    program = f"from speech.llama_cpp import print_torch; print_torch({threads}, {count})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_torch(threads: int, count: int):
    torch.set_num_threads(threads)
    (processor, model), results = load(REPO, DTYPE), []
    for path in choose(count):
        start, clock = time.perf_counter(), Clock()
        conversation = user([{"type": "audio", "path": str(path)}, {"type": "text", "text": TRANSCRIBE}])
        inputs = processor.make_inputs([conversation], audio_tokens="fixed")
        output = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False, stopping_criteria=[clock])
        answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        results.append((answer.strip(), [moment - start for moment in clock.times]))
    memory = int(re.search(PEAK, Path("/proc/self/status").read_text())[1]) / 1024
    size = (REPO / "model.safetensors").stat().st_size / 1e6
    print(json.dumps(summarize(results) | {"memory": memory, "size": size}))


def summarize(results: list[tuple[str, list[float]]]) -> dict:
    rates = [(len(times) - 1) / (times[-1] - times[0]) for _, times in results if len(times) > 1]
    first = statistics.median(times[0] for _, times in results)
    return {"answers": [answer for answer, _ in results], "first": first, "rate": statistics.median(rates)}


def main(prompts: int = 10) -> list[str]:
    rows = []
    for threads in THREADS:
        reference = ask_torch(threads, prompts)
        results = {f"PyTorch, {DTYPE}": reference}
        results |= {f"llama.cpp, {kind.upper()}": ask_llama_cpp(kind, threads, prompts) for kind in KINDS}
        for name, result in results.items():
            same = sum(map(str.__eq__, result["answers"], reference["answers"]))
            figures = f"{result['first']:.2f} s", f"{result['rate']:.0f}", f"{result['memory']:.0f} MB"
            rows.append([name, threads, *figures, f"{result['size']:.0f} MB", f"{same} of {prompts}"])
    head = ["model", "threads", "to the first token", "tokens a second", "memory", "files", "answers as PyTorch's"]
    return [table(head, rows), f"{where()}."]


if __name__ == "__main__":
    report(__file__, __doc__, main)
