"""Makes texts from the templates in `templates.json`: numbers, dates, times, amounts, letters, sentences."""

import json
import random
import re
from pathlib import Path


TEMPLATES = json.loads((Path(__file__).parent / "templates.json").read_text("utf-8"))
WORDS = TEMPLATES["words"]
UNITS, TENS, DAYS, MONTHS = (WORDS[name] for name in ("unit", "ten", "day", "month"))
LETTERS = "BCDEFGHIJKLMNOPQRSTUVWXYZ"  # synthesizers say a single A as the article


def spell(number: int) -> str:
    """Spells a whole number from 0 to 999,999,999 in words."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{UNITS[number % 10]}" if number % 10 else "")
    sizes = {1_000_000: "million", 1000: "thousand", 100: "hundred"}
    size = next(size for size in sizes if number >= size)
    rest = number % size
    joint = " and " if rest < 100 else " "
    return f"{spell(number // size)} {sizes[size]}" + (joint + spell(rest) if rest else "")


def spell_ordinal(number: int) -> str:
    """Spells the ordinal of a whole number from 1 to 99 in words."""
    head, joint, last = spell(number).rpartition("-")
    regular = last[:-1] + "ieth" if last.endswith("y") else last + "th"
    return head + joint + TEMPLATES["ordinals"].get(last, regular)


def number(rng: random.Random) -> str:
    return spell(int(10 ** rng.uniform(0.4, rng.choice([2, 3, 4, 7]))))


def few(rng: random.Random) -> str:
    return spell(rng.randint(2, 20))


def digits(rng: random.Random) -> str:
    return " ".join(rng.choices(UNITS[:10], k=rng.randint(2, 8)))


def letters(rng: random.Random) -> str:
    return ", ".join(rng.choices(LETTERS, k=rng.randint(2, 9)))


def year(rng: random.Random) -> str:
    return f"{spell(rng.choice([16, 17, 18, 19, 19, 20]))} {spell(rng.randint(10, 99))}"


def date(rng: random.Random) -> str:
    day, month = spell_ordinal(rng.randint(1, 31)), rng.choice(MONTHS)
    text = rng.choice([f"the {day} of {month}", f"{month} the {day}"])
    return rng.choice([text, f"{text}, {year(rng)}", f"{rng.choice(DAYS)}, {text}"])


def clock(rng: random.Random) -> str:
    """A time of the day."""
    hour, minute = spell(rng.randint(1, 12)), rng.randint(2, 29)
    before = rng.choice(["half past", "a quarter past", "a quarter to", f"{spell(minute)} minutes past"])
    text = rng.choice([f"{hour} o'clock", f"{hour} {spell(2 * minute + rng.randint(6, 9))}", f"{before} {hour}"])
    return text + rng.choice(["", "", " in the morning", " in the afternoon", " in the evening"])


def amount(rng: random.Random) -> str:
    cents, dollars = f"{spell(rng.randint(2, 99))} cents", f"{few(rng)} dollars"
    money = rng.choice([cents, dollars, f"{dollars} and {cents}", f"{number(rng)} dollars"])
    part = rng.choice(
        [f"{number(rng)} percent", f"half of {number(rng)}", f"{few(rng)} point {spell(rng.randint(1, 9))}"]
    )
    return rng.choice([money, part, f"{few(rng)} and a half miles", f"minus {few(rng)} degrees"])


GENERATORS = {function.__name__: function for function in (number, few, digits, year, date, clock, amount)}


class Templates:
    """Fills the templates with "animal", "artifact", "food", "person", "place", "adjective" and "word" of `words`."""

    def __init__(self, words: dict[str, list[str]]):
        self.words = WORDS | words

    def make(self, form: str, rng: random.Random) -> str:
        """Makes a text of the form "number", "letters", "instruction", "question" or "statement"."""
        if form == "letters":
            return letters(rng)
        if form == "number":
            text = GENERATORS[rng.choice(["number", "digits", "year", "date", "clock", "amount"])](rng)
            return text if rng.random() < 0.5 else text[0].upper() + text[1:] + "."
        return re.sub(r"\{(\w+)\}", lambda gap: self.draw(gap[1], rng), rng.choice(TEMPLATES[form]))

    def draw(self, name: str, rng: random.Random) -> str:
        """Draws a word or phrase for a gap of a template."""
        return GENERATORS[name](rng) if name in GENERATORS else rng.choice(self.words[name])
