"""
make test ONLY=tests/test_scoring.py: predictions -> scores. The texts in normalized.json are those of the leaderboard's
own normalizer, at the commit that open_asr_leaderboard.json names.
"""

import itertools
import json
import random
import re
import time
import zlib
from pathlib import Path

import jiwer
import numpy as np
import pytest
from data_rows import prediction, write_lines

from evaluation import leaderboard, scoring, tasks
from evaluation.report import score_folder
from evaluation.scoring import (
    align,
    compare,
    kind_of,
    normalize,
    read_folder,
    read_predictions,
    score,
    score_arms,
    table,
)


NORMALIZED = json.loads(Path(__file__).with_name("normalized.json").read_text(encoding="utf-8"))
PAIRS = [pytest.param(*pair, id=pair[0] or "nothing") for pairs in NORMALIZED.values() for pair in pairs.items()]

# reference, answer, and its (insertions, deletions, substitutions)
ERRORS = [
    ("the cat sat", "The cat sat.", (0, 0, 0)),
    ("the cat sat", "the cat", (0, 1, 0)),
    ("the cat sat", "the big cat sat", (1, 0, 0)),
    ("the cat sat", "the dog sat", (0, 0, 1)),
    ("the cat sat", "", (0, 3, 0)),
    ("the cat sat", "a dog ran off", (1, 0, 3)),
    ("white paper", "whitepaper", (0, 0, 0)),
    ("the bedroom is small", "the bed room is small", (0, 0, 0)),
    ("bed room", "bathroom", (0, 1, 1)),
    ("twenty dollars", "$20", (0, 0, 0)),
    ("um, it's colour", "it is color", (0, 0, 0)),
    ("B.B.C.", "b b c", (0, 0, 0)),
    ("press one to listen to...", "press 1 to listen to", (0, 1, 0)),
]


def rows(*pairs: tuple[str, str | None], group: str | None = None) -> list[dict]:
    return [prediction(text, answer, number, group) for number, (text, answer) in enumerate(pairs)]


@pytest.mark.parametrize(("text", "expected"), PAIRS)
def test_normalize(text, expected):
    assert normalize(text) == expected


def test_a_number_that_python_does_not_convert_stays_as_it_is():
    assert normalize("1" * 5_000) == "1" * 5_000


@pytest.mark.parametrize(("reference", "answer", "errors"), ERRORS)
def test_errors_of_a_row(reference, answer, errors):
    scores = score(rows((reference, answer)))
    assert (scores["insertions"], scores["deletions"], scores["substitutions"]) == errors
    assert scores["wer"] == dict.fromkeys(("value", "low", "high"), sum(errors) / scores["words"])
    pairs = align(normalize(reference), normalize(answer))
    assert sum(first == "" for first, _ in pairs) == errors[0]
    assert sum(second == "" for _, second in pairs) == errors[1]
    wrong = [pair for pair in pairs if all(pair) and pair[0].replace(" ", "") != pair[1].replace(" ", "")]
    assert len(wrong) == errors[2]
    assert " ".join(first for first, _ in pairs if first) == normalize(reference)
    assert " ".join(second for _, second in pairs if second) == normalize(answer)


def test_align():
    assert align("a white paper", "the whitepaper here") == [
        *(("a", "the"), ("white paper", "whitepaper"), ("", "here")),
    ]
    assert align("", "") == []


def test_rule_names_its_sources():
    assert scoring.RULE["normalizer"] == "English of huggingface/open_asr_leaderboard at d1e99b2"
    assert scoring.RULE["alignment"].startswith("kaldialign ")
    assert leaderboard.LEADERBOARD["source"]["licence"] == "Apache-2.0"


def sentences(number: int) -> list[tuple[str, str]]:
    """References of 5 to 14 words, and answers with a third of them wrong, that no rule of the normalizer changes."""
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "house", "garden", "river", "tree", "stone", "light"]  # no two of them make a third
    pairs = []
    for _ in range(number):
        reference = rng.choice(words, size=rng.integers(5, 15)).tolist()
        answer = [word for word in reference if rng.random() > 0.1]
        answer = [str(rng.choice(words)) if rng.random() < 0.2 else word for word in answer]
        pairs.append((" ".join(reference), " ".join(answer)))
    return pairs


def test_equals_jiwer_where_nothing_is_normalized():
    pairs = sentences(200)
    assert [normalize(text) for pair in pairs for text in pair] == [text for pair in pairs for text in pair]
    references, answers = map(list, zip(*pairs, strict=True))
    scores, expected = score(rows(*pairs)), jiwer.process_words(references, answers)
    assert scores["wer"]["value"] == pytest.approx(jiwer.wer(references, answers), abs=1e-12)
    assert scores["cer"]["value"] == pytest.approx(jiwer.cer(references, answers), abs=1e-12)
    assert scores["macro_wer"] == pytest.approx(np.mean([jiwer.wer(*pair) for pair in pairs]), abs=1e-12)
    assert scores["words"] == sum(len(reference.split()) for reference in references)
    # How errors fall on the three kinds is a matter of taste; their difference is not.
    errors = [scores[kind] for kind in ("insertions", "deletions", "substitutions")]
    assert errors[0] - errors[1] == expected.insertions - expected.deletions
    assert sum(errors) == expected.insertions + expected.deletions + expected.substitutions


def test_bootstrap_follows_from_the_seed():
    lines = rows(*sentences(30))
    scores, others = score(lines), score(lines, seed=1)
    assert scores == score(lines)
    for rate in ("wer", "cer"):
        assert scores[rate]["low"] < scores[rate]["value"] == others[rate]["value"] < scores[rate]["high"]
        assert scores[rate] != others[rate]


def test_bootstrap_is_that_of_the_binomial():
    pairs = [("yes", "yes")] * 300 + [("yes", "no")] * 100
    interval = score(rows(*pairs))["exact"]
    deviation = (0.75 * 0.25 / 400) ** 0.5
    assert interval["value"] == 0.75
    assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_failed_rows_are_counted_and_left_out():
    good = rows(("the cat sat", "the cat"), ("a dog", "a dog"))
    failed = [prediction("many words that nobody answered", None, number=2, duration=None, time=None)]
    with_failed, without = score(good + failed), score(good)
    assert (with_failed.pop("rows"), with_failed.pop("failed")) == (3, 1)
    assert (without.pop("rows"), without.pop("failed")) == (2, 0)
    assert with_failed == without


@pytest.mark.parametrize("failed", [[], rows(("the cat", None), ("um", None))], ids=["no rows", "all failed"])
def test_nothing_to_score(failed):
    scores = score(failed)
    assert (scores["rows"], scores["failed"], scores["words"]) == (len(failed), len(failed), 0)
    assert scores["wer"] == scores["cer"] == dict.fromkeys(("value", "low", "high"))
    assert [scores[name] for name in ("macro_wer", "rtfx", "empty", "repeating")] == [None] * 4
    assert scores["nothing_said"] == {"rows": 0, "answered": 0}
    assert scores["exact"] == scores["wer"] and "confusion" not in scores
    assert f"| {len(failed)} " in table(score_arms({"as given": failed}))


def test_where_nothing_is_said_no_error_is_counted():
    silent = rows(("", "thank you"), ("Um.", "uh"), ("[noise]", ""), ("ignore time segment in scoring", "the cat"))
    scores = score([*silent, *rows(("the cat sat", "the cat"), ("the dog", "hm"))])
    assert scores["nothing_said"] == {"rows": 4, "answered": 2}
    assert (scores["rows"], scores["words"], scores["insertions"], scores["deletions"]) == (6, 5, 0, 3)
    assert scores["empty"] == 0.5
    assert scores["macro_wer"] == pytest.approx((1 / 3 + 1) / 2)


def test_repeating_answers():
    speech = "And so, my fellow Americans, ask not what your country can do for you, ask what you can do for it."
    loop = "I'm going to go. " * 20
    for answer, expected in ((speech, False), (loop, True), ("", False), ("yes yes yes", False)):
        data = answer.encode()
        assert (len(data) / len(zlib.compress(data)) > 2.4) == scoring.is_repeating(answer) == expected
    assert score(rows((speech, speech), (speech, loop), ("", loop), (speech, "")))["repeating"] == 0.5
    assert not scoring.is_repeating("\ud83d")  # half of a surrogate pair, which JSON may hold


def test_rtfx():
    lengths = ((30.0, 0.5), (10, 1.5), (20.0, 0.5))
    timed = [prediction("a", "a", duration=duration, time=time) for duration, time in lengths]
    assert score(timed)["rtfx"] == pytest.approx(60 / 2.5)
    for unknown in ({"duration": None}, {"time": None}, {"time": 0.0}):
        assert score([*timed, prediction("c", "c", **unknown)])["rtfx"] is None


def test_closed_answers():
    pairs = [("Dog.", "dog"), ("dog", "a dog"), ("cat", "Cat!"), ("cat", "dog"), ("dog", None), ("", "dog")]
    scores = score(rows(*pairs))
    assert scores["exact"]["value"] == 0.5
    assert 0 <= scores["exact"]["low"] < 0.5 < scores["exact"]["high"] <= 1
    assert scores["always_wrong"] == {}
    assert scores["confusion"] == {
        "references": ["cat", "dog"],
        "answers": ["cat", "dog", "other"],
        "counts": [[1, 1, 0], [0, 1, 1]],
    }


@pytest.mark.parametrize(
    ("references", "closed"),
    [
        (["yes", "no"] * 2, True),
        (["yes", "no", "no"], False),  # fewer than two rows for each
        ([f"label {number}" for number in range(20)] * 2, True),
        ([f"label {number}" for number in range(21)] * 2, False),
        (["three whole words"] * 2, True),
        (["four words are many"] * 2, False),
        (["yes", "no", "", ""], False),
        (["", ""], False),
        ([], False),
    ],
)
def test_classes(references, closed):
    comparisons = [compare(row) for row in rows(*((name, "") for name in references))]
    assert kind_of(comparisons) == ("classes" if closed else "text")


def command(state: str, lamp="kitchen", level=1, **more) -> str:
    return json.dumps({"lamp": {"name": lamp, "state": state}, "level": level, **more})


def test_json_answers():
    """Fields are compared by value; what is no JSON object has none of them."""
    pairs = [
        (command("on"), '{"level": 1.0, "lamp": {"state": "ON ", "name": "Kitchen"}}'),
        (command("on"), command("on", "hall")),
        (command("off"), command("on")),
        (command("off"), command("on", extra=[1, "a"])),
        (command("off"), "turn it off"),
        (command("on"), None),
    ]
    scores = score(rows(*pairs))
    assert scores["kind"] == "json" and scores["valid_json"] == 0.8 and scores["exact"]["value"] == 0.2
    state = scores["fields"]["lamp.state"]
    assert (state["rows"], state["accuracy"], state["recall"], state["precision"]) == (5, 0.4, 0.4, 0.5)
    assert state["always_wrong"] == {"off": 3}
    assert state["confusion"] == {
        "references": ["off", "on"],
        "answers": ["off", "on", "other"],
        "counts": [[0, 2, 1], [0, 2, 0]],
    }
    extra = scores["fields"]["extra"]
    assert (extra["rows"], extra["accuracy"], extra["recall"], extra["precision"]) == (0, 0, None, 0)
    text = table(score_arms({"as given": rows(*pairs)}))
    assert text.index("valid JSON %") < text.index("exact %") < text.index("WER %")
    told = scoring.summary(score_arms({"as given": rows(*pairs)}))
    assert told.startswith("as given: share of exact answers 20.00 [")
    assert told.endswith("always wrong: lamp.state=off: 0 of 3")
    assert score(rows((command("on"), "{"), ("words", "words")))["kind"] == "text"
    assert score(rows(("{}", "{}"), ("{}", "[]")))["exact"]["value"] == 0.5
    json.dumps(scores, allow_nan=False)


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": NaN}', '"a"', "", '{"a": 1} .', "[" * 100_000, '{"a":' * 100_000])
def test_what_is_no_json_object(text):
    assert tasks.read_fields(text) is None


@pytest.mark.parametrize(
    "one, other, are_equal",
    [
        *((1, 1.0, True), (1, "1", False), (True, "true", False), ("A  b", "a b", True), (None, "null", False)),
        *(([1, "a"], [1.0, "A"], True), ([1, 2], [2, 1], False), ({}, [], False)),
        ([{"b": 1, "a": 2}], [{"a": 2, "b": 1}], True),
        *((["hall", "kitchen"], "[hall, kitchen]", False), (["salt, pepper"], ["salt", "pepper"], False)),
        *(({"a": {"b": 1}}, {"a.b": 1}, False), ({"a": 1}, {"": {"a": 1}}, False), ([["a"]], [["A"]], True)),
    ],
)
def test_values_are_compared(one, other, are_equal):
    first, second = (tasks.read_fields(json.dumps({"value": value})) for value in (one, other))
    assert (first == second) == are_equal


def test_a_field_that_an_answer_lacks_is_wrong():
    """Also where the right value is an empty text."""
    texts = ['{"room": "", "lamp": true}', '{"room": "", "lamp": true}']
    fields = [tasks.read_fields(text) for text in texts]
    scores = tasks.score_fields([(fields[0], fields[0]), (fields[1], None)])
    assert {name: each["accuracy"] for name, each in scores.items()} == {"room": 0.5, "lamp": 0.5}
    assert scores["room"]["precision"] == 1.0 and scores["room"]["recall"] == 0.5


METRIC = """
def by_name(reference, answer):
    return {answer: 1}

def overlap(reference, answer):
    return len(set(reference.split()) & set(answer.split()))

def several(reference, answer):
    return {"same": reference == answer, "length": len(answer)}

def wrong(reference, answer):
    return "much"

def broken(reference, answer):
    return 1 / 0
"""


def test_a_metric_of_the_user(tmp_path):
    (tmp_path / "own.py").write_text(METRIC)
    lines = rows(("a b", "a b"), ("a b", "c"), ("a b", None))
    for name, means in (
        ("overlap", {"overlap": 1.0}),
        ("several", {"same": 0.5, "length": 2.0}),
        ("by_name", {"a b": 1.0, "c": 1.0}),  # the mean over the rows that have the name
    ):
        metric = tasks.Metric(f"{tmp_path / 'own.py'}:{name}")
        scores = scoring.summarize_arms({"as given": [compare(row, metric) for row in lines]})
        figures = scores["arms"]["as given"]["all"]["metrics"]
        assert {name: figure["value"] for name, figure in figures.items()} == means
        first, *_ = figures
        assert f"as given: {first} " in scoring.summary(scores)
        head = table(scores).splitlines()[0]
        assert head.index(first) < head.index("WER %")
    for name, reason in (
        ("wrong", "must return a number or a dict of numbers by name"),
        ("broken", "raised ZeroDivisionError"),
    ):
        with pytest.raises(ValueError, match=reason):
            compare(lines[0], tasks.Metric(f"{tmp_path / 'own.py'}:{name}"))
    (tmp_path / "syntax.py").write_text("def")
    for written, reason in (
        ("own.py", "must be FILE:FUNCTION"),
        (f"{tmp_path / 'missing.py'}:overlap", "must be FILE:FUNCTION"),
        (f"{tmp_path / 'own.py'}:METRIC", "has no function METRIC"),
        (f"{tmp_path / 'syntax.py'}:a", "cannot be loaded: SyntaxError"),
    ):
        with pytest.raises(ValueError, match=reason):
            tasks.Metric(written)


def test_arms_and_groups():
    first = rows(("the cat sat", "the cat"), group="noisy | street") + rows(("a dog", "a dog"), group="clean")
    first += rows(("no group", "no group"))
    second = rows(("yes", "yes"), ("no", "yes"), ("yes", "yes"), ("no", "no"))
    scores = score_arms({"as given": first, "short": second}, seed=3)
    assert scores["rule"] == scoring.RULE
    assert list(scores["arms"]) == ["as given", "short"]
    assert list(scores["arms"]["as given"]) == ["all", "noisy | street", "clean"]
    assert list(scores["arms"]["short"]) == ["all"]
    assert scores["arms"]["as given"]["all"] == score(first, seed=3)
    assert scores["arms"]["as given"]["clean"] == score(first[1:2], seed=3)
    json.dumps(scores, allow_nan=False)
    with pytest.raises(ValueError, match="A group of 'as given' is named 'all'.*rename it"):
        score_arms({"as given": rows(("a", "b"), group="all")})


def test_table():
    first = rows(("the cat sat", "the cat"), group="noisy | street") + rows(("a dog", "a dog"), group="clean")
    second = rows(("yes", "yes"), ("no", "yes"), ("yes", "yes"), ("no", "no"), ("", "a"), ("no", None))
    text = table(score_arms({"as given": first, "short": second}))
    lines = text.splitlines()
    assert len({len(line.replace("\\|", "||")) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")] for line in lines]
    head = "arm|group|rows|failed|WER %|macro WER %|CER %|ins/del/sub|exact %|empty %|repeating %|nothing said|RTFx"
    assert "|".join(cells[0]) == head
    assert [line[:4] for line in cells[2:]] == [
        ["as given", "all", "2", "0"],
        ["as given", "noisy / street", "1", "0"],
        ["as given", "clean", "1", "0"],
        ["short", "all", "6", "1"],
    ]
    figures = "33.33 [33.33, 33.33]|33.33|36.36 [36.36, 36.36]|0/1/0|0.00 [0.00, 0.00]|0.00|0.00||5.6"
    assert "|".join(cells[3][4:]) == figures
    assert cells[5][8].startswith("75.00 [")
    assert cells[5][11] == "1 of 1 answered"
    without = table(score_arms({"as given": [prediction("the cat sat", "the cat", time=None)]}))
    assert not any(head in without for head in ("valid JSON", "nothing said", "RTFx"))
    assert table(score_arms({})) == ""
    assert "\\ud83d" in table(score_arms({"as given": rows(("a", "a"), group="\ud83d")}))


def test_read_folder(tmp_path, caplog):
    with pytest.raises(ValueError, match="has no predictions.jsonl"):
        read_folder(tmp_path)
    lines = [*rows(("straße", "strasse"), ("b", None)), prediction("c", "", number=7, duration=None, time=2)]
    write_lines(tmp_path / "predictions.jsonl", (json.dumps(line, ensure_ascii=False) for line in lines))
    write_lines(tmp_path / "predictions-short-prompt.jsonl", [lines[1]])
    write_lines(tmp_path / "predictions-beams.jsonl", [json.dumps(lines[0]).encode()])  # without a newline
    write_lines(tmp_path / "predictions-none.jsonl", [])
    write_lines(tmp_path / "other.jsonl", ["{"])
    arms = read_folder(tmp_path)
    assert list(arms) == ["as given", "beams", "none", "short-prompt"]
    assert arms == {"as given": lines, "beams": lines[:1], "none": [], "short-prompt": lines[1:2]}
    for rows_in_all, is_warned in ((3, False), (None, True)):
        (tmp_path / "manifest.json").write_text(json.dumps({"rows": rows_in_all}))
        read_folder(tmp_path)
        assert ("is of a run that has not ended" in caplog.text) == is_warned


WHOLE = json.dumps(prediction("a", "b", number=1))
DEEP = "[" * 500 + "]" * 500
WRONG_VALUES = [  # of a key, as JSON, and how an error shows them
    *(("row", value, "an int from 0", shown) for value, shown in (("true", "True"), ("1.0", "1.0"), ("-1", "-1"))),
    *(("duration", value, "seconds or null", shown) for value, shown in (('"10"', "'10'"), ("NaN", "nan"))),
    *(("duration", value, "at most 10,000,000 s", "1") for value in ("1e308", "1e12", "10000001", "1" + "0" * 400)),
    ("time", "1e8", "at most 10,000,000 s", "100000000.0"),
    ("time", "1e999", "seconds or null", "inf"),
    ("media", '"a.mp3"', "a list of strings or null", "'a.mp3'"),
    ("media", "[1]", "a list of strings or null", "list"),
    ("prompt", "[]", "a string or null", "list"),
    ("place", DEEP, "a string", "list"),
    ("pred_text", "null", "a string", "None"),
    ("error", "3", "a string", "3"),
    ("group", "3", "a string or null", "3"),
]


def wrong_line(name: str, value: str) -> str:
    """A line of predictions with another value, as JSON, under a key."""
    line = {key: part for key, part in json.loads(WHOLE).items() if key != ("pred_text" if name == "error" else name)}
    return f'{json.dumps(line)[:-1]}, "{name}": {value}}}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        *((line, "expected a JSON object in UTF-8") for line in ("{", "", b"\xff\n", "[" * 100_000)),
        (WHOLE[:-5].encode(), "expected a JSON object in UTF-8"),  # cut short, without a newline
        ("[1]", "expected a JSON object, got list"),
        (WHOLE.replace("pred_text", "answer"), "`pred_text` or, if the row failed, `error`; there is neither"),
        (WHOLE.replace("{", '{"error": "", '), "there is both"),
        *(
            (WHOLE.replace(f'"{name}"', '"other"'), f"there is no `{name}`")
            for name in ("row", "text", "group", "time")
        ),
        *(
            (wrong_line(name, value), f"`{name}` must be {need}, got {shown}")
            for name, value, need, shown in WRONG_VALUES
        ),
        (WHOLE.replace('"row": 1', '"row": 0'), "row 0 is in line 1 too; expected each row once"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = write_lines(tmp_path / "predictions.jsonl", [prediction("a", "b"), line])
    with pytest.raises(ValueError) as raised:
        read_predictions(path)
    assert str(raised.value).startswith(f"{path}:2: ")
    assert message in str(raised.value)
    with pytest.raises(ValueError, match="predictions.jsonl:2: "):
        read_folder(tmp_path)


def test_a_text_that_is_too_long_has_no_word_right():
    short, long = "the cat sat", "the cat sat " * 1_000
    many, wide = "1 " * 2_001, "ﷺ" * 600  # too many words; too many characters once they are normalized
    for answer in (long, many, wide):
        scores = score(rows((short, answer), (short, short)))
        assert (scores["too_long"], scores["deletions"], scores["words"]) == (1, 3, 6)
        assert (scores["wer"]["value"], scores["cer"]["value"], scores["empty"]) == (0.5, 0.5, 0)
    scores = score(rows((long, long), (long, None)))
    assert (scores["too_long"], scores["wer"]["value"], scores["words"]) == (1, 1, 3_000)
    assert score(rows(("yes" + " " * 20_000, "yes"), ("yes", "yes")))["exact"]["value"] == 0.5
    for reference in ("", " " * 20_000):
        scores = score(rows((reference, long)))
        assert (scores["too_long"], scores["nothing_said"]["answered"], scores["words"]) == (1, 1, 0)
    assert "| too long |" in table(score_arms({"as given": rows((short, long))}))
    assert "too_long" not in score(rows((short, short)))


HOSTILE_TEXTS = {
    "words": " ".join(f"w{number}" for number in range(8_000)),
    "as many words as are aligned": " ".join(f"{number:04}x" for number in range(1_666)),
    "characters": "abcdefgh" * 1_250,
    **{symbol: symbol * 40_000 for symbol in ("[", "<", "(", " ", "\n", "1", "[ ", "( ", "<(", "(a", ".", "'", "ﷺ")},
    **{f"short {symbol!r}": symbol * 10_000 for symbol in ("[", "<", "(", " ", "1", ".", "'", "ﷺ")},
    "closed once": "[" * 5_000 + "(" * 4_990 + "[)]",
    "closed": "(" * 5_000 + ")" * 5_000,
    "numbers": "one million and a half " * 400,
}


@pytest.mark.parametrize("name", HOSTILE_TEXTS)
def test_no_text_takes_long(name):
    """A row takes 0.6 s of one core at most; the limit leaves room for a busy machine."""
    text = HOSTILE_TEXTS[name]
    start = time.process_time()
    score(rows((text, text[::-1])))
    assert time.process_time() - start < 5


def test_unclosed_brackets_are_normalized_as_by_the_leaderboard():
    rng = np.random.default_rng(0)
    for _ in range(2_000):
        text = "".join(rng.choice(list("[]<>()()[ .'$1aum{"), size=rng.integers(20)))
        assert normalize(text) == " ".join(leaderboard.NORMALIZER(text).split())


def peak_memory() -> int:
    """MiB of this process, at most since its peak was set back."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024


def test_a_row_takes_little_memory():
    words = list(map("".join, itertools.product("bcdfghjk", repeat=4)))
    text, answer = " ".join(words[:2000]), " ".join(words[2000:4000])
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is in use
    before = peak_memory()
    assert not scoring.compare({"text": text, "pred_text": answer}).too_long
    align(text, answer)
    assert peak_memory() - before < 100


ODD_STRINGS = ["", "all", "\ud83d", "\x00", "½ﷺ", "$1¢1", "one " * 3_000, *(sign * 10_000 for sign in "[1x{")]
ODD_NUMBERS = [0, -1, 1, 1.5, True, 1e7, 1e8, 1e308, 5e-324, 10**400, float("nan"), float("inf")]
ODD_VALUES = [*ODD_NUMBERS, *ODD_STRINGS, None, [], [1], ["", [[]]], {}, {"a": None}]


def odd_string(rng: random.Random) -> str:
    words = ["one", "million", "and a half", "point", "(", "[", "<", "it's", "wi fi", "$", "%", "double", *ODD_STRINGS]
    return " ".join(rng.choices(words, k=rng.choice([1, 1, 5])))


def test_odd_rows_are_refused_or_scored(tmp_path):
    """A ValueError that names the line or the group, or finite scores and a page."""
    rng, scored = random.Random(0), 0
    manifest = {"model": {"name": "someone/a-model", "revision": None}, "data": [], "date": "2026-01-02"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    deep = "[" * 900 + "]" * 900
    start = time.process_time()
    for _ in range(150):
        lines = []
        for number in range(2):
            line = prediction("the cat sat", "a cat sat", number)
            line |= {name: odd_string(rng) for name in ("text", "pred_text", "group", "place") if rng.random() < 0.4}
            line |= {name: rng.choice(ODD_NUMBERS) for name in ("duration", "time") if rng.random() < 0.1}
            names = [*line, "error", "media", "prompt"]
            line |= {name: rng.choice(ODD_VALUES) for name in names if rng.random() < 0.05}
            text = json.dumps(line)
            lines.append(text.replace("{", f'{{"deep": {deep}, ', 1) if rng.random() < 0.05 else text)
        write_lines(tmp_path / "predictions.jsonl", lines)
        try:
            scores = score_folder(tmp_path)
        except ValueError as error:
            assert re.match(rf"{tmp_path}/predictions.jsonl:[12]: |A group of ", str(error))
            continue
        json.dumps(scores, allow_nan=False)
        table(scores)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert page.endswith("</html>\n") and len(page) < 1_000_000
        scored += 1
    assert 30 < scored < 120 and time.process_time() - start < 20
