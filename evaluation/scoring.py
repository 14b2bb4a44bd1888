"""
Predictions -> scores: word and character error rates by the rule of the Open ASR Leaderboard
(https://github.com/huggingface/open_asr_leaderboard), and accuracy where the answers are classes. Needs no model.
"""

import json
import math
import re
import zlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import kaldialign
import numpy as np
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer


LEADERBOARD = json.loads(Path(__file__).with_name("open_asr_leaderboard.json").read_text(encoding="utf-8"))
RULE = {
    "normalizer": f"English of {LEADERBOARD['source']['repository']} at {LEADERBOARD['source']['commit'][:7]}",
    "alignment": f"kaldialign {metadata.version('kaldialign')}",
    "compounds": "words may be joined: white paper = whitepaper",
}

# References that the leaderboard does not score; the second one stands in the transcripts of TED-LIUM.
NOTHING_SAID = ("", "ignore time segment in scoring")

# The longest text that is aligned. Time and memory of an alignment grow with the square: these take a second and 80 MB.
MAX_CHARACTERS, MAX_WORDS = 10_000, 2_000
TOO_LONG = "(too long)"  # in the place of the answer then; no normalized text has brackets

RESAMPLES = 1_000
REPEATING = 2.4  # `compression_ratio_threshold` of openai/whisper's transcribe.py
CLOSED_CLASSES, CLOSED_WORDS, CLOSED_ROWS = 20, 3, 2  # at most, at most in each, at least for each

AS_GIVEN = "as given"  # the arm of predictions.jsonl
ALL = "all"  # the score of an arm over the rows of all groups

FIELDS = {  # of a line of predictions.jsonl: types, and what an error calls them
    "row": ((int,), "an int from 0"),
    "place": ((str,), "a string"),
    "group": ((str, type(None)), "a string or null"),
    "audio_filepath": ((str, type(None)), "a string or null"),
    "duration": ((float, int, type(None)), "seconds or null"),
    "time": ((float, int, type(None)), "seconds or null"),
    "text": ((str,), "a string"),
    "pred_text": ((str,), "a string"),
    "error": ((str,), "a string"),
    "prompt": ((str, type(None)), "a string or null"),
    "media": ((list, type(None)), "a list of strings or null"),
}
OPTIONAL = ("prompt", "media")  # what the report shows of a row where it is there
MAX_SECONDS = 10_000_000  # of `duration` and `time`: four months


class LeaderboardNormalizer(EnglishTextNormalizer):
    """
    Whisper's normalizer with what the leaderboard changes: more hesitations; `'s` is "is" only after pronouns and the
    like; compounds, names and acronyms have one spelling.
    """

    def __init__(self, rule: dict):
        super().__init__(rule["spellings"])
        self.ignore_patterns = rf"\b({'|'.join(rule['hesitations'])})\b"
        # In the place of Whisper's rule for every 's: the order of the replacers matters.
        is_rule = (rf"\b({'|'.join(rule['words_before_is'])})'s\b", r"\1 is")
        self.replacers = dict(is_rule if pair[0] == r"'s\b" else pair for pair in self.replacers.items())
        numbers, spellings = self.standardize_numbers, self.standardize_spellings

        def standardize_numbers(text: str) -> str:
            text = join_compounds(text, rule["compounds"])
            try:
                return numbers(text)
            except ValueError:  # of over 4,300 digits in a row, which Python does not convert: the leaderboard raises
                return text

        self.standardize_numbers = standardize_numbers
        self.standardize_spellings = lambda text: join_letters(replace_words(spellings(text), rule["names"]))


def join_compounds(text: str, compounds: dict[str, str]) -> str:
    for pattern, compound in compounds.items():
        text = re.sub(pattern, compound, text)
    return text


def replace_words(text: str, mapping: dict[str, str]) -> str:
    return " ".join(mapping.get(word, word) for word in text.split())


def join_letters(text: str) -> str:
    """Joins two or more single letters or digits in a row, three or more if "a" or "i", which are words, is there."""

    def join(found: re.Match) -> str:
        letters = found[0].split(" ")
        return "".join(letters) if len(letters) >= (3 if {"a", "i"} & set(letters) else 2) else found[0]

    return re.sub(r"(?<!\S)[^\W_](?: [^\W_])+(?!\S)", join, text)


NORMALIZER = LeaderboardNormalizer(LEADERBOARD)


def normalize(text: str) -> str:
    """The words that are compared, with one space between them."""
    text = text.encode("utf-8", errors="replace").decode()  # half of a surrogate pair, which JSON can hold
    text = re.sub(r"[<\[][^>\]]*[>\]]", "", mask_unclosed(text, "<[", ">]"))  # as Whisper does, which it then need not
    return " ".join(NORMALIZER(mask_unclosed(text, "(", ")")).split())


def mask_unclosed(text: str, opening: str, closing: str) -> str:
    """
    Puts another symbol in the place of brackets that nothing closes: the normalizer makes either a space, but it
    searches to the end of the text from each bracket.
    """
    end = 1 + max(text.rfind(bracket) for bracket in closing)
    return text[:end] + text[end:].translate(dict.fromkeys(map(ord, opening), "{"))


def normalize_short(text: str) -> str | None:
    """As [`normalize`]; None if the text is longer than 10,000 characters, or 2,000 words, before or after."""
    if len(text) > MAX_CHARACTERS:
        return None
    normalized = normalize(text)  # it can be 18 times as long
    return normalized if len(normalized) <= MAX_CHARACTERS and normalized.count(" ") < MAX_WORDS else None


def align(reference: str, given: str) -> list[tuple[str, str]]:
    """
    The words of two normalized texts in pairs, "" where a word is inserted or deleted. Words that are equal once they
    are joined are one pair without an error, such as ("white paper", "whitepaper").
    """
    return kaldialign.align(reference.split(), given.split(), "", merge_compounds=True)


@dataclass(frozen=True)
class Comparison:
    """One row: its reference and answer, and how far they are apart."""

    reference: str  # normalized, unless it is too long
    answer: str | None  # normalized; None if the row failed, TOO_LONG if it is not aligned
    repeating: bool = False
    too_long: bool = False  # to be aligned; no word counts as right
    duration: float | None = None  # seconds
    time: float | None = None  # seconds
    insertions: int = 0  # words
    deletions: int = 0
    substitutions: int = 0
    words: int = 0  # of the reference
    character_errors: int = 0
    characters: int = 0  # of the reference, spaces included

    @property
    def word_errors(self) -> int:
        return self.insertions + self.deletions + self.substitutions

    @property
    def correct(self) -> bool:
        return self.answer == self.reference


def compare(row: dict) -> Comparison:
    """One line of predictions.jsonl; see [`read_predictions`]."""
    reference = normalize_short(row["text"])
    too_long = reference is None
    if too_long:
        reference = " ".join(row["text"].split())
    if "error" in row:
        return Comparison(reference, None)
    answer = normalize_short(row["pred_text"])
    facts = {
        "repeating": is_repeating(row["pred_text"]),
        "duration": row.get("duration"),
        "time": row.get("time"),
    }
    if too_long or answer is None:
        words, characters = len(reference.split()), len(reference)
        return Comparison(
            reference,
            "" if answer == "" else TOO_LONG,
            too_long=True,
            deletions=words,
            words=words,
            character_errors=characters,
            characters=characters,
            **facts,
        )
    words = kaldialign.edit_distance(reference.split(), answer.split(), merge_compounds=True)
    characters = kaldialign.edit_distance(reference, answer)
    return Comparison(
        reference,
        answer,
        insertions=words["ins"],
        deletions=words["del"],
        substitutions=words["sub"],
        words=words["ref_len"],
        character_errors=characters["total"],
        characters=characters["ref_len"],
        **facts,
    )


def is_repeating(answer: str) -> bool:
    """Whether an answer compresses as only one that repeats itself does, by Whisper's rule."""
    data = answer.encode("utf-8", errors="replace")
    return len(data) / len(zlib.compress(data)) > REPEATING


def is_closed(references: list[str]) -> bool:
    """
    Whether normalized references are classes, so that accuracy says something: at most 20 different ones of at most 3
    words each, and at least twice as many rows. Empty references do not count.
    """
    said = [reference for reference in references if reference not in NOTHING_SAID]
    classes = set(said)
    return (
        0 < len(classes) <= CLOSED_CLASSES
        and all(len(name.split()) <= CLOSED_WORDS for name in classes)
        and len(said) >= CLOSED_ROWS * len(classes)
    )


def score(rows: list[dict], seed: int = 0) -> dict:
    """
    Scores of the rows of one arm, or of one group of it.

    Failed rows are counted, and left out of all the rest. Rows whose reference is empty once normalized, where nothing
    was said, are counted in `nothing_said`; like the leaderboard, the error rates leave them out. Only `repeating` and
    `rtfx` take them in. A rate of no rows is None.

    An answer or a reference of more than 10,000 characters or 2,000 words is not aligned: all words and characters of
    the reference count as deleted. A reference that is too long itself counts as it is written, not normalized.

    Args:
        rows: Lines of predictions.jsonl; see [`read_predictions`].
        seed: Of the bootstrap: the same rows and seed give the same intervals.

    Returns:
        `rows`, `failed`, `words` (of the references), `insertions`, `deletions` and `substitutions` (words): counts.
        `wer` and `cer`: errors divided by the length of the references in words and in characters with spaces;
            `value`, and `low` and `high`, the 95% interval of a percentile bootstrap over rows.
        `macro_wer`: the mean of the rows' own WER.
        `rtfx`: seconds of audio per second of time; None if a row lacks one of them, or if it is not finite.
        `empty`: the share of answers that are empty once normalized, though something was said.
        `repeating`: the share of answers that repeat themselves.
        `nothing_said`: `rows`, and how many of them are `answered` with a word.
        `too_long`: rows that are not aligned; not there if there are none.
        If the references are classes (see [`is_closed`]), `accuracy` (`value`, `low` and `high`): the share of rows
        whose normalized answer is the reference; and `confusion`: `counts[i][j]` rows of `references[i]` have
        `answers[j]`, the last of which is "other".
    """
    return summarize([compare(row) for row in rows], seed)


def summarize(comparisons: list[Comparison], seed: int) -> dict:
    answered = [row for row in comparisons if row.answer is not None]
    said = [row for row in answered if row.reference not in NOTHING_SAID]
    silent = [row for row in answered if row.reference in NOTHING_SAID]
    wer, cer, accuracy = intervals(
        errors=[(row.word_errors, row.character_errors, row.correct) for row in said],
        lengths=[(row.words, row.characters, 1) for row in said],
        seed=seed,
    )
    times = [(row.duration, row.time) for row in answered]
    timed = bool(times) and all(duration and time for duration, time in times)
    speed = sum(duration for duration, _ in times) / sum(time for _, time in times) if timed else math.inf
    scores = {
        "rows": len(comparisons),
        "failed": len(comparisons) - len(answered),
        "wer": wer,
        "cer": cer,
        "macro_wer": mean([row.word_errors / row.words for row in said]),
        "insertions": sum(row.insertions for row in said),
        "deletions": sum(row.deletions for row in said),
        "substitutions": sum(row.substitutions for row in said),
        "words": sum(row.words for row in said),
        "rtfx": speed if speed < math.inf else None,
        "empty": mean([row.answer == "" for row in said]),
        "repeating": mean([row.repeating for row in answered]),
        "nothing_said": {"rows": len(silent), "answered": sum(row.answer != "" for row in silent)},
    }
    if too_long := sum(row.too_long for row in answered):
        scores["too_long"] = too_long
    if is_closed([row.reference for row in comparisons]):  # failed ones too: the same for all arms
        scores |= {"accuracy": accuracy, "confusion": confuse(comparisons)}
    return scores


def mean(values: list) -> float | None:
    return sum(values) / len(values) if values else None


def intervals(errors: list[tuple], lengths: list[tuple], seed: int) -> list[dict]:
    """
    Sums of errors divided by sums of lengths, with the 95% interval of a percentile bootstrap over rows.

    Args:
        errors, lengths: (rows, 3), for three rates that share their resamples.
    """
    if not errors:
        return [{"value": None, "low": None, "high": None} for _ in range(3)]
    table = np.hstack([errors, lengths]).astype(float)  # (rows, 6); sums of whole numbers are exact
    rng, size = np.random.default_rng(seed), len(table)
    # How often a resample draws each row, times the table: (6,).
    draws = (np.bincount(rng.integers(size, size=size), minlength=size) for _ in range(RESAMPLES))
    sums = np.array([table.sum(0), *(times @ table for times in draws)])  # (1 + resamples, 6)
    value, *rates = sums[:, :3] / sums[:, 3:]
    low, high = np.quantile(rates, [0.025, 0.975], axis=0)  # (3,) each
    return [
        {"value": float(of_all), "low": float(least), "high": float(most)}
        for of_all, least, most in zip(value, low, high, strict=True)
    ]


def confuse(comparisons: list[Comparison]) -> dict:
    classes = sorted({row.reference for row in comparisons} - set(NOTHING_SAID))
    index = {name: position for position, name in enumerate(classes)}
    counts = [[0] * (len(classes) + 1) for _ in classes]
    for row in comparisons:
        if row.answer is not None and row.reference in index:
            counts[index[row.reference]][index.get(row.answer, len(classes))] += 1
    return {"references": classes, "answers": [*classes, "other"], "counts": counts}


def score_arms(predictions: dict[str, list[dict]], seed: int = 0) -> dict:
    """
    Scores of several arms, such as the same rows with other prompts.

    Returns:
        `rule`: [`RULE`]. `arms`: for each arm its scores over "all" rows, and over those of each group, if it has any.

    Raises:
        ValueError: if a group is named "all".
    """
    arms = {}
    for arm, rows in predictions.items():
        comparisons = [compare(row) for row in rows]
        arms[arm] = {ALL: summarize(comparisons, seed)}
        groups = [row.get("group") for row in rows]
        if ALL in groups:
            raise ValueError(f"A group of {arm!r} is named {ALL!r}, as the scores over all rows are; rename it.")
        for group in dict.fromkeys(group for group in groups if group is not None):
            members = [row for row, name in zip(comparisons, groups, strict=True) if name == group]
            arms[arm][group] = summarize(members, seed)
    return {"rule": RULE, "arms": arms}


def read_predictions(path: str | Path) -> list[dict]:
    """
    The lines of a file of predictions: `row` (its number, from 0), `place` (its file and line), `group`,
    `audio_filepath`, `duration` and `time` (seconds, at most 10,000,000), `text` (the reference), and `pred_text` (the
    answer) or, if it failed, `error`. A line may have `prompt` and `media`, the names of files, which the report shows.

    Raises:
        ValueError: if a line is no JSON object, lacks one of the other keys, has another type there, or has the `row`
            of a line before it. The message begins with file and line.
    """
    rows, seen = [], {}
    lines = Path(path).read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()  # what follows the last newline
    for number, line in enumerate(lines, start=1):
        row = read_prediction(line, f"{path}:{number}")
        if row["row"] in seen:
            raise ValueError(
                f"{path}:{number}: row {row['row']} is in line {seen[row['row']]} too; expected each row once. "
                "`python -m evaluation predict` with the same arguments keeps the first of them."
            )
        seen[row["row"]] = number
        rows.append(row)
    return rows


def read_prediction(line: bytes, place: str) -> dict:
    """
    A line of a file of predictions; see [`read_predictions`].

    Raises:
        ValueError: if it is not as it has to be; the message begins with the place.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: expected a JSON object in UTF-8; {error}.") from error
    check_prediction(row, place)
    return row


def check_prediction(row, place: str):
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}.")
    if ("pred_text" in row) == ("error" in row):
        found = "both" if "error" in row else "neither"
        raise ValueError(f"{place}: expected `pred_text` or, if the row failed, `error`; there is {found}.")
    optional = (*OPTIONAL, "pred_text" if "error" in row else "error")
    for name, (types, expected) in FIELDS.items():
        if name not in row:
            if name in optional:
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


def file_of(arm: str) -> str:
    """The name of the file that holds the predictions of an arm."""
    return "predictions.jsonl" if arm == AS_GIVEN else f"predictions-{arm}.jsonl"


def read_folder(folder: str | Path) -> dict[str, list[dict]]:
    """
    The predictions of all arms in a folder: predictions.jsonl is the arm "as given", `predictions-NAME.jsonl` is NAME.

    Raises:
        ValueError: if there is no predictions.jsonl, or a file is not as [`read_predictions`] needs it.
    """
    first = Path(folder) / file_of(AS_GIVEN)
    if not first.is_file():
        raise ValueError(f"{folder} has no {first.name}; expected the predictions that are scored.")
    others = sorted(first.parent.glob(file_of("?*")))
    return {AS_GIVEN: read_predictions(first)} | {
        path.stem.removeprefix("predictions-"): read_predictions(path) for path in others
    }


COLUMNS = {  # of the table: head -> what a cell says of a score
    "rows": lambda scored: f"{scored['rows']}",
    "failed": lambda scored: f"{scored['failed']}",
    "too long": lambda scored: str(scored.get("too_long", "")),
    "WER %": lambda scored: percent(scored["wer"]),
    "macro WER %": lambda scored: percent(scored["macro_wer"]),
    "CER %": lambda scored: percent(scored["cer"]),
    "ins/del/sub": lambda scored: "/".join(str(scored[name]) for name in ("insertions", "deletions", "substitutions")),
    "accuracy %": lambda scored: percent(scored.get("accuracy")),
    "empty %": lambda scored: percent(scored["empty"]),
    "repeating %": lambda scored: percent(scored["repeating"]),
    "nothing said": lambda scored: answered_nothing(scored["nothing_said"]),
    "RTFx": lambda scored: "" if scored["rtfx"] is None else f"{scored['rtfx']:.1f}",
}


def table(scores: dict) -> str:
    """What [`score_arms`] returns, as a Markdown table: one line for each arm and group; no empty columns."""
    lines = [("arm", "group", *COLUMNS)]
    for arm, groups in scores["arms"].items():
        lines += [(arm, group, *(cell(score) for cell in COLUMNS.values())) for group, score in groups.items()]
    columns = []
    for head, *cells in zip(*lines, strict=True):
        if any(cells):
            cells = [" ".join(text.replace("|", "\\|").split()) for text in (head, *cells)]
            cells = [text.encode(errors="backslashreplace").decode() for text in cells]  # half of a surrogate pair
            width = max(map(len, cells))
            columns.append([cells[0].ljust(width), "-" * width, *(text.ljust(width) for text in cells[1:])])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in zip(*columns, strict=True))


def percent(rate: float | dict | None) -> str:
    """A rate, with its interval if it has one; empty for one of no rows."""
    if isinstance(rate, dict):
        low, high = percent(rate["low"]), percent(rate["high"])
        return "" if rate["value"] is None else f"{percent(rate['value'])} [{low}, {high}]"
    return "" if rate is None else f"{100 * rate:.2f}"


def answered_nothing(counts: dict) -> str:
    return f"{counts['answered']} of {counts['rows']} answered" if counts["rows"] else ""
