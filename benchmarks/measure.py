"""What the benchmarks share: times, in turns and of tokens, peak memory, and the line that says where it was."""

import ctypes
import gc
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import StoppingCriteria


MMAP_THRESHOLD = -3  # of glibc's malloc.h


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


def in_turns(*functions: Callable, seconds: float = 2.0) -> list[float]:
    """The median time of each function in seconds; they take turns of at least a call and 20 ms each."""
    times, end = [[] for _ in functions], time.perf_counter() + seconds
    for function in functions:
        function()
    while time.perf_counter() < end or len(times[0]) < 5:
        for function, own in zip(functions, times, strict=True):
            synchronize()
            turn = start = time.perf_counter()
            while start - turn < 0.02:
                function()
                synchronize()
                own.append(time.perf_counter() - start)
                start += own[-1]
    return [statistics.median(own) for own in times]


def peak_memory(function: Callable) -> int:
    """The most bytes held at once during a call: allocated on the GPU, or resident in this process (Linux, glibc)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 2**16)  # so that what is freed is given back at once
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    function()
    libc.mallopt(MMAP_THRESHOLD, 2**25)  # to where glibc's own adjustment ends, which a first call switches off
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def where() -> str:
    """Date, machine and versions."""
    device = f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
    if torch.cuda.is_available():
        device += f", {torch.cuda.get_device_name()}"
    return f"{date.today()}, {device}, torch {torch.__version__}, transformers {transformers.__version__}"
