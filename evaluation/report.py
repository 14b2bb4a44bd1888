"""Predictions of a folder -> `scores.json`, and `report.html`: one page that needs no other file and no network."""

import base64
import hashlib
import json
from functools import partial
from pathlib import Path

import jinja2

from evaluation.scoring import (
    ALL,
    AS_GIVEN,
    MAX_CHARACTERS,
    Comparison,
    compare,
    edit_of,
    headline,
    list_always_wrong,
    read_folder,
    show,
    summarize_arms,
)
from evaluation.tasks import Metric
from publishing.paths import replace_file, write_json


STYLE, SCRIPT = (Path(__file__).with_name(f"report.{suffix}").read_text(encoding="utf-8") for suffix in ("css", "js"))
LAYOUT = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
LOADER = jinja2.FileSystemLoader(Path(__file__).parent)
ENVIRONMENT = jinja2.Environment(loader=LOADER, autoescape=True, undefined=jinja2.StrictUndefined, **LAYOUT)
SHADES = 8  # shades of a confusion table: the classes shade-1 to shade-8 of report.css
MEDIA_TYPES = {".mp3": "audio/mpeg", ".jpg": "image/jpeg"}


def score_folder(folder: str | Path, metric: str | None = None, needs_json: bool = False) -> dict:
    """
    Scores the predictions of a folder, and writes `scores.json` and `report.html` into it. `metric` is a function of a
    user's own, as [`Metric`] reads it. With `needs_json` references that are no JSON objects are refused, which are
    scored as texts without it. Raises a ValueError if the predictions are not as [`read_folder`] needs them, and a
    FileNotFoundError if there is no `manifest.json`. A missing media file is named on the page instead.
    """
    folder = Path(folder)
    function = Metric(metric) if metric else None
    arms = {arm: [compare(row, function) for row in rows] for arm, rows in read_folder(folder).items()}
    if needs_json:
        refuse_texts(arms[AS_GIVEN])
    scores = summarize_arms(arms)
    if function:
        scores["rule"] = {**scores["rule"], "metric": function.facts}
    write_json(folder / "scores.json", scores)
    write_page(folder, arms, scores)
    return scores


def refuse_texts(comparisons: list[Comparison]):
    """Raises a ValueError if a reference is no JSON object. Rows that could not be asked have none."""
    asked = [row for row in comparisons if "error" not in row.prediction]
    if wrong := [row for row in asked if row.fields is None]:
        text, place = wrong[0].prediction["text"], wrong[0].prediction["place"]
        raise ValueError(
            f"--json needs references that are JSON objects; {len(wrong)} of {len(asked)} are not, that of {place} is "
            f"{text!r:.200}."
        )


def write_page(folder: Path, arms: dict[str, list[Comparison]], scores: dict, limit: int = 200) -> Path:
    """
    Writes `report.html`: scores, confusions, and the worst rows of the arm "as given", at most `limit`, because each
    carries its audio and pictures. The folder holds `manifest.json`, and the media that the predictions name.
    """
    rows = sorted(arms[AS_GIVEN], key=lambda row: row.badness, reverse=True)  # stable: ties keep the order of the data
    others = {arm: {other.prediction["row"]: other for other in arms[arm]} for arm in arms if arm != AS_GIVEN}
    shown = rows[:limit]
    style, script = (base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in (STYLE, SCRIPT))
    policy = f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
    policy += "media-src data:; img-src data:; base-uri 'none'; form-action 'none'"
    page = ENVIRONMENT.get_template("report.html").generate(
        policy=policy,
        manifest=json.loads((folder / "manifest.json").read_text(encoding="utf-8")),
        rule=scores["rule"],
        always_wrong=list_always_wrong(scores["arms"][AS_GIVEN][ALL]),
        arms=scores["arms"],
        groups_with=partial(groups_with, scores["arms"]),
        num_rows=len(rows),
        num_shown=len(shown),
        rows=shown,
        row_groups=list(dict.fromkeys(row.prediction["group"] for row in shown)),
        open_media=partial(open_media, folder),
        answers_to=lambda row: {arm: answers[row] for arm, answers in others.items() if row in answers},
    )
    with replace_file(folder / "report.html") as file:
        file.writelines(page)  # in pieces, so that the media of one row at a time are in memory
    return folder / "report.html"


def groups_with(arms: dict, measure: str) -> list[dict]:
    """Returns the groups in which some arm has a rate or a confusion: `name`, `num_rows`, and `scores` of each arm."""
    groups = []
    for name in dict.fromkeys(group for scores in arms.values() for group in scores):
        scores = {arm: groups_of_arm.get(name, {}) for arm, groups_of_arm in arms.items()}
        if any(score[measure].get("value", 0) is not None for score in scores.values() if measure in score):
            num_rows = next(score["rows"] for score in scores.values() if score)
            groups.append({"name": name, "num_rows": num_rows, "scores": scores})
    return groups


def shade_of(count: int, counts: list[int]) -> int:
    """The shade of a count by its share of the row; rounded up, so that a single answer is seen."""
    return -(-count * SHADES // max(sum(counts), 1))


def lines_of(value) -> str:
    """Shows a value of the manifest; a list or an object has a line for each of its parts."""

    def line(part) -> str:
        return part if isinstance(part, str) else json.dumps(part, ensure_ascii=False)

    if isinstance(value, dict):
        return "\n".join(f"{name}: {line(part)}" for name, part in value.items())
    if isinstance(value, list):
        return "\n".join(map(line, value))
    return "\u2013" if value is None else line(value)


def facts_of(prediction: dict) -> str:
    duration, time = prediction["duration"], prediction["time"]
    facts = [f"{duration:.1f} s of audio" if duration else "", "" if time is None else f"answered in {time:.2f} s"]
    return ", ".join(filter(None, facts))


def open_media(folder: Path, prediction: dict) -> list[dict]:
    """Returns `name`, `modality`, `label` and `source` of the media of a row; the source of a missing file is None."""
    media = []
    names = prediction.get("media") or list(filter(None, [prediction["audio_filepath"]]))
    for number, name in enumerate(names, start=1):
        media_type = MEDIA_TYPES.get(Path(name).suffix, "")
        modality = media_type.partition("/")[0]
        content = read_media(folder, name) if media_type else None
        source = None if content is None else f"data:{media_type};base64,{base64.b64encode(content).decode()}"
        label = f"{modality} {number} of {prediction['place']}"
        media.append({"name": name, "modality": modality, "label": label, "source": source})
    return media


def read_media(folder: Path, name: str) -> bytes | None:
    """Reads a file of a folder; None if it is missing or outside of the folder, because the page is handed on."""
    try:
        path = (folder / name).resolve()
        return path.read_bytes() if path.is_relative_to(folder.resolve()) else None
    except (OSError, ValueError):  # a name with a zero byte raises ValueError
        return None


# What the template calls and shows beside the variables of a page.
FUNCTIONS = (zip, edit_of, lines_of, shade_of, facts_of, headline, show)
ENVIRONMENT.globals |= {function.__name__: function for function in FUNCTIONS}
ENVIRONMENT.globals |= {"style": STYLE, "script": SCRIPT, "max_characters": MAX_CHARACTERS}
