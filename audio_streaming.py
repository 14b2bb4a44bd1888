"""A recording of any length -> samples as they are decoded -> pieces that a model can take, cut where it is quiet."""

import contextlib
import itertools
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from audio_decoding import decode_pieces, header_duration, header_duration_in_worker, of_one_rate, stream_in_worker
from audio_download import MAX_BYTES, TIMEOUT, describe, read
from audio_utils import SAMPLING_RATE, check_peak, check_rate, fetch_audio, resample_pieces, unwrap
from configuration_qwen2_audio_vl import SHORTEST_PIECE


QUIET_SECONDS = 0.3  # a cut lies in the middle of so long a stretch
STEP = SAMPLING_RATE // 100  # samples between the stretches that are compared: 10 ms
LEVEL = SAMPLING_RATE // 50  # samples of which one level is taken: 20 ms, as long as an audio token
LOUD_RANGE = 35.0  # decibels below the loud parts of a piece in which there may be a voice
FLOOR_SHARE = 1 / 3  # of the decibels from the quiet parts of a piece to its loud ones that are background
SILENT = -60.0  # decibels of full scale below which there is none
AHEAD = 8  # pieces that are decoded while the model works


class Piece(NamedTuple):
    """Consecutive samples of a recording, float32 `[samples]` at 16 kHz, and the number of the first one."""

    start: int
    samples: torch.Tensor

    @property
    def end(self) -> int:
        return self.start + len(self.samples)


def stream_audio(
    ele,
    *,
    sampling_rate: int | None = None,
    max_bytes: int = MAX_BYTES,
    max_seconds: float = math.inf,
    timeout: float = TIMEOUT,
    public_only: bool = False,
) -> Iterator[torch.Tensor]:
    """
    Opens audio as `audio_utils.fetch_audio` does, but yields its samples, float32 `[samples]` at 16 kHz, as they are
    decoded, a second or so at a time. Samples that are handed over are opened whole, and untrusted files are decoded in
    a process of their own each, which may compute for 8 s, or for a hundredth of `max_seconds` if that is more.

    Raises:
        AudioError: as `fetch_audio`. The default has no limit of length.
    """
    source, _ = unwrap(ele)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        yield from fetch_audio(ele, sampling_rate=sampling_rate, max_seconds=max_seconds).split(SAMPLING_RATE)
        return
    name, file = describe(source), read(source, max_bytes, timeout, public_only)
    decoded = of_one_rate((stream_in_worker if public_only else decode_pieces)(file, name, max_seconds), name)
    with contextlib.closing(decoded):  # closes the file when the reader stops early
        first = next(decoded, None)
        rate = check_rate(first[0]) if first else SAMPLING_RATE
        pieces = (torch.from_numpy(samples) for _, samples in itertools.chain([first] if first else (), decoded))
        is_empty = True
        for samples in resample_pieces((checked(piece, name) for piece in pieces), rate, SAMPLING_RATE):
            if len(samples):
                is_empty = False
                yield samples.clamp(-1.0, 1.0)
    if is_empty:
        check_peak(torch.empty(0), name)  # raises


def checked(samples: torch.Tensor, name: str) -> torch.Tensor:
    if len(samples):
        check_peak(samples, name)
    return samples


def find_duration(ele, in_worker: bool = False) -> float | None:
    """
    Returns the seconds that the header of a local file names, None where there is no such file or header. An untrusted
    file is opened in a process of its own (`in_worker`).
    """
    source, _ = unwrap(ele)
    source, _ = unwrap(ele)
    with contextlib.suppress(Exception):  # the header only serves the progress bar; reading the file reports its faults
        if isinstance(source, (str, Path)) and os.path.isfile(source):
            return (header_duration_in_worker if in_worker else header_duration)(open(source, "rb"))
    return None


def cut_pieces(
    parts: Iterable[torch.Tensor], max_seconds: float, start: int = 0, pause: float | None = None
) -> Iterator[Piece]:
    """
    Joins consecutive samples, and cuts them into pieces of at most `max_seconds`: in the middle of the quietest 0.3 s
    of the last half of what fits.

    Args:
        parts: float32 `[samples]` each, at 16 kHz.
        start: The sample at which the pieces begin; earlier ones are skipped.
        pause: Seconds of silence in whose middle a piece of 2 s or more ends earlier.
    """
    limit, waiting, position = round(max_seconds * SAMPLING_RATE), torch.empty(0), 0
    for part in parts:
        skipped = min(len(part), max(0, start - position - len(waiting)))
        position += skipped
        waiting = torch.cat([waiting, part[skipped:]])
        while len(waiting) > limit:
            size = find_pause(waiting[:limit], pause) or find_quiet(waiting[:limit], limit // 2)
            yield Piece(position, waiting[:size].clone())
            position, waiting = position + size, waiting[size:]
    while size := find_pause(waiting, pause):
        yield Piece(position, waiting[:size].clone())
        position, waiting = position + size, waiting[size:]
    if len(waiting):
        yield Piece(position, waiting)


def find_quiet(samples: torch.Tensor, first: int, end: int | None = None) -> int:
    """Returns the middle of the quietest 0.3 s between two samples of `[samples]`."""
    searched = samples[first:end].double()
    width = min(len(searched), round(QUIET_SECONDS * SAMPLING_RATE))
    energy = torch.cat([searched.new_zeros(1), searched.square().cumsum(0)])
    sums = (energy[width:] - energy[:-width])[::STEP]
    return first + int(sums.argmin()) * STEP + width // 2


def find_pause(samples: torch.Tensor, seconds: float | None) -> int | None:
    """
    Returns the middle of the first silence of at least `seconds` between voices, not before the least length of a
    piece; None if there is none.
    """
    if seconds is None:
        return None
    places = find_voice(samples).nonzero().flatten() * LEVEL
    for end, start in itertools.pairwise(places.tolist()):
        middle = (end + LEVEL + start) // 2
        if start - end - LEVEL >= seconds * SAMPLING_RATE and middle >= SHORTEST_PIECE * SAMPLING_RATE:
            return middle
    return None


def halve(piece: Piece) -> list[Piece]:
    """Cuts a piece at the quietest place of its middle half."""
    quarter = len(piece.samples) // 4
    size = find_quiet(piece.samples, quarter, 3 * quarter)
    return [Piece(piece.start, piece.samples[:size]), Piece(piece.start + size, piece.samples[size:])]


def find_voice(samples: torch.Tensor) -> torch.Tensor:
    """
    Returns where `[samples]` are loud enough for a voice: bool `[levels]`, one for each 20 ms. The loud parts are at
    the 95th percentile of the levels, the quiet ones at the 5th.
    """
    count = len(samples) // LEVEL
    if not count:
        return torch.zeros(0, dtype=torch.bool)
    power = samples[: count * LEVEL].double().square().view(count, -1).mean(1)
    levels = 10 * power.clamp(min=1e-12).log10()  # decibels of full scale
    quiet, loud = levels.quantile(torch.tensor([0.05, 0.95], dtype=torch.double)).tolist()
    return levels > max(SILENT, loud - LOUD_RANGE, quiet + FLOOR_SHARE * (loud - quiet))


def ahead(items: Iterator, count: int = AHEAD) -> Iterator:
    """
    Yields the items of a generator, which runs in a thread, up to `count` items ahead of its reader. It is closed when
    the reader stops.
    """
    end = object()
    with contextlib.closing(items), ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, items, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item
