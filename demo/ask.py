"""
Loads the demo checkpoint, asks it, and lists the examples that it is asked about: `demo/examples`.

    python -m demo.ask FILE    writes rows for eval.py: more questions about the same recordings and pictures
"""

import itertools
import json
import sys
from pathlib import Path

from transformers import AutoModel, AutoProcessor

from demo.world import KINDS, QUESTIONS, WORLD, content
from publishing.paths import ROOT


DEMO = ROOT / "demo"
EXAMPLES = DEMO / "examples"
BATCH = 50  # questions answered together


def load(folder: Path):
    """The processor and the model of a built folder."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return processor, AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()


def prepare(processor, messages: list):
    """Model inputs for the answer to a conversation, or to each of several."""
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )


def ask(processor, model, contents: list[list[dict]]) -> list[str]:
    """The greedy answers to messages of a user."""
    answers = []
    for start in range(0, len(contents), BATCH):
        batch = contents[start : start + BATCH]
        inputs = prepare(processor, [[{"role": "user", "content": items}] for items in batch])
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def read_examples() -> list[dict]:
    """Of every example `skill`, `audio` (names of files), what is `said`, `image` (a file or None) and `answer`."""
    return json.loads((EXAMPLES / "examples.json").read_text())


def content_of(example: dict) -> list[dict]:
    """The content of a user's message that asks what the example asks, by paths."""
    picture = example["image"] and str(EXAMPLES / example["image"])
    return content(example["skill"], [str(EXAMPLES / name) for name in example["audio"]], picture)


def ask_example(processor, model, example: dict) -> str:
    return ask(processor, model, [content_of(example)])[0]


def write_transcripts(path: Path) -> list[dict]:
    """Writes, and returns, a row to train on for every recording: a request to transcribe it, and what is said."""
    rows = []
    for example in read_examples():
        for name, said in zip(example["audio"], example["said"], strict=True):
            asked = content("transcribe", [str(EXAMPLES / name)], None)
            rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_questions(path: Path) -> list[dict]:
    """
    Writes, and returns, a row for every question that the examples' recordings and pictures have an answer to: each
    recording transcribed, each question about each picture, each picture alone and beside what was said of another.
    """
    examples, asked = read_examples(), []
    said = {name: text for example in examples for name, text in zip(example["audio"], example["said"], strict=True)}
    shows = {example["image"]: example["answer"] for example in examples if example["skill"] == "picture"}
    asked += [("transcribe", [name], None, text) for name, text in said.items()]
    asked += [("picture", [], name, phrase) for name, phrase in shows.items()]
    for (name, text), (image, phrase) in itertools.product(said.items(), shows.items()):
        if text in QUESTIONS:
            asked.append(("question", [name], image, phrase.split()[KINDS.index(WORLD["questions"][text])]))
    for example in examples:
        if example["skill"] in ("agree", "compare"):
            asked.append((example["skill"], example["audio"], example["image"], example["answer"]))
    rows = []
    for skill, sounds, image, answer in asked:
        items = content(skill, [str(EXAMPLES / name) for name in sounds], image and str(EXAMPLES / image))
        messages = [{"role": "user", "content": items}, {"role": "assistant", "content": answer}]
        rows.append({"skill": skill, "said": [said[name] for name in sounds], "messages": messages})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


if __name__ == "__main__":
    write_questions(Path(sys.argv[1]))
