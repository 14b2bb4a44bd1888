"""
Compares a long recording with the clips that it is made of: what the cuts of `transcribe.py` cost in words, and what
the length costs in memory.

    python -m speech.long_form [--minutes N] [--batch N] [--readme]

The recording joins telephone prompts (speech.recordings) in a fixed random order with gaps of 0.05 to 1.5 s, as MP3 of
48 kHz stereo. REPO is what `make speech` built.
"""

import random
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np

from audio_streaming import cut_pieces, stream_audio
from audio_utils import SAMPLING_RATE, fetch_audio
from benchmarks.report import report, table
from demo.ask import read_rows
from evaluation.generate import load
from evaluation.scoring import align, normalize
from publishing.paths import ROOT
from speech.recordings import BUILD, rows_of
from speech.run import DTYPE, REPO
from transcribe import make_transcriber, transcribe


GAPS = 0.05, 1.5  # seconds
BITRATE = 128_000
HOURS = 1, 3  # lengths of the recordings whose memory is measured
# The peak of a process's own memory; `resource` would begin with that of its parent.
MEASURE = """
import re, sys
from pathlib import Path
import audio_streaming as _
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before = peak()
{body}
print(peak() - before)
"""
STREAMED = "from audio_streaming import *; n = sum(len(p.samples) for p in cut_pieces(stream_audio(sys.argv[1]), 10))"
WHOLE = "from audio_utils import fetch_audio; fetch_audio(sys.argv[1], max_seconds=1e6)"


def join_clips(clips: list[np.ndarray], seed: int = 0) -> tuple[np.ndarray, list[float]]:
    """Joins clips with random gaps of faint noise; returns the samples, and the second at which each clip begins."""
    rng, parts, begins, length = np.random.default_rng(seed), [], [], 0
    for clip in clips:
        gap = (1e-4 * rng.standard_normal(int(SAMPLING_RATE * rng.uniform(*GAPS)))).astype(np.float32)
        parts += [gap, clip]
        begins.append((length + len(gap)) / SAMPLING_RATE)
        length += len(gap) + len(clip)
    return np.concatenate(parts), begins


def write_mp3(samples: np.ndarray, path: Path, repeats: int = 1):
    """Writes samples at 16 kHz, several times one after another, as MP3 of 48 kHz stereo."""
    with av.open(str(path), "w", format="mp3") as container:
        stream = container.add_stream("mp3", rate=48_000, layout="stereo")
        stream.bit_rate = BITRATE
        resampler = av.AudioResampler(format="fltp", layout="stereo", rate=48_000, frame_size=1152)
        for _ in range(repeats):
            for start in range(0, len(samples), 2**16):
                frame = av.AudioFrame.from_ndarray(samples[None, start : start + 2**16], format="flt", layout="mono")
                frame.sample_rate = SAMPLING_RATE
                for resampled in resampler.resample(frame):
                    container.mux(stream.encode(resampled))
        container.mux(stream.encode(None))


def measure_memory(path: Path, body: str) -> float:
    """Returns by how many MB a process grows that opens a recording."""
    program = MEASURE.replace("{body}", body)
    command = [sys.executable, "-c", program, str(path)]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def count_errors(reference: str, answer: str) -> tuple[int, int]:
    """Returns the wrong words, and the words of the reference."""
    pairs = align(normalize(reference), normalize(answer))
    return sum(expected != word for expected, word in pairs), len(normalize(reference).split())


def main(minutes: float = 10.0, batch: int = 8) -> list[str]:
    rows, clips, seconds = read_rows(rows_of("recordings")), [], 0.0
    random.Random(1).shuffle(rows)
    chosen = []
    for row in rows:
        if seconds < 60 * minutes:
            chosen.append(row)
            clips.append(fetch_audio(str(rows_of("recordings").parent / row["audio"])).numpy())
            seconds += len(clips[-1]) / SAMPLING_RATE
    processor, model = load(REPO, DTYPE)
    joined, begins = join_clips(clips)
    path = BUILD / "long.mp3"
    write_mp3(joined, path)
    transcriber = make_transcriber(model, processor, batch_size=batch)
    pieces = list(cut_pieces(stream_audio(str(path)), transcriber.max_seconds))
    edges = [(begin, begin + len(clip) / SAMPLING_RATE) for begin, clip in zip(begins, clips, strict=True)]
    within = sum(any(a < piece.end / SAMPLING_RATE < b for a, b in edges) for piece in pieces[:-1])

    start = time.perf_counter()
    result = transcribe(model, processor, str(path), batch_size=batch)
    factor = result.duration / (time.perf_counter() - start)
    text = " ".join(row["text"] for row in chosen)
    errors, words = count_errors(text, result.text)
    singles = sum(
        count_errors(row["text"], transcribe(model, processor, clip).text)[0]
        for row, clip in zip(chosen, clips, strict=True)
    )
    doubtful = sum(segment.doubt is not None for segment in result.segments)
    first = table(
        ["recording", "words", "pieces", "cut in a clip", "in doubt", "WER %", "WER of the clips %", "times real time"],
        [
            [
                f"{result.duration / 60:.1f} min",
                words,
                len(pieces),
                within,
                doubtful,
                f"{100 * errors / words:.2f}",
                f"{100 * singles / words:.2f}",
                f"{factor:.1f}",
            ]
        ],
    )
    memory = []
    for hours in HOURS:
        write_mp3(joined, path, round(hours * 3600 / (len(joined) / SAMPLING_RATE)))
        whole = f"{measure_memory(path, WHOLE):.0f} MB" if hours == 1 else ""
        memory.append([f"{hours} h", f"{measure_memory(path, STREAMED):.0f} MB", whole])
    path.unlink()
    return [first, table(["MP3 of 48 kHz stereo", "streamed in pieces of 10 s", "opened whole"], memory)]


if __name__ == "__main__":
    report(__file__, __doc__, main, ROOT / "speech" / "README.md")
