"""
Breaks real files of every container and gives them to fetch_audio: each must be decoded or refused, in little time
and memory. Any other end (an exception of another type, a crash of the interpreter, a sample that is not a number) is
an error of the run.

    python tests/fuzz.py 20000 --seed 7 --save last.bin
"""

import argparse
import collections
import faulthandler
import random
import resource
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from sounds import ENCODINGS, RECORDINGS, encode

from audio_utils import AudioError, fetch_audio


def mutate(generator: random.Random, originals: list[bytes]) -> bytes:
    content = bytearray(generator.choice(originals))
    place = generator.randrange(len(content))
    kind = generator.choice(["flip", "header", "cut", "drop", "splice", "random", "number"])
    if kind in ("flip", "header"):
        for _ in range(generator.choice([1, 5, 50])):
            content[generator.randrange(300 if kind == "header" else len(content))] ^= 1 << generator.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "drop":
        del content[place : place + generator.randrange(1, 5000)]
    elif kind == "splice":
        other = generator.choice(originals)
        content[place:] = other[generator.randrange(len(other)) :]
    elif kind == "random":
        content[place : place + 64] = generator.randbytes(64)
    else:  # a size, rate or count at its extremes
        place = generator.randrange(400)
        content[place : place + 4] = generator.choice([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1]).to_bytes(4, "little")
    return bytes(content)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mutations", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="where each mutation is written before it is tried")
    arguments = parser.parse_args()

    faulthandler.enable()
    torch.set_num_threads(1)
    clip = fetch_audio(RECORDINGS / "jfk.wav")[:16_000].numpy()
    originals = [path.read_bytes() for path in sorted(RECORDINGS.iterdir())]
    originals += [encode(clip, name) for name in ENCODINGS] + [encode(clip, "aac.m4a", video=True)]
    generator, outcomes, slowest = random.Random(arguments.seed), collections.Counter(), 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(arguments.mutations):
        content = mutate(generator, originals)
        if arguments.save:
            arguments.save.write_bytes(content)
        start = time.monotonic()
        try:
            samples = fetch_audio(content, max_seconds=60)
            assert samples.ndim == 1 and float(samples.abs().max()) <= 1.0
            outcomes["decoded"] += 1
        except AudioError:
            outcomes["refused"] += 1
        slowest = max(slowest, time.monotonic() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"files={len(originals)} decoded={outcomes['decoded']} refused={outcomes['refused']} "
        f"seconds={slowest:.2f} megabytes={grown:.0f}"
    )


if __name__ == "__main__":
    main()
