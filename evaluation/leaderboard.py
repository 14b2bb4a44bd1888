"""
Text -> the words that are compared, by the rule of the Open ASR Leaderboard for English
(https://github.com/huggingface/open_asr_leaderboard). Its words and spellings are in open_asr_leaderboard.json.
"""

import json
import re
from pathlib import Path

from transformers.models.whisper.english_normalizer import EnglishTextNormalizer


LEADERBOARD = json.loads(Path(__file__).with_name("open_asr_leaderboard.json").read_text(encoding="utf-8"))
BENCHMARK = LEADERBOARD["benchmark"]  # its id, and its sets with the names of their tasks
# References that the leaderboard does not score; the second one stands in the transcripts of TED-LIUM.
NOTHING_SAID = ("", "ignore time segment in scoring")


class LeaderboardNormalizer(EnglishTextNormalizer):
    """
    Whisper's normalizer with the changes of the leaderboard: it removes more hesitations, reads `'s` as "is" only
    after pronouns and the like, and writes compounds, names and acronyms in one way.
    """

    def __init__(self, rule: dict):
        super().__init__(rule["spellings"])
        self.ignore_patterns = rf"\b({'|'.join(rule['hesitations'])})\b"
        # The new rule takes the place of Whisper's rule for every 's, because the order of the replacers matters.
        is_rule = (rf"\b({'|'.join(rule['words_before_is'])})'s\b", r"\1 is")
        self.replacers = dict(is_rule if pair[0] == r"'s\b" else pair for pair in self.replacers.items())
        numbers, spellings = self.standardize_numbers, self.standardize_spellings

        def standardize_numbers(text: str) -> str:
            for pattern, compound in rule["compounds"].items():
                text = re.sub(pattern, compound, text)
            try:
                return numbers(text)
            except ValueError:  # Python converts at most 4,300 digits; the leaderboard raises
                return text

        def standardize_spellings(text: str) -> str:
            return join_letters(" ".join(rule["names"].get(word, word) for word in spellings(text).split()))

        self.standardize_numbers, self.standardize_spellings = standardize_numbers, standardize_spellings


def join_letters(text: str) -> str:
    """Joins two or more single letters or digits in a row; three or more if one is "a" or "i", which are words."""

    def join(match: re.Match) -> str:
        letters = match[0].split(" ")
        return "".join(letters) if len(letters) >= (3 if {"a", "i"} & set(letters) else 2) else match[0]

    return re.sub(r"(?<!\S)[^\W_](?: [^\W_])+(?!\S)", join, text)


NORMALIZER = LeaderboardNormalizer(LEADERBOARD)


def normalize(text: str) -> str:
    """Returns the words that are compared, with one space between them."""
    text = text.encode("utf-8", errors="replace").decode()  # JSON can hold half of a surrogate pair
    # Whisper's normalizer removes these as well, but its pattern takes long where a bracket is not closed.
    text = re.sub(r"[<\[][^>\]]*[>\]]", "", mask_unclosed(text, "<[", ">]"))
    return " ".join(NORMALIZER(mask_unclosed(text, "(", ")")).split())


def mask_unclosed(text: str, opening: str, closing: str) -> str:
    """
    Replaces opening brackets that nothing closes by "{". The normalizer turns both into a space, but from each bracket
    it would search to the end of the text.
    """
    end = 1 + max(text.rfind(bracket) for bracket in closing)
    return text[:end] + text[end:].translate(dict.fromkeys(map(ord, opening), "{"))
