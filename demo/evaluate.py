"""
Asks the demo checkpoint about phrases that training never said or drew, by voices and at paces that it never heard,
and again with the sound taken away: `python -m demo.evaluate`. `--readme` puts the table there.
"""

import argparse
import random
import tempfile
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

import upload
from benchmarks import readme
from demo.world import HELD_OUT, PHRASES, QUESTIONS, SKILLS, Examples, cast, content, draw, say


DEMO = Path(__file__).resolve().parent
CHANCE = {"transcribe": 1 / 51, "picture": 1 / 48, "agree": 1 / 2, "question": 1 / 3, "compare": 1 / 2}
BATCH = 50


def load(folder: Path):
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
        inputs = prepare(processor, [[{"role": "user", "content": content}] for content in batch])
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def evaluate(folder: Path, questions: int, seed: int = 0) -> dict[str, list[float]]:
    """For each skill, the share of right answers: as asked, with silence for the sound, with another clip for it."""
    processor, model = load(folder)
    rng, examples = random.Random(seed), Examples(HELD_OUT, PHRASES, seed)
    shares = {}
    for skill, spec in SKILLS.items():
        made = [examples.make(skill) for _ in range(questions)]
        texts = [text for said, _, _ in made for text in said]
        clips = iter(say(cast(texts, len(texts), rng, held_out=True)))
        sounds = [[next(clips) for _ in said] for said, _, _ in made]
        pictures = [draw(drawn, rng) if drawn else None for _, drawn, _ in made]
        others = say(cast(PHRASES + QUESTIONS, 200, rng, held_out=True))
        conditions = [sounds]
        if "audio" in spec["inputs"]:
            conditions.append([[torch.zeros(len(clip)) for clip in row] for row in sounds])
            conditions.append([[*row[:-1], rng.choice(others)] for row in sounds])
        shares[skill] = []
        for condition in conditions:
            asked = [content(skill, row, picture) for row, picture in zip(condition, pictures, strict=True)]
            given = ask(processor, model, asked)
            right = [text == expected for text, (*_, expected) in zip(given, made, strict=True)]
            shares[skill].append(sum(right) / questions)
    return shares


def table(shares: dict[str, list[float]]) -> str:
    rows = [
        "| skill | instruction | right | sound silenced | another clip | chance |",
        "|---|---|---|---|---|---|",
    ]
    for skill, (right, *without) in shares.items():
        cells = [f"{share:.1%}" for share in (right, *without)] + [""] * (2 - len(without)) + [f"{CHANCE[skill]:.0%}"]
        rows.append(f"| {skill} | {SKILLS[skill]['instruction']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(DEMO), help="default: the one of this repository")
    parser.add_argument("--questions", type=int, default=500, help="of each skill (default: 500)")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    options = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        shares = evaluate(upload.build(checkpoint=options.checkpoint, output=Path(folder) / "demo"), options.questions)
    text = table(shares)
    print(text)
    if options.readme:
        readme.fill("demo/evaluate.py", text + "\n")


if __name__ == "__main__":
    main()
