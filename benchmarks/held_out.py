"""
Asks the demo checkpoint about phrases that training never said or drew, by voices and at paces that it never used, and
again with the audio taken away. Needs the synthesizers that `demo/make.py` names.

    python -m benchmarks.held_out [--readme]
"""

import random
import tempfile
from pathlib import Path

import torch

import upload
from benchmarks.report import report
from demo.ask import DEMO, ask, load
from demo.world import HELD_OUT, PHRASES, QUESTIONS, SKILLS, Examples, cast, content, draw, say


CHANCE = {"transcribe": 1 / 51, "picture": 1 / 48, "agree": 1 / 2, "question": 1 / 3, "compare": 1 / 2}


def evaluate(folder: Path, questions: int, seed: int = 0) -> dict[str, list[float]]:
    """For each skill, the share of right answers: as asked, with silence for the clip, with another clip for it."""
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
        "| skill | instruction | right | clip silenced | another clip | chance |",
        "|---|---|---|---|---|---|",
    ]
    for skill, (right, *without) in shares.items():
        cells = [f"{share:.1%}" for share in (right, *without)] + [""] * (2 - len(without)) + [f"{CHANCE[skill]:.0%}"]
        rows.append(f"| {skill} | {SKILLS[skill]['instruction']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def measure(options) -> str:
    with tempfile.TemporaryDirectory() as folder:
        repo = upload.build(checkpoint=options.checkpoint, output=Path(folder) / "demo")
        return table(evaluate(repo, options.questions))


if __name__ == "__main__":
    options = {
        "--checkpoint": {"default": str(DEMO), "help": "default: the one of this repository"},
        "--questions": {"type": int, "default": 500, "help": "of each skill (default: 500)"},
    }
    report(__file__, __doc__, measure, options)
