"""Rows of data -> questions, and what each arm asks instead of them."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from PIL import ImageOps

from audio_utils import MAX_SECONDS, SAMPLING_RATE
from collator import BadRow, ChatCollator, answer_text, content_of, place_of, prefix_errors, refuse_unreadable
from evaluation.scoring import ALL, AS_GIVEN


class Question(NamedTuple):
    """A row, ready to be asked, or the error that keeps it from being asked."""

    row: int
    place: str
    group: str | None = None
    messages: list[dict] = ()  # all but the answer; audio as samples at 16 kHz, pictures opened
    text: str = ""  # the expected answer
    transcripts: list[str] = ()  # one for each clip, where the data has them
    error: str | None = None

    def items(self, modality: str) -> list[dict]:
        contents = (message["content"] for message in self.messages if isinstance(message["content"], list))
        return [item for content in contents for item in content if item["type"] == modality]

    @property
    def clips(self) -> list[np.ndarray]:
        return [item["audio"] for item in self.items("audio")]

    @property
    def duration(self) -> float:
        """Seconds of all clips."""
        return sum(map(len, self.clips)) / SAMPLING_RATE

    @property
    def prompt(self) -> str:
        return " ".join(item["text"] for item in self.items("text"))

    def replace(self, modality: str, items: Iterator[dict]) -> "Question":
        """Puts other items in the place of those of a modality. Where `items` has no more, they are left out."""
        messages = []
        for message in self.messages:
            content = message["content"]
            if isinstance(content, list):
                content = [next(items, None) if item["type"] == modality else item for item in content]
                content = [item for item in content if item is not None]
            messages.append({**message, "content": content})
        return self._replace(messages=messages)

    def fail(self, error: str) -> "Question":
        return self._replace(messages=[], error=error)


class Questions:
    """
    Reads the rows of `evaluation.rows.load_rows` as questions; the columns are names or None. `max_seconds` is the
    limit of a clip.
    """

    def __init__(
        self,
        rows,
        collator: ChatCollator,
        group_column: str | None,
        transcript_column: str | None,
        max_seconds: float = MAX_SECONDS,
    ):
        self.rows, self.collator, self.max_seconds = rows, collator, max_seconds
        self.group_column, self.transcript_column = group_column, transcript_column

    def read(self, index: int, row: dict) -> Question:
        """Opens a row. Whatever is wrong with it becomes the `error` of its question."""
        place = place_of(row)
        question = Question(index, short_place(place))
        try:
            with prefix_errors(place):
                content = content_of(row)
                question = question._replace(group=read_group(content, self.group_column))
                *messages, answer = self.collator.messages({**content, "line": None, "place": place})
                text, transcripts = answer_text(answer["content"]), content.get(self.transcript_column)
                if transcripts is None and content.get("messages") is None:  # a recording with its transcript
                    transcripts = text
                return question._replace(
                    messages=self.open_messages(messages),
                    text=text,
                    transcripts=[transcripts] if isinstance(transcripts, str) else list(transcripts or []),
                )
        except BadRow as error:
            return question.fail(str(error).replace(place, question.place))

    @refuse_unreadable()
    def open_messages(self, messages: list[dict]) -> list[dict]:
        """Opens audio and pictures of normalized messages. Whatever a decoder raises becomes a ValueError."""
        for message in messages:
            if isinstance(message["content"], list):
                message["content"] = [self.open_item(item) for item in message["content"]]
        return messages

    def open_item(self, item: dict) -> dict:
        opened = self.collator.processor.open_item(item, max_seconds=self.max_seconds)
        if item["type"] == "audio":
            return {"type": "audio", "audio": opened["audio"].numpy()}
        if item["type"] == "image":
            return {"type": "image", "image": ImageOps.exif_transpose(opened["image"]).convert("RGB")}
        return opened

    def change(self, question: Question, arm: str) -> Question | None:
        """Returns what an arm asks instead; None if it would ask the same."""
        if arm == AS_GIVEN or question.error:
            return question
        if arm == "no-image":
            return question.replace("image", iter(())) if question.items("image") else None
        clips = question.clips
        if not clips:
            return None
        if arm == "silence":
            return question.replace("audio", ({"type": "audio", "audio": np.zeros_like(clip)} for clip in clips))
        if arm == "swapped":
            other = self.other(question)
            if other is None:
                return question.fail(f"{question.place}: no other row has a clip that says something else")
            return question.replace("audio", itertools.cycle(other.items("audio")))
        if len(question.transcripts) != len(clips):
            counts = f"{len(question.transcripts)} transcripts for {len(clips)} clips"
            need = "the arm `text` needs one for each, in the column that --transcript-column names"
            return question.fail(f"{question.place}: {counts}; {need}")
        return question.replace("audio", ({"type": "text", "text": text} for text in question.transcripts))

    def other(self, question: Question) -> Question | None:
        """Finds the next question of the same group in which something else is said."""
        for step in range(1, len(self.rows)):
            index = (question.row + step) % len(self.rows)
            other = self.read(index, self.rows[index])
            is_same = (other.transcripts or other.text) == (question.transcripts or question.text)
            if other.clips and other.group == question.group and not is_same:
                return other
        return None


def read_group(content: dict, column: str | None) -> str | None:
    """Returns the group of a row; raises ValueError if it has the name of the scores over all rows."""
    group = content.get(column)
    if str(group) == ALL:
        raise ValueError(f"the group is named {ALL!r}, as the scores over all rows are; rename it")
    return None if group is None else str(group)


def check_groups(rows: datasets.Dataset, column: str):
    """Raises [`BadRow`] if the group of a row cannot be scored. Other faults show when the row is asked."""
    for row in rows.select_columns([name for name in ("line", "place", column) if name in rows.column_names]):
        try:
            content = content_of(row)
        except (ValueError, RecursionError):
            continue
        with prefix_errors(place_of(row)):
            read_group(content, column)


def short_place(place: str) -> str:
    """The place of a row without the folders above a local file, which say nothing outside of this machine."""
    source, _, number = place.rpartition(":")
    return f"{Path(source).name}:{number}" if Path(source).exists() else place
