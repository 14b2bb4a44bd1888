"""
python tests/fuzz.py 20000 --seed 7 --save last.bin

Breaks real files of every container, blindly and along their structure, and gives them to fetch_audio as a server does:
each must be decoded or refused, in little time and memory. Any other end (an exception of another type, a decoder that
crashes, a sample that is not a number) is an error of the run.
"""

import argparse
import collections
import faulthandler
import functools
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from sounds import ENCODINGS, RECORDINGS, encode

import audio_decoding
from audio_utils import AudioError, fetch_audio


EXTREMES = (0, 1, 2, 2**7, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
ATOMS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"edts", b"udta")  # of mp4, that hold atoms
ELEMENTS = (0x18538067, 0x1654AE6B, 0xAE, 0xE1, 0x1F43B675, 0x6D80)  # of matroska, that hold elements


def mutate(generator: random.Random, originals: list[bytes]) -> bytes:
    """Bytes flipped, cut, dropped, spliced or set anywhere."""
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


def mutate_structure(generator: random.Random, originals: list[bytes]) -> bytes:
    """A field of a chunk, page, atom, element, block or tag changed, with the checksums that it needs to be read."""
    content = bytearray(generator.choice(originals))
    parts = list(find_parts(bytes(content)))
    if not parts or generator.random() < 0.1:
        return id3(generator) + bytes(content)
    for _ in range(generator.choice([1, 1, 2, 5])):
        start, end = generator.choice(parts)
        place = generator.randrange(start, min(end, start + 64)) if start < end else start
        width = generator.choice([1, 2, 3, 4, 8])
        value = generator.choice([*EXTREMES, generator.randrange(2**32)]) % 2 ** (8 * width)
        content[place : place + width] = value.to_bytes(width, generator.choice(["big", "little"]))
    return repair_pages(content) if content[:4] == b"OggS" else bytes(content)


def find_parts(content: bytes) -> Iterator[tuple[int, int]]:
    """The places of sizes and contents of the parts that a container is made of."""
    if content[:4] in (b"RIFF", b"FORM"):
        place, order = 12, "little" if content[:4] == b"RIFF" else "big"
        while place + 8 <= len(content):
            size = int.from_bytes(content[place + 4 : place + 8], order)
            yield place + 4, min(len(content), place + 8 + size)
            place += 8 + size + size % 2
    elif content[:4] == b"OggS":
        yield from ((match.start() + 4, match.start() + 60) for match in re.finditer(b"OggS", content))
    elif content[:4] == b"fLaC":
        place, is_last = 4, False
        while place + 4 <= len(content) and not is_last:
            is_last = bool(content[place] & 0x80)
            size = int.from_bytes(content[place + 1 : place + 4], "big")
            yield place, place + 4 + size
            place += 4 + size
    elif content[4:8] == b"ftyp":
        yield from find_nested(content, read_atom, 0, len(content))
    elif content[:4] == b"\x1a\x45\xdf\xa3":
        yield from find_nested(content, read_element, 0, len(content))


def find_nested(content: bytes, read_head: Callable, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts between two places, and the parts in them. `read_head` gives the places of a size and a content."""
    while start + 2 <= end and (head := read_head(content, start)):
        place, inner, size, holds_parts = head
        yield place, min(end, inner + size)
        if holds_parts:
            yield from find_nested(content, read_head, inner, min(end, inner + size))
        start = inner + size


def read_atom(content: bytes, start: int) -> tuple[int, int, int, bool] | None:
    size, name = int.from_bytes(content[start : start + 4], "big"), content[start + 4 : start + 8]
    return (start, start + 8, size - 8, name in ATOMS) if size >= 8 else None


def read_element(content: bytes, start: int) -> tuple[int, int, int, bool] | None:
    place = start + 9 - content[start].bit_length()  # after the id
    if not content[start] or place >= len(content) or not content[place]:
        return None
    inner = place + 9 - content[place].bit_length()
    size = int.from_bytes(content[place:inner], "big") & (1 << 7 * (inner - place)) - 1
    return place, inner, size, int.from_bytes(content[start:place], "big") in ELEMENTS


def repair_pages(content: bytearray) -> bytes:
    """An ogg file with the checksum of every page as its bytes now demand (https://datatracker.ietf.org/doc/rfc3533)."""
    starts = [match.start() for match in re.finditer(b"OggS", content)]
    for start, end in zip(starts, [*starts[1:], len(content)], strict=True):
        content[start + 22 : start + 26] = bytes(4)
        checksum = 0
        for byte in content[start:end]:
            checksum = (checksum << 8 & 0xFFFFFFFF) ^ checksum_of(checksum >> 24 ^ byte)
        content[start + 22 : start + 26] = checksum.to_bytes(4, "little")
    return bytes(content)


@functools.cache
def checksum_of(byte: int) -> int:
    value = byte << 24
    for _ in range(8):
        value = (value << 1 ^ 0x04C11DB7) & 0xFFFFFFFF if value & 2**31 else value << 1
    return value


def id3(generator: random.Random) -> bytes:
    """A tag of some frames, one of whose sizes lies."""
    body = b""
    for _ in range(generator.choice([1, 20, 2000])):
        name = generator.choice([b"TXXX", b"APIC", b"COMM", b"GEOB", b"CHAP", b"PRIV"])
        field = generator.randbytes(generator.randrange(40))
        size = generator.choice(EXTREMES) if generator.random() < 0.01 else len(field)
        body += name + size.to_bytes(4, "big") + bytes(2) + field
    size = len(body) if generator.random() < 0.8 else generator.randrange(2**28)
    version = generator.choice([2, 3, 4])
    return b"ID3" + bytes([version, 0, 0]) + bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0)) + body


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
    short = [content for content in originals if len(content) < 2**18]  # whose checksums are soon computed
    generator, outcomes, slowest = random.Random(arguments.seed), collections.Counter(), 0.0
    pool = audio_decoding.WorkerPool(1, audio_decoding.WORKER_SECONDS)
    (worker,), audio_decoding.POOLS = pool.free, (pool,)
    fetch_audio(originals[0], public_only=True)
    before, largest = resident(worker), 0.0
    for _ in range(arguments.mutations):
        is_blind = generator.random() < 0.5
        content = mutate(generator, originals) if is_blind else mutate_structure(generator, short)
        if arguments.save:
            arguments.save.write_bytes(content)
        start, process = time.monotonic(), worker.process.pid
        try:
            samples = fetch_audio(content, max_seconds=60, public_only=True)
            assert samples.ndim == 1 and float(samples.abs().max()) <= 1.0
            outcomes["decoded"] += 1
        except AudioError as error:
            if "process that decodes it ended" in str(error):
                raise SystemExit("The decoder crashed.") from error
            outcomes["refused"] += 1
        slowest = max(slowest, time.monotonic() - start)
        if worker.process.poll() is None and worker.process.pid == process:
            largest = max(largest, resident(worker) - before)
    print(
        f"files={len(originals)} decoded={outcomes['decoded']} refused={outcomes['refused']} "
        f"seconds={slowest:.2f} megabytes={largest:.0f}"
    )


def resident(worker: audio_decoding.DecodingWorker) -> float:
    """The most MB that a worker held so far."""
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


if __name__ == "__main__":
    main()
