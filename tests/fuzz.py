"""
Breaks real files of every container, blindly and along their structure, and gives them to fetch_audio as a server does:
each must be decoded or refused, in little time and memory. Any other end (an exception of another type, a decoder that
crashes, a sample that is not a number) is an error of the run.

    python tests/fuzz.py 20000 --seed 7 --save last.bin
"""

import argparse
import collections
import faulthandler
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from sounds import ENCODINGS, RECORDINGS, encode

import audio_decoding
from audio_utils import AudioError, fetch_audio


EXTREMES = (0, 1, 2, 2**7, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
ATOMS = (
    b"moov",
    b"trak",
    b"mdia",
    b"minf",
    b"stbl",
    b"moof",
    b"traf",
    b"edts",
    b"udta",
    b"mvex",
)  # of mp4, that hold atoms
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


def find_parts(content: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """The places of sizes and contents of the parts that a container is made of."""
    end = len(content) if end is None else end
    if content[:4] in (b"RIFF", b"FORM"):
        order = "little" if content[:4] == b"RIFF" else "big"
        place = 12
        while place + 8 <= end:
            size = int.from_bytes(content[place + 4 : place + 8], order)
            yield place + 4, min(end, place + 8 + size)
            place += 8 + size + size % 2
    elif content[:4] == b"OggS":
        yield from ((match.start() + 4, match.start() + 60) for match in re.finditer(b"OggS", content))
    elif content[:4] == b"fLaC":
        place = 4
        while place + 4 <= end:
            size = int.from_bytes(content[place + 1 : place + 4], "big")
            yield place, place + 4 + size
            if content[place] & 0x80:
                return
            place += 4 + size
    elif content[4:8] == b"ftyp":
        place = start
        while place + 8 <= end:
            size = int.from_bytes(content[place : place + 4], "big")
            if size < 8:
                return
            yield place, min(end, place + size)
            if content[place + 4 : place + 8] in ATOMS:
                yield from find_parts(content, place + 8, min(end, place + size))
            place += size
    elif content[:4] == b"\x1a\x45\xdf\xa3":
        place = start
        while place + 2 <= end and content[place]:
            width = 9 - content[place].bit_length()  # of the id; the size follows
            name, at = int.from_bytes(content[place : place + width], "big"), place + width
            if at >= end or not content[at]:
                return
            size_width = 9 - content[at].bit_length()
            size = int.from_bytes(content[at : at + size_width], "big") & (1 << 7 * size_width) - 1
            yield at, min(end, at + size_width + size)
            if name in ELEMENTS:
                yield from find_parts(content, at + size_width, min(end, at + size_width + size))
            place = at + size_width + size


def repair_pages(content: bytearray) -> bytes:
    """An ogg file with the checksum of every page as its bytes now demand (https://datatracker.ietf.org/doc/rfc3533)."""
    starts = [match.start() for match in re.finditer(b"OggS", content)]
    for start, end in zip(starts, [*starts[1:], len(content)], strict=True):
        content[start + 22 : start + 26] = bytes(4)
        checksum = 0
        for byte in content[start:end]:
            checksum = (checksum << 8 & 0xFFFFFFFF) ^ CHECKSUM_TABLE[checksum >> 24 ^ byte]
        content[start + 22 : start + 26] = checksum.to_bytes(4, "little")
    return bytes(content)


def make_checksum_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1 ^ 0x04C11DB7) & 0xFFFFFFFF if value & 2**31 else value << 1
        table.append(value)
    return table


CHECKSUM_TABLE = make_checksum_table()


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
