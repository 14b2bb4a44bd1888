"""
Measures how far the times of words are from those that a synthesizer tells of its own clips, beside the pipeline of
transformers with the same Whisper.

    python -m speech.time_errors [--count N] [--readme]

Two voices of festival, which are two synthesizers (one joins recorded diphones, one is a hidden Markov model), say
held-out sentences. It needs Debian's festival, festvox-kallpc16k and festvox-us-slt-hts, and the packages of texts that
speech.sentences reads. If PocketSphinx, an aligner of phones, is installed, it is measured too, and its times of
telephone prompts are those of a person.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import pipeline

from audio_streaming import find_voice
from audio_utils import SAMPLING_RATE, fetch_audio
from benchmarks.measure import where
from benchmarks.report import report, table
from demo.ask import read_rows
from evaluation.scoring import align
from speech.parts import make_parts
from speech.recordings import BUILD, rows_of
from speech.sentences import deal
from word_times import Aligner


try:
    from pocketsphinx import Decoder
except ImportError:
    Decoder = None


VOICES = {"kal_diphone": "diphones", "cmu_us_slt_arctic_hts": "Markov model"}
LIMITS = 0.05, 0.1, 0.2  # seconds
SEED = 31
PLAIN = re.compile(r"[a-z]+(?: [a-z]+){4,19}")  # words that are written as they are said
SAY = """(voice_{voice}) (set! said (SynthText "{text}")) (utt.save.wave said "{path}")
(mapcar (lambda (word) (format t "%s %f %f\\n" (item.name word) (item.feat word "word_start")
(item.feat word "word_end"))) (utt.relation.items said 'Word)) (format t "end\\n")"""


class Clip(NamedTuple):
    """Samples, float32 `[samples]`, and start, end and text of each word."""

    samples: torch.Tensor
    words: list[tuple[float, float, str]]


def choose_texts(count: int) -> list[str]:
    """Chooses held-out sentences of 5 to 20 plain words."""
    texts = [text.text.rstrip(".").lower() for text in deal(20 * count, SEED, held_out=True)]
    return [text for text in texts if PLAIN.fullmatch(text)][:count]


def say(texts: list[str], voice: str) -> list[Clip]:
    """Synthesizes texts by a voice of festival. Words that it says in several parts are left out with their clip."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.wav" for number in range(len(texts))]
        script = "\n".join(
            SAY.format(voice=voice, text=text, path=path) for text, path in zip(texts, paths, strict=True)
        )
        told = subprocess.run(["festival", "--pipe"], input=script, text=True, check=True, capture_output=True).stdout
        clips = []
        for text, path, lines in zip(texts, paths, told.split("end\n"), strict=False):
            words = [line.split() for line in lines.splitlines()]
            if [word for word, _, _ in words] == text.split():
                times = [(float(start), float(end), word) for word, start, end in words]
                clips.append(Clip(fetch_audio(path), times))
    return clips


def find_ours(aligner: Aligner, clip: Clip) -> list[tuple[float, float, str]]:
    """Finds the words of the clip's text, as `transcribe.py` does."""
    text = " ".join(word for _, _, word in clip.words)
    found = aligner.find_words(text, clip.samples, find_voice(clip.samples).numpy())
    return [(start, end, word) for start, end, word, _ in found]


def find_phones(clip: Clip) -> list[tuple[float, float, str]] | None:
    """Finds the words of the clip's text by PocketSphinx; None where its dictionary lacks one, or it finds no path."""
    words = [word for _, _, word in clip.words]
    decoder = Decoder(lm=None, loglevel="FATAL", beam=1e-60, wbeam=1e-60, pbeam=1e-60)
    if any(decoder.lookup_word(word) is None for word in words):
        return None
    decoder.set_align_text(" ".join(words))
    decoder.start_utt()
    decoder.process_raw((clip.samples.clamp(-1, 1) * 32767).short().numpy().tobytes(), full_utt=True)
    decoder.end_utt()
    parts = decoder.seg() if decoder.hyp() else []
    found = [(part.start_frame / 100, (part.end_frame + 1) / 100) for part in parts if part.word[0] not in "<["]
    return [(*span, word) for span, word in zip(found, words, strict=True)] if len(found) == len(words) else None


def read_person(count: int) -> list[Clip]:
    """Returns telephone prompts of 5 to 20 words with the times that PocketSphinx finds."""
    source = rows_of("recordings")
    rows = read_rows(source)
    texts = [re.sub(r"[^a-z' ]", "", row["text"].lower()) for row in rows]
    clips = []
    for row, text in zip(rows, texts, strict=True):
        if PLAIN.fullmatch(text) and len(clips) < count:
            clip = Clip(fetch_audio(source.parent / row["audio"]), [(0, 0, word) for word in text.split()])
            if times := find_phones(clip):
                clips.append(clip._replace(words=times))
    return clips


def find_theirs(recognizer, clip: Clip) -> list[tuple[float, float, str]]:
    """Returns the words that the pipeline recognizes, with its times."""
    # Without a limit it repeats itself in some clips until the decoder is full.
    settings = {"language": "en", "task": "transcribe", "max_new_tokens": 4 + 4 * len(clip.words)}
    found = recognizer(clip.samples.numpy(), return_timestamps="word", generate_kwargs=settings)["chunks"]
    times = ((*word["timestamp"], re.sub(r"[^a-z']", "", word["text"].lower())) for word in found)
    return [(start, start if end is None else end, word) for start, end, word in times if word]


def measure(clip: Clip, found: list[tuple[float, float, str]]) -> Iterator[float]:
    """Yields the errors in seconds of starts and ends, of the words that were recognized."""
    pairs = align(" ".join(word for _, _, word in clip.words), " ".join(word for _, _, word in found))
    told, other = iter(clip.words), iter(found)
    for expected, word in pairs:
        one = [next(told) for _ in expected.split()]
        two = [next(other) for _ in word.split()]
        if expected == word and len(one) == len(two) == 1:
            yield from (abs(one[0][side] - two[0][side]) for side in (0, 1))


def count_faults(found: list[tuple[float, float, str]]) -> int:
    """Counts words of no length, and words that begin before the one before has ended."""
    return sum(end <= start for start, end, _ in found) + sum(b[0] < a[1] - 1e-6 for a, b in pairwise(found))


def main(count: int = 60) -> list[str]:
    make_parts(BUILD)
    aligner, texts = Aligner(BUILD / "whisper"), choose_texts(count)
    recognizer = pipeline("automatic-speech-recognition", str(BUILD / "whisper"), device="cpu", dtype=torch.float32)
    tools = {"here": partial(find_ours, aligner), "transformers": partial(find_theirs, recognizer)}
    voices = {f"{voice} ({kind})": say(texts, voice) for voice, kind in VOICES.items()}
    if Decoder is not None:
        tools["PocketSphinx"] = find_phones
        voices["a person (by PocketSphinx)"] = read_person(count)
    rows = []
    for voice, clips in voices.items():
        for name, find in tools.items():
            if name in voice:
                continue
            errors, faults = [], 0
            for clip in tqdm(clips, desc=f"{voice}, {name}"):
                found = find(clip) or []
                errors += measure(clip, found)
                faults += count_faults(found)
            errors = np.array(errors)
            shares = [f"{(errors <= limit).mean():.0%}" for limit in LIMITS]
            times = [f"{1000 * value:.0f} ms" for value in (errors.mean(), np.median(errors))]
            rows.append([voice, name, len(clips), len(errors) // 2, *times, *shares, faults])
    spoken = [clip for clips in voices.values() for clip in clips]
    seconds = sum(len(clip.samples) for clip in spoken) / SAMPLING_RATE
    within = [f"within {1000 * limit:.0f} ms" for limit in LIMITS]
    head = ["voice", "times of", "clips", "words", "mean", "median", *within, "empty or out of order"]
    return [table(head, rows), f"{where()}; {seconds / len(spoken):.1f} s a clip."]


if __name__ == "__main__":
    report(__file__, __doc__, main)
