"""Answers that are classes or JSON -> which of them are right; and functions of a user's own that score answers."""

import hashlib
import importlib.util
import json
import math
from collections import Counter
from collections.abc import Callable
from numbers import Real
from pathlib import Path


# When values are classes: the most classes, and the fewest rows for each class.
MOST_CLASSES, CLASS_ROWS = 20, 2
MISSING = "MISSING"  # stands for a field that an answer lacks; `spell` writes no text in capitals
OTHER = "other"
RULE = "JSON: all fields are equal; texts without case and surplus spaces, numbers by value"


def refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def read_fields(text: str) -> dict[str, str] | None:
    """
    Reads a text that is a JSON object as its fields by their path, such as `lamp.state`, with values in one spelling;
    None if it is no JSON object.
    """
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return None
    return dict(flatten(value, None)) if isinstance(value, dict) else None


def flatten(value, path: str | None):
    if isinstance(value, dict) and (value or path is None):
        for name, part in value.items():
            name = name.replace("\\", "\\\\").replace(".", "\\.")  # {"a.b": 1} is not {"a": {"b": 1}}
            yield from flatten(part, name if path is None else f"{path}.{name}")
    else:
        yield path, spell(value)


def spell(value, is_part: bool = False) -> str:
    """
    Writes a value in one way. A text has quotes if it is part of a list or dict, or could be one, a number or the like.
    """
    if isinstance(value, str):
        text = " ".join(value.casefold().split())
        quoted = json.dumps(text, ensure_ascii=False)
        if is_part or text.startswith(("[", "{", '"')):
            return quoted
        try:
            json.loads(text)
        except ValueError:
            return text
        return quoted
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return f"[{', '.join(spell(part, True) for part in value)}]"
    if isinstance(value, dict):
        parts = (f"{json.dumps(name, ensure_ascii=False)}: {spell(value[name], True)}" for name in sorted(value))
        return f"{{{', '.join(parts)}}}"
    return json.dumps(value)


def are_few(values: list[str]) -> bool:
    """Whether values are classes: at most 20 different ones, and at least twice as many in all."""
    return 0 < len(set(values)) <= MOST_CLASSES and len(values) >= CLASS_ROWS * len(set(values))


def confuse(pairs: list[tuple[str, str | None]]) -> dict:
    """
    Counts answers by reference: `counts[i][j]` of the pairs with `references[i]` have `answers[j]`, the last of which
    is "other". An answer of None, of a row that failed, is not counted.
    """
    classes = sorted({reference for reference, _ in pairs})
    index = {name: position for position, name in enumerate(classes)}
    counts = [[0] * (len(classes) + 1) for _ in classes]
    for reference, answer in pairs:
        if answer is not None:
            counts[index[reference]][index.get(answer, len(classes))] += 1
    return {"references": classes, "answers": [*classes, OTHER], "counts": counts}


def find_always_wrong(pairs: list[tuple[str, str | None]]) -> dict[str, int]:
    """Returns the references of two or more answers of which none is right, and how many each has."""
    answered = Counter(reference for reference, answer in pairs if answer is not None)
    right = {reference for reference, answer in pairs if answer == reference}
    return {name: count for name, count in sorted(answered.items()) if count >= CLASS_ROWS and name not in right}


def score_fields(rows: list[tuple[dict[str, str], dict[str, str] | None]]) -> dict[str, dict]:
    """
    Scores each field of JSON answers.

    Args:
        rows: What [`read_fields`] returns for the reference and for the answer.

    Returns:
        For each field of a reference or an answer: `rows`, how many references have it; `accuracy`, the share of right
        values among the rows in which either has it; `precision`, among the answers that have it; `recall`, among the
        references that have it; `always_wrong` as in [`find_always_wrong`]; and, if the values are classes,
        `confusion`. A rate of no rows is None.
    """
    rows = [(reference, answer or {}) for reference, answer in rows]
    scores = {}
    for name in dict.fromkeys(name for row in rows for fields in row for name in fields):
        pairs = [(reference[name], answer.get(name, MISSING)) for reference, answer in rows if name in reference]
        right = sum(reference == answer for reference, answer in pairs)
        answered = sum(name in answer for _, answer in rows)
        either = sum(name in reference or name in answer for reference, answer in rows)
        scores[name] = {
            "rows": len(pairs),
            "accuracy": right / either,
            "precision": right / answered if answered else None,
            "recall": right / len(pairs) if pairs else None,
            "always_wrong": find_always_wrong(pairs),
        }
        if are_few([reference for reference, _ in pairs]):
            scores[name]["confusion"] = confuse(pairs)
    return scores


class Metric:
    """
    A function of a user's own: reference and answer, as texts, -> a number, or numbers by name. It is written
    FILE:FUNCTION. A ValueError says why it cannot be loaded, or what else it returned.
    """

    def __init__(self, written: str):
        path, _, self.name = written.rpartition(":")
        if not path or not Path(path).is_file() or not self.name.isidentifier():
            raise ValueError(f"--metric must be FILE:FUNCTION, a Python file and a function in it, got {written}.")
        self.path = Path(path)
        spec = importlib.util.spec_from_file_location("metric", path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
        self.function: Callable = getattr(module, self.name, None)
        if not callable(self.function):
            raise ValueError(f"{path} has no function {self.name}.")

    def __call__(self, reference: str, answer: str) -> dict[str, float]:
        """Returns numbers by name: that of the function, or those that it returns."""
        try:
            value = self.function(reference, answer)
        except Exception as error:
            raise ValueError(
                f"{self.name} of {self.path} raised {type(error).__name__}: {error}; it was given the reference "
                f"{reference!r:.200} and the answer {answer!r:.200}."
            ) from error
        values = value if isinstance(value, dict) else {self.name: value}
        for name, number in values.items():
            if not isinstance(name, str) or not isinstance(number, Real) or not math.isfinite(number):
                raise ValueError(
                    f"{self.name} of {self.path} must return a number or a dict of numbers by name, none of them NaN "
                    f"or infinite, got {value!r:.200} for the answer {answer!r:.200}."
                )
        return {name: float(number) for name, number in values.items()}

    @property
    def facts(self) -> dict[str, str]:
        """Names the function and the content of its file."""
        return {
            "function": self.name,
            "file": self.path.name,
            "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest(),
        }
