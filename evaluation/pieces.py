"""Clips -> pieces of several lengths -> the words that a model leaves out -> the longest piece that it can take."""

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from audio_utils import SAMPLING_RATE
from collator import ChatCollator
from configuration_qwen2_audio_vl import PIECE_SECONDS, TRANSCRIBE
from evaluation.generate import load
from evaluation.questions import Question, Questions
from evaluation.rows import load_rows
from evaluation.scoring import compare
from evaluation.settings import Settings
from publishing.paths import CHECKSUMS, weights_of, write_checksums, write_json
from transcribe import Asker, LocalAsker


LENGTHS = (4, 6, 8, 10, 12, 15, 20, 25, PIECE_SECONDS)
PIECES = 32  # of each length
SHORTEST = 0.75  # of a length; pieces are at least so long
GAP = 0.3  # seconds of silence between two clips, as short as between two sentences
ENOUGH = 1.5 * PIECES * PIECE_SECONDS  # seconds of clips
MANY_WORDS = 1 / 3  # a piece that lost this share of its words is one that the model cannot take
ACCEPTED = 0.1  # share of such pieces


class Measured(NamedTuple):
    """How many pieces of a length were asked, of how many many words were lost, and what share of all words was."""

    seconds: float
    pieces: int
    lossy: int
    lost: float

    @property
    def is_kept(self) -> bool:
        return self.lossy <= ACCEPTED * self.pieces


def join_questions(questions: Iterable[Question], seconds: float) -> Iterator[Question]:
    """Joins successive questions with one clip each to questions with one piece, of 75 to 100% of a length."""
    parts, texts, length = [], [], 0
    limit, gap = round(seconds * SAMPLING_RATE), np.zeros(round(GAP * SAMPLING_RATE), np.float32)
    for question in questions:
        (clip,) = question.clips
        added = len(clip) + (len(gap) if parts else 0)
        if length + added > limit:
            parts, texts, length, added = [], [], 0, len(clip)
            if added > limit:
                continue
        parts += [gap, clip] if parts else [clip]
        texts.append(question.text)
        length += added
        if length >= SHORTEST * limit:
            joined = iter([{"type": "audio", "audio": np.concatenate(parts)}])
            yield question.replace("audio", joined)._replace(text=" ".join(texts))
            parts, texts, length = [], [], 0


def read_clips(questions: Questions) -> list[Question]:
    """
    Opens rows that are one clip and its transcript, all with the same prompt, in a fixed random order, until they
    suffice. Raises a ValueError if there are none.
    """
    order, fitting = list(range(len(questions.rows))), []
    random.Random(0).shuffle(order)
    for index in order:
        question = questions.read(index, questions.rows[index])
        is_clip = not question.error and len(question.clips) == 1 and not question.items("image")
        if is_clip and question.text.strip() and question.prompt == (fitting or [question])[0].prompt:
            fitting.append(question)
        if sum(each.duration for each in fitting) > ENOUGH:
            break
    if not fitting:
        raise ValueError("no row of the data is one clip and its transcript, of which pieces can be made")
    return fitting


def measure(ask: Asker, clips: list[Question], batch_size: int) -> list[Measured]:
    """
    Asks for the words of pieces of growing length, up to the first length of which more than a tenth of the pieces lose
    a third of their words or more. Lengths for which the clips do not suffice are left out.
    """
    results = []
    for seconds in LENGTHS:
        pieces = list(itertools.islice(join_questions(clips, seconds), PIECES))
        if not pieces:
            continue
        comparisons = []
        for start in tqdm(range(0, len(pieces), batch_size), desc=f"{seconds:g} s", unit="batch"):
            batch = pieces[start : start + batch_size]
            answers = ask([torch.from_numpy(piece.clips[0]) for piece in batch])
            pairs = zip(batch, answers, strict=True)
            comparisons += [compare({"text": piece.text, "pred_text": answer.text}) for piece, answer in pairs]
        lost = [comparison.edits["deleted"] for comparison in comparisons]
        words = [comparison.words for comparison in comparisons]
        lossy = sum(one >= MANY_WORDS * many for one, many in zip(lost, words, strict=True) if many)
        results.append(Measured(seconds, len(pieces), lossy, sum(lost) / max(1, sum(words))))
        if not results[-1].is_kept:
            break
    return results


def longest_kept(results: list[Measured]) -> float:
    """Returns the longest piece that a model can take. Raises a ValueError if it is not known."""
    if not results:
        raise ValueError(f"the clips do not suffice for a piece of {LENGTHS[0]} s or more")
    kept = [result.seconds for result in results if result.is_kept]
    if not kept:
        first = results[0]
        raise ValueError(
            f"of {first.lossy} of {first.pieces} pieces of {first.seconds:g} s a third of the words or more was lost, "
            "so there is no length that the model can take; train it further"
        )
    return float(kept[-1])


def measure_model(model, collator: ChatCollator, rows, batch_size: int) -> list[Measured]:
    """Does what [`measure`] does with a model in this process and the rows of `evaluation.rows.load_rows`."""
    clips = read_clips(Questions(rows, collator, None, None))
    return measure(LocalAsker(model, collator.processor, prompt=clips[0].prompt), clips, batch_size)


def measure_repo(settings: Settings) -> list[Measured]:
    """Does what [`measure`] does with the model and the data of some settings."""
    processor, model = load(settings.repo, settings.dtype, settings.audio_tokens)
    collator = ChatCollator(processor, instruction=settings.instruction or TRANSCRIBE)
    rows = load_rows(settings.data, columns=settings.columns)
    return measure_model(model.to(PartialState().device), collator, rows, settings.batch_size)


def store(folder: Path, seconds: float):
    """Writes the longest piece into the configuration of a folder's processor, and its checksum."""
    path = folder / "processor_config.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "piece_seconds": seconds})
    if (folder / CHECKSUMS).is_file():
        write_checksums(folder, weights_of(folder))
