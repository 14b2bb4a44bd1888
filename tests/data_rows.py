"""Rows of data and lines of predictions, files of JSON lines, and a picture that no decoder reads."""

import json
from collections.abc import Iterable
from pathlib import Path


def chat(*content, answer="low") -> dict:
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]}


def prediction(text: str, answer: str | None, number: int = 0, group: str | None = None, **others) -> dict:
    """A line of predictions.jsonl; one that failed if there is no answer."""
    outcome = {"error": "out of memory"} if answer is None else {"pred_text": answer}
    facts = {"row": number, "place": f"data.jsonl:{number + 1}", "group": group, "audio_filepath": None}
    return {**facts, "duration": 1.4, "time": 0.25, "text": text, **outcome, **others}


def write_lines(path: Path, lines: Iterable[dict | str | bytes]) -> Path:
    """Writes dicts as JSON and texts as they are, each on a line, and bytes without a newline after them."""
    with path.open("wb") as file:
        for line in lines:
            text = json.dumps(line) if isinstance(line, dict) else line
            file.write(text if isinstance(text, bytes) else f"{text}\n".encode())
    return path


def damage_png(content: bytes) -> bytes:
    """Flips a bit in the name of the second chunk of data, for which Pillow raises SyntaxError."""
    place = content.index(b"IDAT", content.index(b"IDAT") + 4)
    return content[:place] + bytes([content[place] ^ 0x80]) + content[place + 1 :]
