"""
make test ONLY=tests/test_dialogues.py: conversations of two and three turns on one cache, drawn at random: batches,
clips, pictures, and a cache that was cropped or whose rows were selected or repeated. Each row equals itself alone,
computed without a cache.
"""

import copy
import random
from typing import NamedTuple

import pytest
import torch
from helpers import AUDIO, VISION, assert_close, audio, greedy_output, image, join, text, turn_inputs
from PIL import Image
from transformers import DynamicCache


DIALOGUES = 320
STEPS = 3  # tokens of an answer


class Row(NamedTuple):
    """A row as it is alone: the tokens that it attends to, in order, and the model inputs of its turns."""

    ids: list[int]
    types: list[int]
    turns: list[dict[str, torch.Tensor]]

    def alone(self) -> dict[str, torch.Tensor]:
        ids, types = torch.tensor([self.ids]), torch.tensor([self.types])
        return {"input_ids": ids, "mm_token_type_ids": types, **join(AUDIO + VISION, *self.turns)}


@pytest.fixture(scope="module")
def turns(processor, photo):
    """First and later turns, for each kind of audio tokens."""
    rng, picture = random.Random(0), Image.open(photo).convert("RGB")
    sizes = [(56, 56), (112, 56), (56, 140), (112, 84)]

    def clip():
        samples = round(16_000 * rng.choice([0.1, 0.5, 0.5, 1.0, rng.uniform(0.02, 2)]))
        noise = torch.randn(samples, generator=torch.Generator().manual_seed(rng.randrange(10**6)))
        return audio((0.3 * noise).numpy())

    def turn(audio_tokens: str, is_first: bool) -> dict[str, torch.Tensor]:
        content = [clip() for _ in range(rng.choice([0, 1, 1, 2]))]
        content += [image(picture.resize(rng.choice(sizes))) for _ in range(rng.choice([0, 0, 1]))]
        content.append(text(" ".join(rng.choices(["why", "and", "what", "stars", "seven"], k=rng.randrange(1, 6)))))
        rng.shuffle(content)
        return turn_inputs(processor, content, is_first, audio_tokens=audio_tokens)

    return {
        (kind, is_first): [turn(kind, is_first) for _ in range(20 if is_first else 30)]
        for kind in ("fixed", "trimmed")
        for is_first in (True, False)
    }


class Dialogue:
    """A batch of rows, their common layout with its padding, and the cache that they share."""

    def __init__(self, model, pool, rng: random.Random):
        self.model, self.pool, self.rng = model, pool, rng
        self.kind = rng.choice(["fixed", "trimmed"])
        self.rows = [Row([], [], []) for _ in range(rng.randrange(1, 4))]
        self.layout = torch.zeros(3, len(self.rows), 0, dtype=torch.long)  # ids, mask, types: [3, rows, places]
        self.cache, self.log = None, [self.kind]

    def add_turn(self):
        chosen = [self.rng.choice(self.pool[self.kind, self.cache is None]) for _ in self.rows]
        length = max(turn["input_ids"].shape[1] for turn in chosen)
        added = torch.zeros(3, len(self.rows), length, dtype=torch.long)
        for number, (row, turn) in enumerate(zip(self.rows, chosen, strict=True)):
            ids, types = turn["input_ids"], turn["mm_token_type_ids"]
            added[:, number, length - ids.shape[1] :] = torch.cat([ids, torch.ones_like(ids), types])
            row.ids.extend(ids[0].tolist())
            row.types.extend(types[0].tolist())
            row.turns.append(turn)
        self.layout = torch.cat([self.layout, added], dim=2)

    def add_answer(self, ids: torch.Tensor):
        """Some rows end before others; what `generate` puts after their end is not attended to later."""
        lengths = [self.rng.randrange(1, ids.shape[1] + 1) for _ in self.rows]
        mask = torch.tensor([[place < length for place in range(ids.shape[1])] for length in lengths]).long()
        self.layout = torch.cat([self.layout, torch.stack([ids, mask, torch.zeros_like(ids)])], dim=2)
        for row, own, length in zip(self.rows, ids.tolist(), lengths, strict=True):
            row.ids.extend(own[:length])
            row.types.extend([0] * length)

    def change_cache(self) -> int:
        """Crops the cache, or selects or repeats its rows. Returns the beams that the next turn needs."""
        change = self.rng.choice(["none", "crop", "select", "repeat", "beams"])
        self.log.append(change)
        if change == "crop":
            held = self.layout[2, :, : self.cache.get_seq_length()]
            pictures = ((held == 1) | (held == 2)).any(0).nonzero()  # only whole pictures could be given again
            self.cache.crop(-self.rng.randrange(1, held.shape[1] - (int(pictures[-1]) + 1 if len(pictures) else 1)))
        elif change == "select":
            chosen = [self.rng.randrange(len(self.rows)) for _ in range(self.rng.randrange(1, 4))]
            self.cache.batch_select_indices(torch.tensor(chosen))
            self.take_rows(chosen)
        elif change in ("repeat", "beams"):
            self.cache.batch_repeat_interleave(2)
            if change == "beams":
                return 2
            self.take_rows([number for number in range(len(self.rows)) for _ in range(2)])
        return 1

    def take_rows(self, chosen: list[int]):
        self.rows = [copy.deepcopy(self.rows[number]) for number in chosen]
        self.layout = self.layout[:, chosen]

    def continue_it(self, beams: int) -> torch.Tensor:
        """Gives the new turn to the model. Returns the logits that follow it, `(rows, vocabulary)`."""
        past = self.cache.get_seq_length() if self.cache else 0
        ids, mask, types = self.layout
        num_audio = sum((turn["mm_token_type_ids"] == 3).sum() for turn in self.last_turns)
        is_cut = bool((types[:, past:] == 3).sum() != num_audio)
        vision, audio_inputs = join(VISION, *self.last_turns), join(AUDIO, *self.last_turns)
        if beams == 1 and not is_cut and self.rng.random() < 0.4:
            self.log.append("forward")
            self.cache = self.cache or DynamicCache(config=self.model.config.get_text_config())
            inputs = {"input_ids": ids[:, past:], "attention_mask": mask, "mm_token_type_ids": types[:, past:]}
            inputs |= {"past_key_values": self.cache, **vision, **audio_inputs}
            logits = self.model(**inputs, logits_to_keep=1).logits[:, -1]
            self.add_answer(logits.argmax(-1, keepdim=True))
            return logits
        is_whole = is_cut or self.rng.random() < 0.5
        self.log.append("whole audio" if is_whole else "new audio")
        if is_whole:
            audio_inputs = join(AUDIO, *(turn for row in self.rows for turn in row.turns))
        inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types, **vision, **audio_inputs}
        output = greedy_output(self.model, inputs, STEPS, past_key_values=self.cache, num_beams=beams)
        self.cache = output.past_key_values
        self.add_answer(output.sequences[:, -STEPS:])
        return output.logits[0][::beams]

    @property
    def last_turns(self) -> list[dict[str, torch.Tensor]]:
        return [row.turns[-1] for row in self.rows]


@pytest.mark.parametrize("part", [0, 1, *(pytest.param(part, marks=pytest.mark.long) for part in range(2, 8))])
def test_each_row_equals_itself_alone(part, model, turns):
    for number in range(part, DIALOGUES, 8):
        rng = random.Random(number)
        dialogue = Dialogue(model, turns, rng)
        num_turns, beams = rng.choice([2, 3]), 1
        for turn in range(num_turns):
            if turn:
                beams = dialogue.change_cache()
            dialogue.add_turn()
            alone = [row.alone() for row in dialogue.rows]
            logits = dialogue.continue_it(beams)
            expected = torch.stack([model(**inputs, logits_to_keep=1).logits[0, -1] for inputs in alone])
            print(f"dialogue {number}, turn {turn}: {', '.join(dialogue.log)}")  # pytest shows it where a test fails
            assert_close(logits, expected, atol=2e-4)
            if beams > 1:  # its cache has the rows of beams
                break
