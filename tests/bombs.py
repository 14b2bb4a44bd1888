"""Small files that would cost gigabytes or minutes if their decoder believed them, made here byte by byte."""

import struct
import zlib

import numpy as np
from sounds import encode


def gif(side: int) -> bytes:
    """A picture of `side` x `side` pixels in some 40 bytes."""
    screen = struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6)
    picture = b"\x2c" + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + screen + picture + b"\x3b"


def id3(frames: list[tuple[bytes, bytes]]) -> bytes:
    """An ID3v2.3 tag."""
    body = b"".join(name + struct.pack(">IH", len(content), 0) + content for name, content in frames)
    size = bytes((len(body) >> shift) & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x03\x00\x00" + size + body


def mp3_with_covers(clip: np.ndarray, count: int = 5, side: int = 16_000) -> bytes:
    cover = b"\x00image/gif\x00\x03%d\x00" + gif(side)
    return id3([(b"APIC", cover % number) for number in range(count)]) + encode(clip, "clip.mp3")


def mp3_with_many_tags(clip: np.ndarray, count: int = 100_000) -> bytes:
    return id3([(b"TXXX", b"\x00k%d\x00v" % number) for number in range(count)]) + encode(clip, "clip.mp3")


def flac_with_many_comments(clip: np.ndarray, count: int = 300_000) -> bytes:
    content = encode(clip, "s24.flac")
    comments = [b"k%d=v" % number for number in range(count)]
    body = struct.pack("<I", 0) + struct.pack("<I", count)
    body += b"".join(struct.pack("<I", len(comment)) + comment for comment in comments)
    stream_info = content[4 : 8 + 34]  # the first block, which is followed by the one of the comments
    return b"fLaC" + stream_info + b"\x04" + len(body).to_bytes(3, "big") + body + content[8 + 34 :]


def mp4_with_many_samples(clip: np.ndarray, count: int = 85_000_000) -> bytes:
    """A fragment that claims so many samples, for each of which a demuxer keeps an entry."""
    content = bytearray(encode(clip, "aac.m4a", movflags="empty_moov+default_base_moof"))
    run = content.index(b"trun") + 4
    content[run + 1 : run + 8] = (0).to_bytes(3, "big") + count.to_bytes(4, "big")  # no fields for a sample
    return bytes(content)


def ebml(name: str, *content: bytes) -> bytes:
    body = b"".join(content)
    return bytes.fromhex(name) + (len(body) | 1 << 56).to_bytes(8, "big") + body


def matroska_with_compressed_blocks(block_bytes: int = 9_900_000, count: int = 64) -> bytes:
    """PCM of 48 kHz whose blocks are zlib: a thousandth of what they become."""
    number = (1).to_bytes(1, "big")
    compression = ebml("6d80", ebml("6240", ebml("5034", ebml("4254", bytes(1)))))
    sound = ebml("e1", ebml("b5", struct.pack(">d", 48_000.0)), ebml("9f", number), ebml("6264", bytes([16])))
    track = ebml("ae", ebml("d7", number), ebml("73c5", number), ebml("83", b"\x02"), ebml("86", b"A_PCM/INT/LIT"))
    track = ebml("ae", track[9:], sound, compression)
    block = b"\x81" + bytes(2) + b"\x80" + zlib.compress(bytes(block_bytes), 9)
    cluster = ebml("1f43b675", ebml("e7", bytes(1)), *[ebml("a3", block)] * count)
    head = ebml("1a45dfa3", ebml("4282", b"matroska"), ebml("4287", b"\x04"), ebml("4285", b"\x02"))
    return head + ebml("18538067", ebml("1654ae6b", track), cluster)


BOMBS = {
    "mp3 with covers": mp3_with_covers,
    "mp3 with many tags": mp3_with_many_tags,
    "flac with many comments": flac_with_many_comments,
    "mp4 with many samples": mp4_with_many_samples,
    "matroska with compressed blocks": lambda clip: matroska_with_compressed_blocks(),
}
