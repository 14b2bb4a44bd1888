"""
Compares a long recording with the clips that it is made of: what the cuts of `transcribe.py` cost in words, and what
the length costs in memory.

    python -m speech.long_form [--minutes N] [--batch N] [--readme]

Whisper base answers the same pieces as a control, and both once more with the last words of the text before each piece
as context. The recording joins telephone prompts (speech.recordings) in a fixed
random order with gaps of 0.05 to 1.5 s, as MP3 of 48 kHz stereo; once with music. REPO is what `make speech` built.
"""

import itertools
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

from audio_utils import SAMPLING_RATE, fetch_audio
from benchmarks.report import report, table
from configuration_qwen2_audio_vl import TRANSCRIBE
from demo.ask import read_rows
from evaluation.generate import load
from evaluation.scoring import align, edit_of, normalize
from publishing.paths import ROOT
from speech.recordings import BUILD, rows_of
from speech.run import DTYPE, REPO
from speech.sounds import music
from transcribe import Answer, Transcriber, longest_answer, make_transcriber


GAPS = 0.05, 1.5  # seconds
BITRATE = 128_000
MUSIC = 10.0  # dB below the voices
CONTEXT = 10  # words of the text before a piece
HOURS = 1, 3  # lengths of the recordings whose memory is measured
# The peak of a process's own memory in MB; `resource` would begin with that of its parent.
PEAK = """
import re, sys
from pathlib import Path
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
"""
MEASURE = f"""{PEAK}
import audio_streaming as _
before = peak()
{{body}}
print(peak() - before)
"""
STREAMED = "from audio_streaming import *; n = sum(len(p.samples) for p in cut_pieces(stream_audio(sys.argv[1]), 10))"
WHOLE = "from audio_utils import fetch_audio; fetch_audio(sys.argv[1], max_seconds=1e6)"


def join_clips(clips: list[np.ndarray], seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """Joins clips with random gaps of faint noise; returns the samples, and the sample at which each clip begins."""
    rng, parts, begins, length = np.random.default_rng(seed), [], [], 0
    for clip in clips:
        gap = (1e-4 * rng.standard_normal(int(SAMPLING_RATE * rng.uniform(*GAPS)))).astype(np.float32)
        parts += [gap, clip]
        begins.append(length + len(gap))
        length += len(gap) + len(clip)
    return np.concatenate(parts), begins


class Recording(NamedTuple):
    """Samples, float32 `[samples]`, and of each of its clips the first sample and the end, and the text."""

    samples: np.ndarray
    edges: list[tuple[int, int]]
    texts: list[str]


def join_recordings(minutes: float) -> Recording:
    """Joins telephone prompts of at least so many minutes."""
    rows, clips, texts, length = read_rows(rows_of("recordings")), [], [], 0
    random.Random(1).shuffle(rows)
    for row in rows:
        if length < 60 * minutes * SAMPLING_RATE:
            texts.append(row["text"])
            clips.append(fetch_audio(str(rows_of("recordings").parent / row["audio"])).numpy())
            length += len(clips[-1])
    samples, begins = join_clips(clips)
    return Recording(samples, [(begin, begin + len(clip)) for begin, clip in zip(begins, clips, strict=True)], texts)


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


class WhisperAsker:
    """Transcribes pieces with the complete Whisper, as a control of the cuts."""

    def __init__(self, folder: Path):
        self.model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.extractor = WhisperFeatureExtractor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def __call__(self, clips: list[torch.Tensor], before: str = "") -> list[Answer]:
        windows = [clip.numpy() for clip in clips]
        features = self.extractor(windows, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
        settings = {"language": "en", "task": "transcribe", "max_new_tokens": longest_answer(max(map(len, clips)))}
        if before:
            settings["prompt_ids"] = torch.from_numpy(self.tokenizer.get_prompt_ids(before))
        ids = self.model.generate(features, **settings)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [Answer(" ".join(text.split())) for text in texts]


class WithTextBefore:
    """Answers one piece at a time by `ask(clips, words)`, with the last words of the answer before."""

    def __init__(self, ask):
        self.ask, self.before = ask, ""

    def __call__(self, clips: list[torch.Tensor]) -> list[Answer]:
        answers = []
        for clip in clips:
            answers += self.ask([clip], " ".join(self.before.split()[-CONTEXT:]))
            self.before = answers[-1].text
        return answers


class Aligned:
    """What became of each word of a reference, and after how many of them each word of an answer and its end stand."""

    def __init__(self, reference: str, answer: str):
        self.edits, self.places, self.inserted, self.errors = [], [], [], 0
        for expected, word in align(reference, answer):
            edit = edit_of(expected, word)
            self.errors += edit != "equal"
            if edit == "inserted":
                self.inserted.append((len(self.edits), word))
            self.places += [len(self.edits)] * len(word.split())
            self.edits += [edit] * len(expected.split())
        self.places.append(len(self.edits))


def count_faults(reference: str, joined: Aligned, single: Aligned, seams: list[int]) -> int:
    """
    Counts the words that seams cost: the two on each side of a seam that are missing there and not in the answer about
    the clip alone, and those beside a seam that are said again. A weak model leaves out words anywhere, so the same
    count at other places is the control.
    """
    words, lost, doubled = reference.split(), set(), 0
    for seam in seams:
        near = range(max(0, seam - 2), min(len(words), seam + 2))
        lost.update(i for i in near if joined.edits[i] == "deleted" and single.edits[i] != "deleted")
        again = {words[i] for i in near}
        extra = {each for each in joined.inserted if abs(each[0] - seam) <= 1 and each[1] in again}
        doubled += len(extra - {*single.inserted})
    return len(lost) + doubled


def mix(joined: np.ndarray, decibels: float) -> np.ndarray:
    """Adds music that is quieter than the voices by so many decibels."""
    sound = music(len(joined), np.random.default_rng(7)).astype(np.float32)
    return joined + sound * (joined.std() / sound.std() * 10 ** (-decibels / 20))


def compare_cuts(name: str, transcriber: Transcriber, samples: np.ndarray, alone: list[str], texts: list[str]) -> list:
    """Returns a row of the table: the whole recording in pieces beside the answers to its clips `alone`."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.mp3"
        write_mp3(samples, path)
        segments = [segment for _, batch in transcriber.batches(str(path)) for segment in batch]
    factor = len(samples) / SAMPLING_RATE / (time.perf_counter() - start)
    reference = " ".join(map(normalize, texts))
    answers = [normalize(segment.text) for segment in segments]
    joined, single = Aligned(reference, " ".join(answers)), Aligned(reference, " ".join(map(normalize, alone)))
    ends = list(itertools.accumulate(len(answer.split()) for answer in answers))
    middles = [(first + end) // 2 for first, end in itertools.pairwise([0, *ends])]
    words, doubtful = len(reference.split()), sum(segment.doubt is not None for segment in segments)
    rates = [f"{100 * each.errors / words:.2f}" for each in (single, joined)]
    faults = []
    for ours in (ends[:-1], middles):
        count = count_faults(reference, joined, single, [joined.places[place] for place in ours])
        faults.append(f"{40 * count / max(1, len(ours)):.1f}")
    return [name, words, len(segments), doubtful, *rates, *faults, f"{factor:.1f}"]


def main(minutes: float = 8.0, batch: int = 8) -> list[str]:
    joined, edges, texts = join_recordings(minutes)
    processor, model = load(REPO, DTYPE)
    ours = make_transcriber(model, processor, batch_size=batch)
    control = Transcriber(WhisperAsker(BUILD / "whisper"), ours.max_seconds, batch)

    def ask_with_text(clips: list[torch.Tensor], before: str) -> list[Answer]:
        return replace(ours.ask, prompt=f'{TRANSCRIBE} It follows on "{before}".' if before else None)(clips)

    compared, sounds = [], {"as it is": joined, f"music at {MUSIC:g} dB": mix(joined, MUSIC)}
    for name, transcriber, ask in (
        ("speech model", ours, ask_with_text),
        ("Whisper base", control, control.ask),
    ):
        for what, samples in sounds.items():
            clips = [torch.from_numpy(samples[first:end]) for first, end in edges]
            batches = [clips[start : start + batch] for start in range(0, len(clips), batch)]
            alone = [answer.text for clips in batches for answer in transcriber.ask(clips)]
            compared.append(compare_cuts(f"{name}, {what}", transcriber, samples, alone, texts))
            if samples is joined:
                carrying = replace(transcriber, ask=WithTextBefore(ask))
                compared.append(compare_cuts(f"{name}, with the text before", carrying, samples, alone, texts))
    head = ["recording", "words", "segments", "in doubt", "WER of the clips %", "WER joined %"]
    head += ["lost or doubled at 40 seams", "in the middle of 40 segments", "times real time"]
    first = table(head, compared)
    memory, path = [], BUILD / "long.mp3"
    for hours in HOURS:
        write_mp3(joined, path, round(hours * 3600 / (len(joined) / SAMPLING_RATE)))
        whole = f"{measure_memory(path, WHOLE):.0f} MB" if hours == 1 else ""
        memory.append([f"{hours} h", f"{measure_memory(path, STREAMED):.0f} MB", whole])
    path.unlink()
    note = f"{len(joined) / SAMPLING_RATE / 60:.1f} minutes, in pieces of at most {ours.max_seconds:g} s."
    return [first, note, table(["MP3 of 48 kHz stereo", "streamed in pieces of 10 s", "opened whole"], memory)]


if __name__ == "__main__":
    report(__file__, __doc__, main, ROOT / "speech" / "README.md")
