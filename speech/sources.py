"""
Reads the texts: WordNet's examples, definitions and phrases, fortunes, and the commonest words by SCOWL.

They are in Debian's wordnet-base (https://wordnet.princeton.edu), fortunes and scowl (http://wordlist.aspell.net). The
licences in /usr/share/doc allow what is done here.
"""

import functools
import json
import re
from collections import Counter
from pathlib import Path

from publishing.paths import ROOT
from speech.generated import TEMPLATES, Templates


WORDNET = Path("/usr/share/wordnet")
FORTUNES = Path("/usr/share/games/fortunes")
SCOWL = Path("/usr/share/dict/scowl")
# The files of fortunes that hold sentences, and neither verse, code, dialogues nor mockery; WordNet's files of nouns by
# number; WordNet's ethnic slurs, obscenities and disparagements.
FORTUNE_FILES, KINDS, MOCKERY = json.loads((ROOT / "speech" / "sources.json").read_text()).values()
INDECENT = re.compile(r"\b(sex|fuck|shit|piss|porn|nake|nude|whore|slut|bitch|damn|nigg|rap(e|ed|es|ist)\b)", re.I)
ABBREVIATIONS = frozenset(TEMPLATES["abbreviations"])
WORD = r"[A-Za-z]+(?:['-][A-Za-z]+)*"
SENTENCE = re.compile(rf"{WORD}(?:[,;:]? {WORD})*[.!?]?")
MAX_WORDS = 25
NUM_COMMON = 15_000


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


class Sources:
    """
    Holds all texts that may be said, by source. Raises a FileNotFoundError if Debian's wordnet-base, fortunes or scowl
    is not installed.

    Attributes:
        common: The 15,000 commonest words, the commonest first. They are sorted by SCOWL's size class, then by how
            often they are in WordNet's examples and definitions and in the texts that its authors tagged.
        texts: Distinct texts of the sources "wordnet", "definition", "phrase", "fortune" and "word".
        templates: [`Templates`] with WordNet's words.
    """

    def __init__(self):
        for folder, package in ((WORDNET, "wordnet-base"), (FORTUNES, "fortunes"), (SCOWL, "scowl")):
            if not folder.is_dir():
                raise FileNotFoundError(f"There is no {folder}; on Debian: apt-get install {package}.")
        by_class = [read_scowl(size) for size in (10, 20, 35)]
        self.known = frozenset().union(*by_class, *map(read_scowl, (40, 50, 55, 60)))
        examples, definitions, lemmas, mocking = read_wordnet()
        self.mocking = mocking
        tagged, kinds = read_tagged()
        counts = Counter(word for text in [*examples, *definitions] for word in words_of(text)) + tagged
        self.common = [
            word
            for number, words in enumerate(by_class)
            for word in sorted(words - set().union(*by_class[:number]), key=lambda word: (-counts[word], word))
            if re.fullmatch(r"[a-z]{2,}(n't|'[a-z]{2,})?|a|i", word) and self.is_clean(word)
        ][:NUM_COMMON]
        phrases = (lemma for lemma in lemmas if len(lemma.split()) in (2, 3))
        texts = {"wordnet": examples, "definition": definitions, "phrase": phrases, "fortune": read_fortunes()}
        texts["word"] = [word for word in self.common if len(word) > 1]
        self.texts = {name: [*dict.fromkeys(filter(self.is_clean, texts[name]))] for name in texts}
        common = frozenset(self.common)
        kinds = {name: sorted(words & common) for name, words in kinds.items()}
        self.templates = Templates(kinds | {"word": self.texts["word"]})

    def is_clean(self, text: str) -> bool:
        """Whether a text is 1 to 25 known words with plain punctuation: no digits, abbreviations, or indecency."""
        if not SENTENCE.fullmatch(text) or len(text.split()) > MAX_WORDS or INDECENT.search(text):
            return False
        return all(self.is_known(word) for word in re.split(r"[^A-Za-z']+", text) if word)

    def is_known(self, word: str) -> bool:
        lower = word.lower()
        if lower in ABBREVIATIONS or lower in self.mocking or (word.isupper() and word not in ("A", "I", "O")):
            return False
        return not self.known.isdisjoint((word, lower, lower.removesuffix("'s")))


read_sources = functools.cache(Sources)


def read_scowl(size: int) -> frozenset[str]:
    """Reads a size class of SCOWL; larger classes hold rarer words. Names keep their capitals."""
    lists = ("words", "contractions", "upper", "proper-names")
    paths = [SCOWL / f"{region}-{name}.{size}" for region in ("english", "american") for name in lists]
    return frozenset(word for path in paths if path.is_file() for word in path.read_text("latin-1").split())


def read_wordnet() -> tuple[list[str], list[str], list[str], frozenset[str]]:
    """Reads WordNet's examples, definitions and lemmas, and the words that have no other sense than to mock."""
    examples, definitions, lemmas, mocking = [], [], [], set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"data.{part}").read_text("utf-8").splitlines():
            if line.startswith(" "):  # the licence
                continue
            data, _, gloss = line.partition(" | ")
            fields = data.split()
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            words = [re.sub(r"\(.*\)", "", word).replace("_", " ") for word in words]
            if any(f";u {offset} n" in data for offset in MOCKERY):
                mocking.update(word.lower() for word in words)
                continue
            lemmas += words
            examples += (text.strip() for text in re.findall(r'"([^"]*)"', gloss))
            definitions.append(re.split(r'; "', gloss)[0].strip())
    return examples, definitions, lemmas, frozenset(mocking - {lemma.lower() for lemma in lemmas})


def read_tagged() -> tuple[Counter, dict[str, set[str]]]:
    """Counts how often lemmas were tagged in WordNet's texts, and sorts some by the kind of their commonest sense."""
    counts, kinds = Counter(), {kind: set() for kind in (*KINDS.values(), "adjective")}
    for line in (WORDNET / "cntlist.rev").read_text("utf-8").splitlines():
        key, sense, count = line.split()
        lemma, _, rest = key.partition("%")
        counts[lemma] += int(count)
        part, file = rest.split(":")[:2]
        if sense == "1" and part == "1" and file in KINDS:
            kinds[KINDS[file]].add(lemma)
        if sense == "1" and part in "35" and file == "00":
            kinds["adjective"].add(lemma)
    return counts, kinds


def read_fortunes() -> list[str]:
    """Reads the fortunes without the names of their authors."""
    texts = [text for name in FORTUNE_FILES for text in (FORTUNES / name).read_text("utf-8").split("\n%\n")]
    return [" ".join(re.split(r"\s+-- ", text)[0].split()) for text in texts]
