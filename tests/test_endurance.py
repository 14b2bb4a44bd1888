"""Three thousand requests of all kinds in one process, from eight threads at once (`make test-endurance`)."""

import ctypes
import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import audio, text, video
from PIL import Image
from serving import openai_form, short_form
from test_serving import BAD

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


def make_jobs(handler, examples) -> list:
    """Calls without arguments, by kind: each returns an answer, or the words of an error."""

    def served(inputs):
        return lambda: handler({"inputs": inputs, "parameters": SETTINGS})["text"]

    def refused(body):
        def call():
            with pytest.raises(ValueError) as caught:
                handler(body)
            return str(caught.value)

        return call

    def watched(frames, clip):
        """Video is not the handler's, so this asks the same model beside it."""

        def call():
            content = [video(frames), audio(str(EXAMPLES / clip)), text("What is in the photo?")]
            inputs = handler.processor.make_inputs([{"role": "user", "content": content}])
            return handler.model.generate(**inputs, **SETTINGS, do_sample=False).tolist()

        return call

    def of_any_length():
        """A prompt of some length. Its answer is not compared, as in bfloat16 it may depend on the batch."""
        served({"text": "how many are there " * random.randrange(1, 250)})()

    clips = [name for example in examples for name in example["audio"]]
    pictures = [example["image"] for example in examples if example["image"]]
    picture = np.asarray(Image.open(EXAMPLES / pictures[0]).convert("RGB"))
    frames = np.stack([np.roll(picture, shift, axis=1) for shift in range(4)])
    return [
        [served(short_form(example)) for example in examples],
        [served(openai_form(example)) for example in examples],
        [served((EXAMPLES / name).read_bytes()) for name in clips],
        [served(Image.open(EXAMPLES / name)) for name in pictures],
        [served({"text": "What is in the photo?"})],
        [refused(body) for name, (body, _) in BAD.items() if name != "a bomb of a picture"],
        [watched(frames, name) for name in clips[:4]],
        [of_any_length],
    ]


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
    for example, job in zip(examples, kinds[0], strict=True):
        assert fresh[job] == example["answer"]
    rng = random.Random(0)
    jobs = [rng.choice(rng.choice(kinds)) for _ in range(REQUESTS)]
    wrong, memory, warm = [], [], resident()
    before, files = state(handler.model), len(list(Path("/proc/self/fd").iterdir()))
    for start in range(0, REQUESTS, ROUND):
        taken = jobs[start : start + ROUND]
        with ThreadPoolExecutor(THREADS) as pool:
            answers = pool.map(lambda job: job(), taken)
            wrong += [(fresh[job], given) for job, given in zip(taken, answers, strict=True) if given != fresh[job]]
        memory.append(resident())
    assert not wrong
    assert state(handler.model) == before and not handler.waiting
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    quarter = len(memory) // 4
    early, late = max(memory[quarter : 2 * quarter]), max(memory[-quarter:])
    print(f"{REQUESTS} requests: {warm:.0f} MB before, {early:.0f} in the second quarter, {late:.0f} in the last")
    # Kernels of oneDNN fill their cache in the first half (with the default capacity, 400 MB and more).
    assert late < warm + 350 and late < 1.08 * early, memory
