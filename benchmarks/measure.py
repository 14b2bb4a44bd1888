"""How the benchmarks measure time, memory and operations, and the line that names date, machine and versions."""

import itertools
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import StoppingCriteria


def synchronize():
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class Clock(StoppingCriteria):
    """Notes the time of each token of an answer in `times`, for `generate(stopping_criteria=[clock])`."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def in_turns(*functions: Callable, seconds: float = 2.0, rounds: int = 5, take: Callable = statistics.median) -> list:
    """
    Times functions in turns. A round runs each function for at least 20 ms and notes its mean seconds; there are at
    least `rounds` rounds, and more until `seconds` have passed. Returns `take` of the rounds of each function.
    """
    times, end = [[] for _ in functions], time.perf_counter() + seconds
    for function in functions:
        function()
    while time.perf_counter() < end or len(times[0]) < rounds:
        for function, means in zip(functions, times, strict=True):
            synchronize()
            start, calls, spent = time.perf_counter(), 0, 0.0
            while spent < 0.02:
                function()
                synchronize()
                calls += 1
                spent = time.perf_counter() - start
            means.append(spent / calls)
    return [take(means) for means in times]


def decode_step(generate: Callable, inputs: dict, tokens: int, **settings) -> float:
    """Returns the median seconds of a decode step in a greedy answer of `tokens` tokens."""
    clock, length = Clock(), {"max_new_tokens": tokens, "min_new_tokens": tokens}
    generate(**inputs, **settings, **length, do_sample=False, stopping_criteria=[clock])
    return statistics.median(after - before for before, after in itertools.pairwise(clock.times))


def count_operations(function: Callable) -> tuple[Any, int]:
    """Returns what the function returns, and the floating point operations of the call."""
    with FlopCounterMode(display=False) as counter:
        result = function()
    return result, counter.get_total_flops()


def added_memory(function: Callable) -> int:
    """Returns the peak bytes that a second call allocates, above what was allocated before it."""
    function()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


def where() -> str:
    """Returns the date, the machine and the versions."""
    device = f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
    if torch.cuda.is_available():
        device += f", {torch.cuda.get_device_name()}"
    return f"{date.today()}, {device}, torch {torch.__version__}, transformers {transformers.__version__}"
