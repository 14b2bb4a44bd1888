"""
Asks the demo checkpoint about phrases that training never said or drew, by voices and at paces that it never used, and
again with the audio taken away; with fixed and with trimmed audio tokens. Needs the synthesizers of `demo/make.py`.

    python -m benchmarks.held_out [--readme]
"""

import itertools
import random
import tempfile
from pathlib import Path

import torch

from benchmarks.report import report
from configuration_qwen2_audio_vl import AUDIO_TOKEN_COUNTS
from demo.ask import DEMO, ask, load
from demo.world import HELD_OUT, PHRASES, QUESTIONS, SKILLS, Examples, cast, content, draw, say
from publishing.build import build


# The share that the best constant answer gets: one in ten clips to transcribe is a question.
CHANCE = {"transcribe": 0.9 / len(HELD_OUT), "picture": 1 / len(HELD_OUT), "agree": 1 / 2, "question": 1 / 3}
CHANCE["compare"] = 1 / 2


def evaluate(folder: Path, questions: int, seed: int = 0) -> dict[str, dict[str, list[float]]]:
    """
    For each skill and kind of audio tokens, the share of right answers: as asked, with silence for the clip, with
    another clip for it.
    """
    processor, model = load(folder)
    model.float()  # many CPUs have no products of bfloat16
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
        shares[skill] = {kind: [] for kind in AUDIO_TOKEN_COUNTS}
        for condition, (kind, found) in itertools.product(conditions, shares[skill].items()):
            processor.audio_tokens = kind
            asked = [content(skill, row, picture) for row, picture in zip(condition, pictures, strict=True)]
            given = ask(processor, model, asked)
            right = [text == expected for text, (*_, expected) in zip(given, made, strict=True)]
            found.append(sum(right) / questions)
    return shares


def table(shares: dict[str, dict[str, list[float]]]) -> str:
    heads = [f"{what}, {kind}" for kind in AUDIO_TOKEN_COUNTS for what in ("right", "clip silenced", "another clip")]
    rows = [f"| skill | instruction | {' | '.join(heads)} | chance |", "|---" * (len(heads) + 3) + "|"]
    for skill, kinds in shares.items():
        cells = [cell for found in kinds.values() for cell in [*(f"{share:.1%}" for share in found), "", ""][:3]]
        rows.append(f"| {skill} | {SKILLS[skill]['instruction']} | {' | '.join(cells)} | {CHANCE[skill]:.0%} |")
    return "\n".join(rows)


def measure(options) -> str:
    with tempfile.TemporaryDirectory() as folder:
        repo = build(checkpoint=options.checkpoint, output=Path(folder) / "demo")
        return table(evaluate(repo, options.questions))


if __name__ == "__main__":
    options = {
        "--checkpoint": {"default": str(DEMO), "help": "default: the one of this repository"},
        "--questions": {"type": int, "default": 500, "help": "of each skill (default: 500)"},
    }
    report(__file__, __doc__, measure, options)
