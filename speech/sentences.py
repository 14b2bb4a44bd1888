"""Chooses the English texts of clips: from WordNet, fortunes and templates, and strings of common words."""

import gzip
import json
import math
import random
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from demo.world import pick
from evaluation.scoring import normalize
from speech.sources import read_sources, words_of


LENGTHS = {"short": (1, 15), "middle": (16, 74), "long": (75, 145), "longer": (146, 290)}  # characters; 15 are a second
NUM_JOINED = {"long": 2, "longer": 5}  # sentences that make a text of this length
NUM_COMMON_WORDS = {"short": (2, 2), "middle": (3, 7), "long": (8, 12)}  # the least and the most in a string of words


class Mix(NamedTuple):
    """Says how the texts of training clips are chosen."""

    seconds: float  # length of the longest clip
    candidates: int  # how many texts are drawn at a time; the one with the rarest words so far is kept
    joined: list[str]  # sources of the sentences that are joined to long texts
    lengths: dict[str, float]  # how often a text has one of the `LENGTHS`
    shares: dict[str, dict[str, int]]  # how often a text of that length comes from each source


MIXES = json.loads(Path(__file__).with_name("mixes.json").read_text("utf-8"))
MIXES = {name: Mix(**mix) for name, mix in MIXES.items()}
HELD_OUT_SHARES = {"wordnet": 0.8, "fortune": 0.2}
HELD_OUT_PART = 20  # one of 20 texts is held out


class Text(NamedTuple):
    text: str
    source: str


def has_length(text: str, length: str) -> bool:
    return LENGTHS[length][0] <= len(text) <= LENGTHS[length][1]


def is_held_out(normalized: str) -> bool:
    """Whether a normalized text is held out from training; the seed does not matter."""
    return zlib.crc32(normalized.encode()) % HELD_OUT_PART == 0


def read_excluded(path: str | Path) -> set[str]:
    """Reads lines of the form "text" or "name: text", also from a .gz: the normalized texts and their sentences."""
    path = Path(path)
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    excluded = set()
    for line in data.decode("utf-8").splitlines():
        for text in (line, line.partition(": ")[2]):
            excluded.update(map(normalize, [text, *re.split(r"(?<=[.!?,;:])\s+", text)]))
    return excluded - {""}


def deal(count: int, seed: int, held_out: bool = False, exclude: Iterable[str] = (), mix: str = "rare") -> list[Text]:
    """
    Chooses the texts of `count` clips; the first ones do not depend on `count`. Normalized texts in `exclude` are never
    chosen. Held-out texts do not depend on the mix, one of `MIXES`.
    """
    dealer = Dealer(seed, held_out, frozenset(exclude), MIXES[mix])
    return [dealer.deal() for _ in range(count)]


class Dealer:
    def __init__(self, seed: int, held_out: bool, excluded: frozenset[str], mix: Mix):
        self.sources, self.rng, self.held_out, self.mix = read_sources(), random.Random(seed), held_out, mix
        self.excluded, self.dealt = excluded, set()
        self.times = dict.fromkeys(self.sources.common, 0)  # how often each common word was chosen
        self.by_length = {
            (name, length): [text for text in texts if has_length(text, length)]
            for name, texts in self.sources.texts.items()
            for length in mix.shares
        }
        self.for_held_out = {
            name: [text for text in self.sources.texts[name] if 3 <= len(text.split()) <= 20]
            for name in HELD_OUT_SHARES
        }

    def deal(self) -> Text:
        if self.held_out:
            source = pick(HELD_OUT_SHARES, self.rng)
            text = self.choose(lambda: self.rng.choice(self.for_held_out[source]))
        else:
            length = pick(self.mix.lengths, self.rng)
            source = pick(self.mix.shares[length], self.rng)
            text = self.choose(lambda: self.draw(source, length))
        for word in words_of(text):
            if word in self.times:
                self.times[word] += 1
        return Text(text, source)

    def choose(self, draw: Callable[[], str]) -> str:
        """Chooses a permitted text that is new; where hardly any is left, one that was chosen before."""
        candidates, wanted = {}, 1 if self.held_out else self.mix.candidates
        patience = 10 * self.mix.candidates * HELD_OUT_PART
        for attempt in range(2 * patience):
            text = draw()
            normalized = normalize(text)
            if self.is_permitted(normalized) and (normalized not in self.dealt or attempt > patience):
                candidates[text] = normalized
                if len(candidates) == wanted:
                    break
        text = max(candidates, key=self.rarity)
        self.dealt.add(candidates[text])
        return text

    def is_permitted(self, normalized: str) -> bool:
        return bool(normalized) and normalized not in self.excluded and is_held_out(normalized) == self.held_out

    def rarity(self, text: str) -> float:
        """
        The sum of 1 / (1 + times chosen) over the common words, divided by the root of the number of words. Divided by
        the number itself, phrases without words like "the" would win; without a division, the longest texts.
        """
        words = words_of(text)
        return sum(1 / (1 + self.times[word]) for word in words if word in self.times) / math.sqrt(len(words))

    def draw(self, source: str, length: str) -> str:
        """Draws a text of a source and a length for training; "" where joined sentences have another length."""
        if source in self.sources.texts:
            return self.rng.choice(self.by_length[source, length])
        if source == "joined":
            parts = [self.draw(self.rng.choice(self.mix.joined), "middle") for _ in range(NUM_JOINED[length])]
            text = " ".join(part[0].upper() + part[1:] + ("" if part[-1] in ".!?" else ".") for part in parts)
            fits = has_length(text, length) and all(self.is_permitted(normalize(part)) for part in parts)
            return text if fits else ""
        while True:
            text = self.string(length) if source == "strings" else self.sources.templates.make(source, self.rng)
            if has_length(text, length):
                return text

    def string(self, length: str) -> str:
        """Joins some common words: a third of those that are drawn, the rarest so far."""
        size = self.rng.randint(*NUM_COMMON_WORDS[length])
        words = self.rng.sample(self.sources.texts["word"], 3 * size)
        return " ".join(sorted(words, key=self.times.get)[:size])
