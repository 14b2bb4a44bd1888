"""
Loads the demo checkpoint, asks it, and lists the examples in `demo/examples` that it is asked about.

    python -m demo.ask FILE    writes rows for `evaluation`: more questions about the same recordings and pictures
"""

import contextlib
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from demo.world import KINDS, WORLD, content
from evaluation.generate import load
from publishing.build import build
from publishing.paths import ROOT, replace_file


DEMO = ROOT / "demo"  # the checkpoint on Qwen2-VL
DEMO_NEWER = DEMO / "qwen3-vl"  # that on Qwen3-VL
CHECKPOINTS = {"Qwen2-VL": DEMO, "Qwen3-VL": DEMO_NEWER}
EXAMPLES = DEMO / "examples"
MAX_NEW_TOKENS = 12  # of the longest answer


@contextlib.contextmanager
def built_demo(checkpoint: Path = DEMO, **options) -> Iterator[Path]:
    """Yields a temporary folder with a demo checkpoint; `options` are those of `build`."""
    with tempfile.TemporaryDirectory() as folder:
        yield build(checkpoint=checkpoint, output=Path(folder) / "demo", **options)


def load_demo(checkpoint: Path = DEMO) -> tuple:
    """Loads `(processor, model)` of a demo checkpoint."""
    with built_demo(checkpoint) as repo:
        return load(repo)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict]) -> list[dict]:
    """Writes rows as JSON lines, and returns them. The file is there when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def user(items: list[dict]) -> list[dict]:
    """Returns a conversation of one message with these content items."""
    return [{"role": "user", "content": items}]


def ask(processor, model, contents: list[list[dict]]) -> list[str]:
    """Answers each content of a user's message greedily; all are one batch."""
    return processor.answer(model, [user(items) for items in contents], MAX_NEW_TOKENS)


def read_examples() -> list[dict]:
    """Each example has `skill`, `audio` (names of files), `said` (their texts), `image` (a file or None), `answer`."""
    return json.loads((EXAMPLES / "examples.json").read_text())


def content_of(example: dict) -> list[dict]:
    """Returns the content of a message that asks what the example asks, with paths of files."""
    picture = example["image"] and str(EXAMPLES / example["image"])
    return content(example["skill"], [str(EXAMPLES / name) for name in example["audio"]], picture)


def ask_example(processor, model, example: dict) -> str:
    return ask(processor, model, [content_of(example)])[0]


def row_of(example: dict) -> dict:
    """Returns a row of training data: the example's question and answer as messages."""
    return {"messages": [*user(content_of(example)), {"role": "assistant", "content": example["answer"]}]}


def transcription_examples() -> list[dict]:
    """Returns an example of the skill `transcribe` for each recording of an example."""
    return [
        {"skill": "transcribe", "audio": [name], "said": [text], "image": None, "answer": text}
        for example in read_examples()
        for name, text in zip(example["audio"], example["said"], strict=True)
    ]


def write_transcripts(path: Path) -> list[dict]:
    """Writes and returns a row of training data for each recording: the request to transcribe it, and its text."""
    return write_rows(path, [row_of(example) for example in transcription_examples()])


def write_questions(path: Path) -> list[dict]:
    """
    Writes and returns a row for every question that the examples' recordings and pictures can answer: each recording
    to transcribe, each picture to name, each spoken question about each picture, and the examples of two inputs.
    """
    transcripts = list({example["audio"][0]: example for example in transcription_examples()}.values())
    pictures = {e["image"]: e for e in read_examples() if e["skill"] == "picture"}.values()
    questions = []
    for spoken, picture in itertools.product(transcripts, pictures):
        if word := WORLD["questions"].get(spoken["answer"]):
            answer = picture["answer"].split()[KINDS.index(word)]
            questions.append({**spoken, "skill": "question", "image": picture["image"], "answer": answer})
    others = [example for example in read_examples() if example["skill"] in ("agree", "compare")]
    examples = [*transcripts, *pictures, *questions, *others]
    return write_rows(path, [{"skill": e["skill"], "said": e["said"], **row_of(e)} for e in examples])


if __name__ == "__main__":
    write_questions(Path(sys.argv[1]))
