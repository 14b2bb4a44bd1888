"""What the benchmarks share: timing, memory, and a line with date, machine and versions."""

import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import StoppingCriteria


def synchronize():
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class Clock(StoppingCriteria):
    """Notes in `times` when each token of an answer was there, for `generate(stopping_criteria=[clock])`."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def steps(self) -> list[float]:
        """Seconds between the tokens."""
        return [after - before for before, after in itertools.pairwise(self.times)]


def in_turns(*functions: Callable, seconds: float = 2.0, rounds: int = 5, take: Callable = statistics.median) -> list:
    """
    Times functions in turns. A round runs each one for at least 20 ms and notes its mean seconds; there are at least
    `rounds` rounds, and more until `seconds` have passed. Returns the median of each, or `take` of its rounds.
    """
    times, end = [[] for _ in functions], time.perf_counter() + seconds
    for function in functions:
        function()
    while time.perf_counter() < end or len(times[0]) < rounds:
        for function, own in zip(functions, times, strict=True):
            synchronize()
            start, calls, spent = time.perf_counter(), 0, 0.0
            while spent < 0.02:
                function()
                synchronize()
                calls += 1
                spent = time.perf_counter() - start
            own.append(spent / calls)
    return [take(own) for own in times]


def decode_step(generate: Callable, inputs: dict, tokens: int, **settings) -> float:
    """Seconds of a decode step, the median of a greedy answer of so many tokens."""
    clock, length = Clock(), {"max_new_tokens": tokens, "min_new_tokens": tokens}
    generate(**inputs, **settings, **length, do_sample=False, stopping_criteria=[clock])
    return statistics.median(clock.steps)


def added_memory(function: Callable) -> int:
    """Peak bytes that a second call allocates, above what was allocated before it."""
    function()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(itertools.accumulate(changes, initial=0))


def where() -> str:
    """Date, machine and versions."""
    device = f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
    if torch.cuda.is_available():
        device += f", {torch.cuda.get_device_name()}"
    return f"{date.today()}, {device}, torch {torch.__version__}, transformers {transformers.__version__}"
