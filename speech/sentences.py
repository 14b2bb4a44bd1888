"""
English texts to be said: examples, definitions and phrases of WordNet, fortunes, templates and strings of words.

    python -m speech.sentences --stats [--rows FILE ...]
"""

import argparse
import gzip
import json
import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from evaluation.scoring import normalize
from speech.sources import read_sources, words_of


SHORT, MIDDLE, LONG, LONGER = (1, 15), (16, 74), (75, 145), (146, 290)  # characters; 15 are said in a second
NUM_JOINED = {LONG: 2, LONGER: 5}  # sentences that are joined to a text so long


class Mix(NamedTuple):
    """
    Which texts are said in training.

    Attributes:
        seconds: The longest clip.
        candidates: Of so many texts that one is said whose words were said the least.
        joined: What the sentences that are joined come from.
        lengths: How often a text has so many characters.
        shares: How often it then comes from each source.
    """

    seconds: float
    candidates: int
    joined: tuple[str, ...]
    lengths: dict[tuple[int, int], float]
    shares: dict[tuple[int, int], dict[str, int]]


RARE = Mix(
    seconds=10.0,
    candidates=5,
    joined=("wordnet", "wordnet", "definition"),
    lengths={SHORT: 0.33, MIDDLE: 0.39, LONG: 0.28},
    shares={
        SHORT: {"word": 30, "phrase": 22, "wordnet": 16, "number": 18, "strings": 8, "letters": 2, "statement": 4},
        MIDDLE: {
            **{"wordnet": 42, "definition": 16, "strings": 14, "fortune": 4, "instruction": 6, "question": 6},
            **{"statement": 6, "number": 5, "letters": 1},
        },
        LONG: {"wordnet": 22, "definition": 16, "strings": 6, "fortune": 10, "joined": 54},
    },
)
PLAIN = Mix(
    seconds=10.0,
    candidates=1,
    joined=("wordnet", "wordnet", "wordnet", "fortune"),
    lengths={SHORT: 0.2, MIDDLE: 0.55, LONG: 0.25},
    shares={
        SHORT: {"wordnet": 40, "phrase": 20, "number": 15, "word": 10, "statement": 10, "letters": 5},
        MIDDLE: {
            **{"wordnet": 60, "fortune": 8, "instruction": 8, "question": 8, "statement": 8, "number": 5},
            **{"definition": 2, "letters": 1},
        },
        LONG: {"joined": 70, "fortune": 15, "wordnet": 10, "definition": 5},
    },
)
LENGTHY = PLAIN._replace(
    seconds=20.0,
    lengths={SHORT: 0.2, MIDDLE: 0.4, LONG: 0.15, LONGER: 0.25},
    shares=PLAIN.shares | {LONGER: {"joined": 100}},
)
LENGTHIER = LENGTHY._replace(lengths={SHORT: 0.1, MIDDLE: 0.2, LONG: 0.2, LONGER: 0.5})
MIXES = {"rare": RARE, "plain": PLAIN, "lengthy": LENGTHY, "lengthier": LENGTHIER}
HELD_OUT_SHARES = {"wordnet": 0.8, "fortune": 0.2}
HELD_OUT_PART = 20  # one text of so many


class Text(NamedTuple):
    text: str
    source: str


def is_held_out(normalized: str) -> bool:
    """Whether a normalized text belongs to what training never says, whatever the seeds."""
    return zlib.crc32(normalized.encode()) % HELD_OUT_PART == 0


def read_excluded(path: str | Path) -> set[str]:
    """
    The normalized texts of a file, of one text or `name: text` a line, and the sentences of each; it may be a .gz.
    """
    path = Path(path)
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    excluded = set()
    for line in data.decode("utf-8").splitlines():
        for text in (line, line.partition(": ")[2]):
            excluded.update(map(normalize, [text, *re.split(r"(?<=[.!?,;:])\s+", text)]))
    return excluded - {""}


def deal(count: int, seed: int, held_out: bool = False, exclude: Iterable[str] = (), mix: Mix = RARE) -> list[Text]:
    """
    The texts of `count` clips; the first ones do not depend on `count`.

    Args:
        exclude: Normalized texts that must not be said.
        mix: Of what is said in training; what is held out has its own.
    """
    dealer = Dealer(seed, held_out, frozenset(exclude), mix)
    return [dealer.deal() for _ in range(count)]


class Dealer:
    def __init__(self, seed: int, held_out: bool = False, excluded: frozenset[str] = frozenset(), mix: Mix = RARE):
        self.sources, self.rng, self.held_out, self.mix = read_sources(), random.Random(seed), held_out, mix
        self.excluded, self.dealt = excluded, set()
        self.said = dict.fromkeys(self.sources.common, 0)
        self.by_length = {
            (name, length): [text for text in texts if length[0] <= len(text) <= length[1]]
            for name, texts in self.sources.texts.items()
            for length in mix.shares
        }
        self.general = {
            name: [text for text in self.sources.texts[name] if 3 <= len(text.split()) <= 20]
            for name in HELD_OUT_SHARES
        }

    def deal(self) -> Text:
        if self.held_out:
            source = self.rng.choices(list(HELD_OUT_SHARES), HELD_OUT_SHARES.values())[0]
            text = self.take(lambda: self.rng.choice(self.general[source]))
        else:
            length = self.rng.choices(list(self.mix.lengths), self.mix.lengths.values())[0]
            shares = self.mix.shares[length]
            source = self.rng.choices(list(shares), shares.values())[0]
            text = self.take(lambda: self.draw(source, length))
        for word in words_of(text):
            if word in self.said:
                self.said[word] += 1
        return Text(text, source)

    def take(self, draw) -> str:
        """A text that may be said and was not dealt yet; where there are hardly any left, one that was."""
        found, candidates = {}, self.mix.candidates
        for attempt in range(20 * candidates * HELD_OUT_PART):
            text = draw()
            normalized = normalize(text)
            if self.may_say(normalized) and (normalized not in self.dealt or attempt > 10 * candidates * HELD_OUT_PART):
                found[text] = normalized
                if self.held_out or len(found) == candidates:
                    break
        text = max(found, key=self.rarity)
        self.dealt.add(found[text])
        return text

    def may_say(self, normalized: str) -> bool:
        return bool(normalized) and normalized not in self.excluded and is_held_out(normalized) == self.held_out

    def rarity(self, text: str) -> float:
        """
        The sum of 1 / (1 + times said) over the common words, divided by the root of the number of words: divided by
        the number itself it would prefer phrases without words like "the", not at all divided the longest texts.
        """
        words = words_of(text)
        return sum(1 / (1 + self.said[word]) for word in words if word in self.said) / math.sqrt(len(words))

    def draw(self, source: str, length: tuple[int, int]) -> str:
        """Any text of a source with so many characters, for training."""
        if source in self.sources.texts:
            return self.rng.choice(self.by_length[source, length])
        if source == "joined":
            parts = [self.draw(self.rng.choice(self.mix.joined), MIDDLE) for _ in range(NUM_JOINED[length])]
            text = " ".join(part[0].upper() + part[1:] + ("" if part[-1] in ".!?" else ".") for part in parts)
            fits = length[0] <= len(text) <= length[1] and all(self.may_say(normalize(part)) for part in parts)
            return text if fits else ""
        while True:
            text = self.string(length) if source == "strings" else self.sources.templates.make(source, self.rng)
            if length[0] <= len(text) <= length[1]:
                return text

    def string(self, length: tuple[int, int]) -> str:
        """Some of the common words, those that were said the least."""
        size = self.rng.randint(*{SHORT: (2, 2), MIDDLE: (3, 7), LONG: (8, 12)}[length])
        words = self.rng.sample(self.sources.texts["word"], 3 * size)
        return " ".join(sorted(words, key=self.said.get)[:size])


def table(texts: Iterable[str]) -> str:
    """A Markdown table of how often texts say the common words."""
    texts = list(texts)
    counts = Counter(word for text in texts for word in words_of(text))
    times = [counts[word] for word in read_sources().common]
    ranges = {"0": (0, 0), "1-9": (1, 9), "10-99": (10, 99), "100+": (100, 10**9)}
    rows = {"texts": len(texts), "distinct texts": len(set(texts)), "words": sum(counts.values())}
    rows |= {"distinct words": len(counts), "of these common": sum(map(bool, times))}
    rows |= {f"common, said {name}": sum(low <= n <= high for n in times) for name, (low, high) in ranges.items()}
    return "\n".join(["| what | count |", "|---|---|", *(f"| {name} | {count:,} |" for name, count in rows.items())])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stats", action="store_true", required=True, help="print tables of the texts")
    parser.add_argument("--rows", nargs="+", metavar="FILE", help="count the texts of these rows.jsonl instead")
    args = parser.parse_args()
    if args.rows:
        lines = [line for path in args.rows for line in Path(path).read_text("utf-8").splitlines()]
        texts = [row["text"] for row in map(json.loads, lines) if row["text"]]
        print(table(texts))
        return
    sources = read_sources()
    for name, texts in sources.texts.items():
        print(f"{name}: {len(texts):,} distinct texts, {sum(map(is_held_out, map(normalize, texts))):,} held out")
    print(table(text for texts in sources.texts.values() for text in texts))


if __name__ == "__main__":
    main()
