"""
Asks the demo checkpoints about phrases that training never said or drew, by voices and at paces that it never used,
and again with the audio taken away; with fixed and with trimmed audio tokens. Needs the synthesizers of `demo/make.py`.

    python -m benchmarks.held_out [--questions N_OF_EACH_SKILL] [--readme]
"""

import random
from collections.abc import Iterator

import torch

from benchmarks.report import report, table
from configuration_qwen2_audio_vl import AUDIO_TOKEN_COUNTS
from demo.ask import CHECKPOINTS, ask, load_demo
from demo.world import HELD_OUT, PHRASES, QUESTIONS, SKILLS, Examples, cast, content, draw, say


# The share that the best constant answer gets: one in ten clips to transcribe is a question.
CHANCE = {"transcribe": 0.9 / len(HELD_OUT), "picture": 1 / len(HELD_OUT), "agree": 1 / 2, "question": 1 / 3}
CHANCE["compare"] = 1 / 2
CONDITIONS = ("right", "clip silenced", "another clip")


def evaluate(processor, model, questions: int, seed: int = 0) -> Iterator[tuple[str, dict[tuple[str, str], float]]]:
    """Yields each skill with its shares of right answers, by kind of audio tokens and by the names in `CONDITIONS`."""
    rng, examples = random.Random(seed), Examples(HELD_OUT, PHRASES, seed)
    for skill, spec in SKILLS.items():
        asked = [examples.make(skill) for _ in range(questions)]  # texts that are said, what is drawn, the answer
        texts = [text for said, _, _ in asked for text in said]
        clips = iter(say(cast(texts, len(texts), rng, held_out=True)))
        sounds = [[next(clips) for _ in said] for said, _, _ in asked]
        pictures = [draw(drawn, rng) if drawn else None for _, drawn, _ in asked]
        others = say(cast(PHRASES + QUESTIONS, 200, rng, held_out=True))
        conditions = [sounds]
        if "audio" in spec["inputs"]:
            conditions.append([[torch.zeros(len(clip)) for clip in row] for row in sounds])
            conditions.append([[*row[:-1], rng.choice(others)] for row in sounds])
        shares = {}
        for name, rows in zip(CONDITIONS, conditions, strict=False):  # a picture alone has no clip to take away
            contents = [content(skill, row, picture) for row, picture in zip(rows, pictures, strict=True)]
            for audio_tokens in AUDIO_TOKEN_COUNTS:
                processor.audio_tokens = audio_tokens
                answers = ask(processor, model, contents)
                right = [answer == expected for answer, (*_, expected) in zip(answers, asked, strict=True)]
                shares[audio_tokens, name] = sum(right) / questions
        yield skill, shares


def main(questions: int = 500) -> list[str]:
    columns = [(audio_tokens, name) for audio_tokens in AUDIO_TOKEN_COUNTS for name in CONDITIONS]
    rows = []
    for base, checkpoint in CHECKPOINTS.items():
        processor, model = load_demo(checkpoint)
        model.float()  # many CPUs have no products of bfloat16
        for skill, shares in evaluate(processor, model, questions):
            cells = [f"{shares[column]:.1%}" if column in shares else "" for column in columns]
            rows.append((base, skill, *cells, f"{CHANCE[skill]:.0%}"))
    head = [f"{name}, {audio_tokens}" for audio_tokens, name in columns]
    return [table(("base", "skill", *head, "chance"), rows)]


if __name__ == "__main__":
    report(__file__, __doc__, main)
