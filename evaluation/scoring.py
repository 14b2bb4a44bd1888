"""Predictions -> scores: error rates by the rule of the Open ASR Leaderboard, accuracy of classes. Needs no model."""

import json
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path

import kaldialign
import numpy as np
from transformers.utils import logging

from evaluation import tasks
from evaluation.leaderboard import LEADERBOARD, NOTHING_SAID, normalize


logger = logging.get_logger(__name__)

RULE = {
    "normalizer": f"English of {LEADERBOARD['source']['repository']} at {LEADERBOARD['source']['commit'][:7]}",
    "alignment": f"kaldialign {metadata.version('kaldialign')}",
    "compounds": "words may be joined: white paper = whitepaper",
    "exact": f"the normalized words are equal; {tasks.RULE}",
}

# The longest text that is aligned. Time and memory of an alignment grow with the square: these take a second and 80 MB.
MAX_CHARACTERS, MAX_WORDS = 10_000, 2_000
TOO_LONG = "(too long)"  # stands for an answer that is not aligned; no normalized text has brackets

RESAMPLES = 1_000
REPEATING = 2.4  # `compression_ratio_threshold` of openai/whisper's transcribe.py
CLOSED_WORDS = 3  # the most words of an answer that is a class

AS_GIVEN = "as given"  # the arm of predictions.jsonl
ALL = "all"  # the name of the scores over the rows of all groups

# Keys of a line of predictions.jsonl: their types, and how an error describes them.
NONE = type(None)
FIELDS = {"row": ((int,), "an int from 0"), "media": ((list, NONE), "a list of strings or null")}
FIELDS |= dict.fromkeys(("place", "text", "pred_text", "error"), ((str,), "a string"))
FIELDS |= dict.fromkeys(("group", "audio_filepath", "prompt"), ((str, NONE), "a string or null"))
FIELDS |= dict.fromkeys(("duration", "time"), ((float, int, NONE), "seconds or null"))
OPTIONAL = ("pred_text", "error", "prompt", "media")  # a line has one of the first two; the report shows the others
MAX_SECONDS = 10_000_000  # the greatest `duration` and `time`: four months


def normalize_short(text: str) -> str | None:
    """Normalizes a text; None if it is longer than 10,000 characters, or 2,000 words, before or after that."""
    if len(text) > MAX_CHARACTERS:
        return None
    normalized = normalize(text)  # it can be 18 times as long
    return normalized if len(normalized) <= MAX_CHARACTERS and normalized.count(" ") < MAX_WORDS else None


def align(reference: str, answer: str) -> list[tuple[str, str]]:
    """
    The words of two normalized texts in pairs, "" where a word is inserted or deleted. Words that are equal once they
    are joined are one pair without an error, such as ("white paper", "whitepaper").
    """
    return kaldialign.align(reference.split(), answer.split(), "", merge_compounds=True)


def edit_of(reference: str, answer: str) -> str:
    """Names what happened to the words of a pair of [`align`]: "equal", "inserted", "deleted" or "substituted"."""
    if reference.replace(" ", "") == answer.replace(" ", ""):
        return "equal"
    return "substituted" if reference and answer else "deleted" if reference else "inserted"


@dataclass(frozen=True)
class Comparison:
    """A prediction beside its reference, and how far they are apart."""

    prediction: dict  # a line of predictions.jsonl
    reference: str  # normalized; as it is written if it is too long
    answer: str | None  # normalized; None if the row failed, TOO_LONG if it is not aligned
    pairs: list[tuple[str, str]] = field(default_factory=list)  # see [`align`]; empty if the row is not aligned
    character_errors: int = 0
    too_long: bool = False  # no alignment; all words of the reference count as deleted
    metrics: dict[str, float] = field(default_factory=dict)  # of a function of the user's

    @property
    def failed(self) -> bool:
        return self.answer is None

    @cached_property
    def repeating(self) -> bool:
        return is_repeating(self.prediction["pred_text"])

    @cached_property
    def fields(self) -> dict[str, str] | None:
        """The fields of a reference that is a JSON object."""
        return tasks.read_fields(self.prediction["text"])

    @cached_property
    def answered_fields(self) -> dict[str, str] | None:
        return tasks.read_fields(self.prediction.get("pred_text", ""))

    @property
    def says_something(self) -> bool:
        """Whether the reference has a word, or is a JSON object: `{}` has none."""
        return self.reference not in NOTHING_SAID or self.fields is not None

    @property
    def is_exact(self) -> bool:
        return self.answer == self.reference if self.fields is None else self.fields == self.answered_fields

    @cached_property
    def words(self) -> int:
        """The number of words of the reference."""
        return len(self.reference.split())

    @cached_property
    def edits(self) -> Counter:
        """The number of pairs for each result of [`edit_of`]."""
        return Counter(deleted=self.words) if self.too_long else Counter(edit_of(*pair) for pair in self.pairs)

    @property
    def word_errors(self) -> int:
        return self.edits.total() - self.edits["equal"]

    @property
    def is_wrong(self) -> bool:
        return self.failed or self.word_errors > 0 or (self.fields is not None and not self.is_exact)

    @property
    def badness(self) -> tuple[bool, bool, float, int]:
        """
        Sorts predictions: failed ones are the worst, then those that are wrong, by their errors per word of the
        reference.
        """
        return self.failed, self.is_wrong, self.word_errors / max(self.words, 1), self.word_errors


def compare(prediction: dict, metric: tasks.Metric | None = None) -> Comparison:
    """Compares the answer and the reference of a line of predictions.jsonl; see [`read_predictions`]."""
    metrics = {}
    if metric is not None and "pred_text" in prediction:
        metrics = metric(prediction["text"], prediction["pred_text"])
    normalized = normalize_short(prediction["text"])
    reference = " ".join(prediction["text"].split()) if normalized is None else normalized
    if "error" in prediction:
        return Comparison(prediction, reference, None)
    answer = normalize_short(prediction["pred_text"])
    if normalized is None or answer is None:
        shown = "" if answer == "" else TOO_LONG
        return Comparison(prediction, reference, shown, [], len(reference), True, metrics)
    errors = kaldialign.edit_distance(reference, answer)["total"]
    return Comparison(prediction, reference, answer, align(reference, answer), errors, False, metrics)


def is_repeating(answer: str) -> bool:
    """Whether an answer repeats itself, by Whisper's rule: it compresses too well."""
    data = answer.encode("utf-8", errors="replace")
    return len(data) / len(zlib.compress(data)) > REPEATING


def kind_of(comparisons: list[Comparison]) -> str:
    """
    Says what the references are: "json" if all are JSON objects; "classes" if they are at most 20 different ones of at
    most 3 words each, and at least twice as many rows; else "text". Rows in which nothing is said do not count.
    """
    if any(row.fields is not None for row in comparisons):
        others = [row for row in comparisons if row.fields is None and row.reference not in NOTHING_SAID]
        return "text" if others else "json"
    said = [row.reference for row in comparisons if row.reference not in NOTHING_SAID]
    is_closed = tasks.are_few(said) and all(len(name.split()) <= CLOSED_WORDS for name in set(said))
    return "classes" if is_closed else "text"


def score(rows: list[dict], seed: int = 0) -> dict:
    """
    Scores the rows of one arm, or of one group of it, which are lines of predictions.jsonl (see [`read_predictions`]);
    only `text`, and `pred_text` or `error`, are needed. Failed rows are only counted. A rate of no rows is None. The
    same rows and seed give the same intervals.

    Returns:
        `rows`, `failed`, `words` (of the references), `insertions`, `deletions` and `substitutions` (words): counts.
        `wer` and `cer`: errors divided by the length of the references in words and in characters with spaces;
            `value`, and `low` and `high`, the 95% interval of a percentile bootstrap over rows.
        `macro_wer`: the mean of the rows' own WER.
        `rtfx`: see [`speed`].
        `empty`: the share of answers that are empty once normalized, though something was said.
        `repeating`: the share of answers that repeat themselves.
        `nothing_said`: how many `rows` have a reference that is empty once normalized, and how many of them are
            `answered` with a word. Like the leaderboard, the rates leave these rows out, except `repeating` and `rtfx`.
        `too_long`: how many rows have a text of more than 10,000 characters or 2,000 words, which is not aligned: all
            words and characters of the reference count as deleted. Missing if there are none.
        `kind`: see [`kind_of`].
        `exact` (`value`, `low` and `high`): the share of rows whose normalized answer is the reference; if this is a
            JSON object, the share of those with the same fields.
        `metrics`: the mean of each number of a function of the user's (`value`, `low` and `high`). Missing without one.
        If the references are classes, `confusion` as in [`tasks.confuse`] and `always_wrong` as in
        [`tasks.find_always_wrong`]. If they are JSON objects, `valid_json`, the share of answers that are one, and
        `fields` as in [`tasks.score_fields`].
    """
    return summarize([compare(row) for row in rows], seed)


def summarize(comparisons: list[Comparison], seed: int) -> dict:
    answered = [row for row in comparisons if not row.failed]
    said = [row for row in answered if row.says_something]
    silent = [row for row in answered if not row.says_something]
    kind = kind_of(comparisons)  # with those that failed, so that it is equal for all arms
    names = list(dict.fromkeys(name for row in answered for name in row.metrics))
    errors = [(row.word_errors, row.character_errors, row.is_exact) for row in said]
    lengths = [(row.words, len(row.reference), 1) for row in said]
    wer, cer, exact = intervals(errors, lengths, seed, 3)
    edits = sum((row.edits for row in said), Counter())
    scores = {
        "kind": kind,
        "rows": len(comparisons),
        "failed": len(comparisons) - len(answered),
        "exact": exact,
        "wer": wer,
        "cer": cer,
        "macro_wer": mean([row.word_errors / max(row.words, 1) for row in said]),
        "insertions": edits["inserted"],
        "deletions": edits["deleted"],
        "substitutions": edits["substituted"],
        "words": sum(row.words for row in said),
        "rtfx": speed([row.prediction for row in answered]),
        "empty": mean([row.answer == "" for row in said]),
        "repeating": mean([row.repeating for row in answered]),
        "nothing_said": {"rows": len(silent), "answered": sum(row.answer != "" for row in silent)},
    }
    if too_long := sum(row.too_long for row in answered):
        scores["too_long"] = too_long
    if names:
        numbers = [[row.metrics.get(name, 0.0) for name in names] for row in answered]
        counts = [[int(name in row.metrics) for name in names] for row in answered]  # a row may lack some of the names
        means = intervals(numbers, counts, seed, len(names))
        scores["metrics"] = dict(zip(names, means, strict=True))
    if kind == "classes":
        pairs = [(row.reference, row.answer) for row in comparisons if row.reference not in NOTHING_SAID]
        scores |= {"confusion": tasks.confuse(pairs), "always_wrong": tasks.find_always_wrong(pairs)}
    if kind == "json":
        pairs = [(row.fields, row.answered_fields) for row in said if row.fields is not None]
        scores["valid_json"] = mean([answer is not None for _, answer in pairs])
        scores["fields"] = tasks.score_fields(pairs)
    return scores


def speed(predictions: list[dict]) -> float | None:
    """Seconds of audio per second of time; None if a prediction lacks one of them, or if it is not finite."""
    times = [(prediction.get("duration"), prediction.get("time")) for prediction in predictions]
    if not times or not all(duration and time for duration, time in times):
        return None
    ratio = sum(duration for duration, _ in times) / sum(time for _, time in times)
    return ratio if ratio < math.inf else None


def mean(values: list) -> float | None:
    return sum(values) / len(values) if values else None


def intervals(sums: list[Sequence], lengths: list[Sequence], seed: int, count: int) -> list[dict]:
    """
    Divides the sums of what rows have by the sums of their lengths, with the 95% interval of a percentile bootstrap
    over rows. Both are (rows, count), for rates that share their resamples. A rate of no length is None.
    """
    if not sums:
        return [{"value": None, "low": None, "high": None} for _ in range(count)]
    table = np.hstack([sums, lengths]).astype(float)  # (rows, 2 count); sums of whole numbers are exact
    rng, size = np.random.default_rng(seed), len(table)
    # How often a resample draws each row, times the table: (2 count,).
    draws = (np.bincount(rng.integers(size, size=size), minlength=size) for _ in range(RESAMPLES))
    totals = np.array([table.sum(0), *(times @ table for times in draws)])  # (1 + resamples, 2 count)
    value, *resampled = totals[:, :count] / np.maximum(totals[:, count:], 1)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)  # (count,) each
    rates = np.array([value, low, high]).T.tolist()
    rates = [rate if length else [None] * 3 for rate, length in zip(rates, totals[0, count:], strict=True)]
    return [dict(zip(("value", "low", "high"), rate, strict=True)) for rate in rates]


def headline(scores: dict) -> tuple[str, dict]:
    """
    Returns the name and the rate that tell the most of one of the scores of [`score`]: the metric that was asked for;
    the share of exact answers where they are classes or JSON; else the word error rate.
    """
    if metrics := scores.get("metrics"):
        return next(iter(metrics.items()))
    return (
        ("word error rate", scores["wer"]) if scores["kind"] == "text" else ("share of exact answers", scores["exact"])
    )


def list_always_wrong(scores: dict) -> list[str]:
    """Lists the classes, and the values of fields, of which no answer was right, each with how many there are."""
    wrong = [(name, count) for name, count in scores.get("always_wrong", {}).items()]
    for name, field_scores in scores.get("fields", {}).items():
        wrong += [(f"{name}={value}", count) for value, count in field_scores["always_wrong"].items()]
    return [f"{name}: 0 of {count}" for name, count in wrong]


def score_arms(predictions: dict[str, list[dict]], seed: int = 0) -> dict:
    """Scores what [`read_folder`] returns; see [`summarize_arms`]."""
    return summarize_arms({arm: [compare(row) for row in rows] for arm, rows in predictions.items()}, seed)


def summarize_arms(arms: dict[str, list[Comparison]], seed: int = 0) -> dict:
    """
    Returns `rule`, and `arms`: for each arm its scores over "all" rows, and over those of each group, if it has any.
    Raises a ValueError if a group is named "all".
    """
    scores = {}
    for arm, comparisons in arms.items():
        groups = {ALL: comparisons}
        for row in comparisons:
            group = row.prediction["group"]
            if group == ALL:
                raise ValueError(f"A group of {arm!r} is named {ALL!r}, as the scores over all rows are; rename it.")
            if group is not None:
                groups.setdefault(group, []).append(row)
        scores[arm] = {group: summarize(members, seed) for group, members in groups.items()}
    return {"rule": RULE, "arms": scores}


def read_predictions(path: str | Path) -> list[dict]:
    """
    Reads a file of predictions. A line has `row` (its number, from 0), `place` (its file and line), `group`,
    `audio_filepath`, `duration` and `time` (seconds, at most 10,000,000), `text` (the reference), and `pred_text` (the
    answer) or, if it failed, `error`. It may have `prompt` and `media`, the names of files, which the report shows.
    Raises a ValueError, which begins with file and line, if a line is no JSON object, lacks one of the other keys, has
    another type there, or has the `row` of a line before it.
    """
    rows, line_of = [], {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            rows.append(read_prediction(line, f"{path}:{number}"))
            row = rows[-1]["row"]
            first = line_of.setdefault(row, number)
            if first != number:
                advice = "`python -m evaluation predict` with the same arguments keeps the first of them."
                raise ValueError(f"{path}:{number}: row {row} is in line {first} too; expected each row once. {advice}")
    return rows


def read_prediction(line: bytes, place: str) -> dict:
    """Reads a line as [`read_predictions`] does; an error begins with the place."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: expected a JSON object in UTF-8; {error}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}.")
    if ("pred_text" in row) == ("error" in row):
        present = "both" if "error" in row else "neither"
        raise ValueError(f"{place}: expected `pred_text` or, if the row failed, `error`; there is {present}.")
    for name, (types, expected) in FIELDS.items():
        if name not in row:
            if name in OPTIONAL:
                continue
            raise ValueError(f"{place}: there is no `{name}`.")
        value = row[name]
        is_number = type(value) in (float, int)
        is_wrong = type(value) not in types or (is_number and not 0 <= value < math.inf)
        if is_wrong or (type(value) is list and not all(isinstance(part, str) for part in value)):
            shown = type(value).__name__ if isinstance(value, (list, dict)) else f"{value!r:.200}"
            raise ValueError(f"{place}: `{name}` must be {expected}, got {shown}.")
        if name in ("duration", "time") and is_number and value > MAX_SECONDS:
            raise ValueError(f"{place}: `{name}` must be at most {MAX_SECONDS:,} s, got {value!r:.200}.")
    return row


def file_of(arm: str) -> str:
    """The name of the file that holds the predictions of an arm."""
    return "predictions.jsonl" if arm == AS_GIVEN else f"predictions-{arm}.jsonl"


def read_folder(folder: str | Path) -> dict[str, list[dict]]:
    """
    Reads the predictions of all arms in a folder: predictions.jsonl is "as given", `predictions-NAME.jsonl` is NAME.
    Raises a ValueError if there is no predictions.jsonl, or a file is not as [`read_predictions`] needs it. Warns if
    the run that wrote them has not ended.
    """
    first, manifest = Path(folder) / file_of(AS_GIVEN), Path(folder) / "manifest.json"
    if not first.is_file():
        raise ValueError(f"{folder} has no {first.name}; expected the predictions that are scored.")
    if manifest.is_file() and json.loads(manifest.read_text(encoding="utf-8")).get("rows", 0) is None:
        logger.warning(f"{folder} is of a run that has not ended, so rows are missing; its command goes on with it.")
    others = sorted(first.parent.glob(file_of("?*")))
    names = [AS_GIVEN, *(path.stem.removeprefix("predictions-") for path in others)]
    return {name: read_predictions(path) for name, path in zip(names, [first, *others], strict=True)}


def table(scores: dict) -> str:
    """
    Shows what [`score_arms`] returns as a Markdown table: one line for each arm and group, no empty columns. The
    figures of a user's function come first, and the share of exact answers where they are classes or JSON.
    """
    everything = [score for groups in scores["arms"].values() for score in groups.values()]
    metrics = list(dict.fromkeys(name for score in everything for name in score.get("metrics", {})))
    is_text = any(score["kind"] == "text" for score in everything)
    answers = ["valid JSON %", "exact %"]
    rates = ["WER %", "macro WER %", "CER %", "ins/del/sub"]
    heads = [*metrics, *(rates + answers if is_text else answers + rates)]
    lines = [("arm", "group", "rows", "failed", "too long", *heads, "empty %", "repeating %", "nothing said", "RTFx")]
    for arm, groups in scores["arms"].items():
        for group, score in groups.items():
            silent, rtfx = score["nothing_said"], score["rtfx"]
            cells = {name: show(score.get("metrics", {}).get(name)) for name in metrics}
            cells |= {"valid JSON %": percent(score.get("valid_json")), "exact %": percent(score["exact"])}
            cells |= dict(zip(rates, map(percent, (score["wer"], score["macro_wer"], score["cer"])), strict=False))
            cells["ins/del/sub"] = "/".join(str(score[name]) for name in ("insertions", "deletions", "substitutions"))
            line = [arm, group, score["rows"], score["failed"], score.get("too_long", ""), *map(cells.get, heads)]
            line += [percent(score["empty"]), percent(score["repeating"])]
            line.append(f"{silent['answered']} of {silent['rows']} answered" if silent["rows"] else "")
            lines.append([*map(str, line), "" if rtfx is None else f"{rtfx:.1f}"])
    columns = []
    for head, *cells in zip(*lines, strict=True):
        if any(cells):
            cells = [" ".join(text.replace("|", "\\|").split()) for text in (head, *cells)]
            cells = [text.encode(errors="backslashreplace").decode() for text in cells]  # half of a surrogate pair
            width = max(map(len, cells))
            columns.append([cells[0].ljust(width), "-" * width, *(text.ljust(width) for text in cells[1:])])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in zip(*columns, strict=True))


def percent(rate: float | dict | None) -> str:
    """Shows a rate, with its interval if it has one; a rate of no rows is empty."""
    if isinstance(rate, dict):
        low, high = percent(rate["low"]), percent(rate["high"])
        return "" if rate["value"] is None else f"{percent(rate['value'])} [{low}, {high}]"
    return "" if rate is None else f"{100 * rate:.2f}"


def show(number: dict | None) -> str:
    """Shows a mean with its interval."""
    if number is None or number["value"] is None:
        return ""
    return f"{number['value']:.4g} [{number['low']:.4g}, {number['high']:.4g}]"


def summary(scores: dict) -> str:
    """The figures of all rows that tell the most, a line for each arm, and what is always wrong as given."""
    lines = []
    for arm, groups in scores["arms"].items():
        name, rate = headline(groups[ALL])
        value = show(rate) if "metrics" in groups[ALL] else f"{percent(rate)} %"
        lines.append(f"{arm}: {name} {value}")
    if wrong := list_always_wrong(scores["arms"][AS_GIVEN][ALL]):
        lines.append(f"always wrong: {', '.join(wrong)}")
    return "\n".join(lines)
