"""make test ONLY=tests/test_speech_figures.py: figures of the speech model from hand-made rows."""

from collections import Counter

from data_rows import prediction

from demo.ask import write_rows
from evaluation.scoring import AS_GIVEN, score, score_arms
from speech import figures


ROWS = [
    prediction("The mailbox is full.", "the mail box is empty", 0, "three or more words"),
    prediction("Press one for voicemail.", "Press 1 far.", 1, "three or more words"),
    prediction("Hello.", "", 2, "shorter"),
    prediction("Goodbye.", None, 3, "shorter"),
]


def test_words_are_counted_as_they_are_scored(tmp_path):
    for name, texts in {"a": ["The colour of the mailbox", ""], "b": ["Number one!"]}.items():
        write_rows(tmp_path / name, [{"text": text} for text in texts])
    assert figures.count_words([tmp_path / "a", tmp_path / "b"]) == Counter(
        {"the": 2, "color": 1, "of": 1, "mailbox": 1, "number": 1, "one": 1}
    )


def test_recall_by_how_often_training_said_a_word():
    training = Counter({"the": 5_000, "is": 100, "mailbox": 99, "full": 10, "one": 9, "press": 1, "for": 2})
    assert figures.recall(ROWS, training) == {
        "100 times or more": {"words": 2, "recalled": 2},
        "10 to 99 times": {"words": 2, "recalled": 1},  # a mail box is a mailbox; full is lost
        "1 to 9 times": {"words": 3, "recalled": 2},  # for is lost
        "never": {"words": 2, "recalled": 0},  # voicemail and hello; the failed row is left out
    }


def test_tables_have_a_line_for_each_group():
    silent = [prediction("", "you", 0, "hum"), prediction("", "", 1, "hum"), prediction("", ".", 2, "tone")]
    scores = {"silences": score_arms({AS_GIVEN: silent})}
    for folder in figures.SPOKEN:
        scores |= {name: score_arms({AS_GIVEN: ROWS}) for name in (folder, f"{folder}-whisper")}
    scores["silences-whisper"] = score_arms({AS_GIVEN: silent[::-1]})
    lines = figures.rates_table(scores).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    groups = ("all", "three or more words", "shorter")
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        f"| {clips}, {group}" for clips in ("a person", "synthetic voices, held out") for group in groups
    ]
    rate = "100.00 [100.00, 100.00]"
    assert lines[4] == f"| a person, shorter | 2 | {rate} | 0/1/0 | {rate} |"
    assert figures.silences_table(scores).splitlines()[2:] == [
        "| all | 3 | 1 | 1 |",
        "| hum | 2 | 1 | 1 |",
        "| tone | 1 | 0 | 0 |",
    ]
    silenced = [{**one, "pred_text": "well"} for one in ROWS[:3]]
    again = {AS_GIVEN: score(ROWS[2:]), "silence": score(silenced[2:])}
    assert figures.again_table({"recordings": again}).splitlines() == [
        f"| WER % | {AS_GIVEN} | silence |",
        "| --- | --- | --- |",
        f"| the first 2 of a person | {rate} | {rate} |",
    ]
