"""
python tests/fuzz.py 20000 --seed 7 --save last.bin

Breaks real files of every container, blindly and along their structure, and gives them to fetch_audio as a server does:
each must be decoded or refused, in little time and memory. Any other end (an exception of another type, a decoder that
crashes, a sample that is not a number) is an error of the run.
"""

import argparse
import collections
import faulthandler
import random
import re
import sys
import time
import zlib
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bombs import id3
from sounds import ENCODINGS, RECORDINGS, encode

import audio_decoding
from audio_utils import AudioError, fetch_audio


EXTREMES = (0, 1, 2, 2**7, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
# The names of the parts of wav, avi, aiff and caf; of ogg and flac; of mp4; of matroska; and of mp3.
PARTS = re.compile(
    rb"RIFF|LIST|fmt |fact|avih|strh|strf|movi|idx1|FORM|COMM|SSND|caff|desc|pakt|data"
    rb"|OggS|OpusHead|OpusTags|fLaC"
    rb"|ftyp|moov|mvhd|trak|tkhd|mdia|mdhd|minf|stbl|stsd|stsc|stsz|stco|stts|esds|edts|elst|udta|mdat|moof|traf"
    rb"|\x1a\x45\xdf\xa3|\x18\x53\x80\x67|\x15\x49\xa9\x66|\x16\x54\xae\x6b|\x1f\x43\xb6\x75|\x1c\x53\xbb\x6b"
    rb"|\xa3(?:[\x80-\xff]|[\x40-\x7f].)\x81|ID3|Xing|Info|LAME",
    re.DOTALL,
)
MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # each byte with its bits in the other order


def mutate(generator: random.Random, originals: list[bytes]) -> bytes:
    """Bytes flipped, cut, dropped, spliced or set anywhere."""
    content = bytearray(generator.choice(originals))
    place = generator.randrange(len(content))
    change = generator.choice(["flip", "header", "cut", "drop", "splice", "random", "number"])
    if change in ("flip", "header"):
        end = min(len(content), 300) if change == "header" else len(content)
        for _ in range(generator.choice([1, 5, 50])):
            content[generator.randrange(end)] ^= 1 << generator.randrange(8)
    elif change == "cut":
        del content[place:]
    elif change == "drop":
        del content[place : place + generator.randrange(1, 5000)]
    elif change == "splice":
        other = generator.choice(originals)
        content[place:] = other[generator.randrange(len(other)) :]
    elif change == "random":
        content[place : place + 64] = generator.randbytes(64)
    else:  # a size, rate or count at its extremes
        place = generator.randrange(400)
        content[place : place + 4] = generator.choice(EXTREMES).to_bytes(4, "little")
    return bytes(content)


def mutate_structure(generator: random.Random, originals: list[bytes]) -> bytes:
    """A field near the name of a part changed, with the checksums that it needs to be read; or a tag before all."""
    content = bytearray(generator.choice(originals))
    places = [match.start() for match in PARTS.finditer(content)]
    if not places or generator.random() < 0.1:
        return make_tag(generator) + bytes(content)
    for _ in range(generator.choice([1, 1, 2, 5])):
        place = max(0, generator.choice(places) + generator.randrange(-4, 64))
        width = generator.choice([1, 2, 3, 4, 8])
        value = generator.choice([*EXTREMES, generator.randrange(2**32)]) % 2 ** (8 * width)
        content[place : place + width] = value.to_bytes(width, generator.choice(["big", "little"]))
    return repair_pages(content) if content[:4] == b"OggS" else bytes(content)


def repair_pages(content: bytearray) -> bytes:
    """An ogg file with the checksum of every page as its bytes now demand (https://datatracker.ietf.org/doc/rfc3533)."""
    starts = [match.start() for match in re.finditer(b"OggS", content)]
    for start, end in zip(starts, [*starts[1:], len(content)], strict=True):
        content[start + 22 : start + 26] = bytes(4)
        # It is zlib's without its inversions, and with the bits in the other order.
        checksum = ~zlib.crc32(content[start:end].translate(MIRRORED), 2**32 - 1) & (2**32 - 1)
        content[start + 22 : start + 26] = checksum.to_bytes(4, "big").translate(MIRRORED)
    return bytes(content)


def make_tag(generator: random.Random) -> bytes:
    """An ID3 tag of some frames, where some of the bytes may lie, also those of its sizes."""
    names = [b"TXXX", b"APIC", b"COMM", b"GEOB", b"CHAP", b"PRIV"]
    count = generator.choice([1, 20, 2000])
    frames = [(generator.choice(names), generator.randbytes(generator.randrange(40))) for _ in range(count)]
    tag = bytearray(id3(frames))
    tag[3] = generator.choice([2, 3, 4])  # the version
    for _ in range(generator.choice([0, 1, 20])):
        tag[generator.randrange(6, min(len(tag), generator.choice([40, 10**6])))] = generator.randrange(256)
    return bytes(tag)


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
    before, largest = peak_memory(worker.process.pid), 0.0
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
            largest = max(largest, peak_memory(process) - before)
    print(
        f"files={len(originals)} decoded={outcomes['decoded']} refused={outcomes['refused']} "
        f"seconds={slowest:.2f} megabytes={largest:.0f}"
    )


def peak_memory(pid: int | str = "self") -> float:
    """The most MB that a process held so far. What `resource` says of a child may be the peak of its parent."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


if __name__ == "__main__":
    main()
