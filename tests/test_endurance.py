"""make test-endurance: three thousand requests of all kinds in one process, from eight threads at once."""

import ctypes
import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import audio, text, video
from PIL import Image
from serving import BAD, ask, openai_form, short_form, user

from demo.ask import EXAMPLES
from handler import EndpointHandler


pytestmark = pytest.mark.endurance
REQUESTS, ROUND, THREADS, SETTINGS = 3_000, 125, 8, {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def handler(demo_repo):
    handler = EndpointHandler(str(demo_repo))
    assert handler.model.dtype == torch.bfloat16  # what ships, and where oneDNN caches kernels by shape
    return handler


def resident() -> float:
    """
    Memory of this process in MB while no request runs. Freed pages are given back first: how many of them the C library
    keeps depends on which requests ran at the same time.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def send(handler, body: dict) -> str:
    """Returns an answer, or the words of an error."""
    try:
        return handler(body)["text"]
    except ValueError as error:
        return f"refused: {error}"


def watch(handler, frames: np.ndarray, clip: str) -> list[str]:
    """Asks about a video, which the handler does not serve, so the same model is asked beside it."""
    messages = user(video(frames), audio(str(EXAMPLES / clip)), text("What is in the photo?"))
    return handler.processor.answer(handler.model, [messages], **SETTINGS)


def ask_at_any_length(handler):
    """Its answer is not compared, as in bfloat16 it may depend on the batch."""
    send(handler, ask({"text": "how many are there " * random.randrange(1, 250)}, **SETTINGS))


def make_jobs(handler, examples) -> list[list]:
    """Calls without arguments, by kind."""
    clips = [name for example in examples for name in example["audio"]]
    pictures = [Image.open(EXAMPLES / example["image"]) for example in examples if example["image"]]
    frames = np.stack([np.roll(np.asarray(pictures[0].convert("RGB")), shift, axis=1) for shift in range(4)])
    kinds = (
        map(short_form, examples),
        map(openai_form, examples),
        [(EXAMPLES / name).read_bytes() for name in clips],
        pictures,
        ["What is in the photo?"],
    )
    bodies = [[ask(inputs, **SETTINGS) for inputs in kind] for kind in kinds]
    bodies.append([body for name, (body, _) in BAD.items() if name != "a bomb of a picture"])
    jobs = [[partial(send, handler, body) for body in kind] for kind in bodies]
    return [*jobs, [partial(watch, handler, frames, name) for name in clips[:4]], [partial(ask_at_any_length, handler)]]


def state(model) -> dict:
    """What a call could leave behind: attributes of all modules, and how many tensors live."""
    gc.collect()
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    live = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    return {"attributes": attributes, "tensors": live, "threads": threading.active_count()}


def test_three_thousand_requests(handler, examples):
    kinds = make_jobs(handler, examples)
    with ThreadPoolExecutor(THREADS) as pool:  # all processes and threads that decode have started then
        list(pool.map(lambda job: job(), (kinds[2] + kinds[3]) * 4))
    fresh = {job: job() for jobs in kinds for job in jobs}
    assert [fresh[job] for job in kinds[0]] == [example["answer"] for example in examples]
    assert all(fresh[job].startswith("refused: ") for job in kinds[5])
    rng = random.Random(0)
    jobs = [rng.choice(rng.choice(kinds)) for _ in range(REQUESTS)]
    wrong, memory, warm = [], [], resident()
    before, files = state(handler.model), len(list(Path("/proc/self/fd").iterdir()))
    for start in range(0, REQUESTS, ROUND):
        batch = jobs[start : start + ROUND]
        with ThreadPoolExecutor(THREADS) as pool:
            answers = pool.map(lambda job: job(), batch)
            wrong += [(fresh[job], answer) for job, answer in zip(batch, answers, strict=True) if answer != fresh[job]]
        memory.append(resident())
    assert not wrong
    assert state(handler.model) == before and not handler.waiting
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    quarter = len(memory) // 4
    early, late = max(memory[quarter : 2 * quarter]), max(memory[-quarter:])
    print(f"{REQUESTS} requests: {warm:.0f} MB before, {early:.0f} in the second quarter, {late:.0f} in the last")
    # Kernels of oneDNN fill their cache in the first half (with the default capacity, 400 MB and more).
    assert late < warm + 350 and late < 1.08 * early, memory
