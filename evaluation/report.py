"""Scores and predictions of a results folder -> `report.html`: one page that needs no other file and no network."""

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from evaluation.scoring import MAX_CHARACTERS, align, normalize_short


AS_GIVEN = "as given"  # the arm whose rows are shown
MEASURES = {"wer": "Word error rate", "accuracy": "Accuracy"}
MEDIA_TYPES = {".mp3": "audio/mpeg", ".jpg": "image/jpeg"}
SHADES = 8  # of a confusion table
MISSING = "&ndash;"

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfb; --raised: #f4f3ee; --ink: #1d2126; --muted: #59606a; --line: #dcdad2;
  --accent: #1a5a78; --removed: #a4330f; --added: #0b5f63; --pair: #f1ece0; --shade: 26, 90, 120;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181b; --raised: #1e2226; --ink: #e4e5e3; --muted: #a2a9b1; --line: #363b41;
    --accent: #86bdd8; --removed: #f0987b; --added: #6ccfc9; --pair: #2b2a26; --shade: 96, 160, 195;
  }
}
*, ::before, ::after { box-sizing: border-box; }
[hidden] { display: none !important; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 70rem; padding: 4rem 1.25rem 6rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif;
}
h1, h2 {
  font-family: Charter, "Bitstream Charter", "Iowan Old Style", Georgia, "Liberation Serif", serif;
  font-weight: 600; line-height: 1.2; text-wrap: balance;
}
h1 { font-size: 2.4rem; letter-spacing: -0.01em; margin: 0 0 1.25rem; }
h2 { font-size: 1.6rem; margin: 4rem 0 0.75rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 0; }
h1, h3, p, small, summary, dd { overflow-wrap: anywhere; }
p { margin: 0 0 1rem; max-width: 44rem; text-wrap: pretty; }
.kicker, .note, small, dt, .count { color: var(--muted); font-size: 0.875rem; }
.kicker { margin: 0 0 0.25rem; }
dl { margin: 0; display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.5rem 1.25rem; }
dt { line-height: 1.6rem; }
dd { margin: 0; white-space: pre-wrap; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }

.tables { display: flex; flex-wrap: wrap; gap: 0 4rem; }
.scroll { overflow-x: auto; margin: 1.5rem 0; max-width: 100%; }
table { border-collapse: collapse; border-block: 2px solid var(--ink); font-variant-numeric: tabular-nums lining-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.5rem; }
th, td { padding: 0.4rem 1.25rem 0.4rem 0; text-align: right; vertical-align: top; white-space: nowrap; }
th { font-weight: 400; }
thead th { border-bottom: 1px solid var(--ink); color: var(--muted); font-size: 0.875rem; vertical-align: bottom; }
tbody tr + tr > *, tbody + tbody > tr:first-child > * { border-top: 1px solid var(--line); }
th:first-child, .words th, .words td, .figures :is(th, td):nth-child(2) { text-align: left; }
.figures thead th { white-space: normal; min-width: 4.5rem; }
.figures tbody + tbody > tr:first-child > * { border-top-color: var(--ink); }
th:last-child, td:last-child { padding-right: 0; }
td small { display: block; font-size: 0.75rem; line-height: 1.2; }
td strong { font-weight: 650; }
.confusion th:first-child { color: var(--muted); }
.confusion td, .confusion th { padding-inline: 0.75rem; }
.confusion th:first-child { padding-left: 0; }
.confusion .right { box-shadow: inset 0 0 0 1px currentcolor; }

details { border-top: 1px solid var(--line); }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: 0.65rem 0; color: var(--accent); }
details > div { padding-bottom: 1.25rem; }
details .note { margin: 0; }
details .scroll { margin-block: 0.75rem; }

form {
  display: flex; flex-wrap: wrap; gap: 0.75rem 1.5rem; align-items: end; margin: 1.75rem 0 1rem; padding: 1rem 1.25rem;
  background: var(--raised); border-radius: 0.375rem;
}
form > div { display: grid; gap: 0.25rem; max-width: 100%; grid-template-columns: minmax(0, auto); }
form > .search { flex: 1 1 16rem; }
form > .check { display: flex; gap: 0.5rem; align-items: center; min-height: 2.5rem; }
label { font-size: 0.875rem; color: var(--muted); }
.check label { color: var(--ink); }
input, select { font: inherit; font-size: 1rem; color: var(--ink); accent-color: var(--accent); max-width: 100%; }
input[type="search"], select {
  height: 2.5rem; padding: 0 0.6rem; background: var(--paper); border: 1px solid var(--muted); border-radius: 0.25rem;
}
input[type="checkbox"] { width: 1.1rem; height: 1.1rem; margin: 0; }

article { border-top: 1px solid var(--line); padding: 2rem 0 2.25rem; }
article > header small { min-width: 0; }
article > header { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; align-items: baseline; margin-bottom: 0.9rem; }
article > header .count { margin-left: auto; font-variant-numeric: tabular-nums; }
.failed .count { color: var(--removed); font-weight: 600; }
.row { display: grid; gap: 1.5rem; }
.media { display: grid; gap: 0.75rem; align-content: start; min-width: 0; }
audio { display: block; width: 100%; height: 2.75rem; }
img { display: block; max-width: 100%; max-height: 20rem; height: auto; border-radius: 0.25rem; }
.media p { margin: 0; }
.text { min-width: 0; }
.question { font-style: italic; }
.difference { line-height: 1.9; }
del { color: var(--removed); text-decoration: line-through 0.1em; }
ins { color: var(--added); text-decoration: underline 0.12em; text-underline-offset: 0.2em; }
.substituted { background: var(--pair); border-radius: 0.25rem; padding: 0.1em 0.35em; }
.substituted ins { text-decoration: none; font-weight: 650; }
.error { color: var(--removed); }
.legend > span { display: inline-block; margin-right: 1.5rem; }
.words { width: 100%; margin-top: 1.25rem; border-block: 1px solid var(--line); font-size: 0.9rem; }
.words thead th { border-bottom-color: var(--line); font-size: 0.8125rem; }
.words td:nth-child(2) { white-space: pre-wrap; overflow-wrap: anywhere; width: 100%; }
.words th:last-child, .words td:last-child { text-align: right; }

@media (min-width: 48rem) {
  .row { grid-template-columns: 19rem minmax(0, 1fr); gap: 2.5rem; }
  .row.plain { grid-template-columns: minmax(0, 1fr); }
}
@media (max-width: 30rem) {
  body { padding-top: 2rem; }
  h1 { font-size: 1.8rem; }
  .text > dl, header dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .text > dl > dd, header dl > dd { margin-bottom: 0.5rem; }
}
@media print { form, audio { display: none; } article { break-inside: avoid; } }
""" + "".join(  # shades by class, because the policy of the page forbids styles in attributes
    f".shade-{step} {{ background: rgba(var(--shade), {0.5 * step / SHADES:.3f}); }}\n" for step in range(1, SHADES + 1)
)

SCRIPT = """
const form = document.querySelector("form"), shown = document.getElementById("shown");
const rows = [...document.querySelectorAll("article")].map((element) => ({
  element, text: element.textContent.toLowerCase(), group: element.dataset.group,
  wrong: element.dataset.wrong === "yes",
}));
function filter() {
  const { search, group, wrong } = form.elements, text = search.value.trim().toLowerCase();
  let count = 0;
  for (const row of rows) {
    const fits = row.text.includes(text) && (!wrong.checked || row.wrong) && ["", row.group].includes(group.value);
    row.element.hidden = !fits;
    count += fits;
  }
  shown.textContent = `${count} of ${rows.length} rows match.`;
}
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("play", (event) => {  // one clip at a time
  for (const other of document.querySelectorAll("audio")) if (other !== event.target) other.pause();
}, true);
form.hidden = false;
filter();
"""


@dataclass
class Comparison:
    """
    A prediction and how its words differ from the reference: pairs of words, none where the model failed or a text is
    too long to be aligned.
    """

    prediction: dict
    pairs: list[tuple[str, str]]
    unaligned: int = 0  # words of the reference, all wrong, where a text is too long

    @property
    def failed(self) -> bool:
        return "error" in self.prediction

    @property
    def errors(self) -> int:
        return self.unaligned + sum(differ(reference, given) for reference, given in self.pairs)

    @property
    def words(self) -> int:
        return self.unaligned + sum(reference != "" for reference, _ in self.pairs)

    @property
    def badness(self) -> tuple[bool, float, int]:
        """The greater, the further up on the page."""
        return self.failed, self.errors / max(self.words, 1), self.errors


def differ(reference: str, given: str) -> bool:
    """Whether a pair of [`align`] is an error; words that are equal once they are joined are none."""
    return reference.replace(" ", "") != given.replace(" ", "")


def compare(prediction: dict) -> Comparison:
    if "error" in prediction:
        return Comparison(prediction, [])
    reference, answer = (normalize_short(prediction[name]) for name in ("text", "pred_text"))
    if reference is None or answer is None:
        return Comparison(prediction, [], len((prediction["text"] if reference is None else reference).split()))
    return Comparison(prediction, align(reference, answer))


def write_page(folder: Path, predictions: dict[str, list[dict]], scores: dict, limit: int = 200) -> Path:
    """
    Writes `report.html` into a results folder: scores, confusions, and the worst rows with their audio and pictures.

    Args:
        folder: Holds `manifest.json`, and the media that the predictions name.
        predictions: The predictions of each arm, as `scoring.read_predictions` gives them; the rows of the arm "as
            given" are shown.
        scores: What `scoring` makes of them.
        limit: The greatest number of rows, because each carries its media.

    Returns:
        The path of the page.

    Raises:
        ValueError: if there is no arm "as given", or the limit is negative.
        FileNotFoundError: if there is no `manifest.json`. A missing media file is named on the page instead.
    """
    if AS_GIVEN not in predictions:
        raise ValueError(f'`predictions` must have the arm "{AS_GIVEN}", got {", ".join(predictions) or "none"}.')
    if limit < 0:
        raise ValueError(f"`limit` must be 0 or more, got {limit}.")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    path = folder / "report.html"
    unfinished = path.with_suffix(".unfinished")
    # A lone surrogate, which JSON can hold, has no UTF-8; as a reference to a character it is harmless.
    with unfinished.open("w", encoding="utf-8", errors="xmlcharrefreplace", newline="\n") as file:
        file.writelines(make_page(folder, manifest, predictions, scores, limit))
    unfinished.replace(path)
    return path


def make_page(folder: Path, manifest: dict, predictions: dict, scores: dict, limit: int) -> Iterator[str]:
    """The page in pieces, so that the media of one row at a time are in memory."""
    model = manifest["model"]
    style, script = (base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in (STYLE, SCRIPT))
    policy = f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
    policy += "media-src data:; img-src data:; base-uri 'none'; form-action 'none'"
    data = [source["name"] if isinstance(source, dict) else source for source in manifest.get("data") or []]
    facts = {"Revision": model.get("revision"), "Data": data, "Date": manifest.get("date")}
    yield f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(model["name"])}: results</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="kicker">Results of</p>
<h1>{text(model["name"])}</h1>
{definitions(facts)}
</header>
<main>
"""
    yield make_scores(scores)
    yield f"<details><summary>How it was run</summary><div>{definitions(manifest)}</div></details>\n"

    compared = [compare(prediction) for prediction in predictions[AS_GIVEN]]
    compared.sort(key=lambda row: row.badness, reverse=True)  # stable: equal ones stay in the order of the data
    shown = compared[:limit]
    groups = list(dict.fromkeys(row.prediction["group"] for row in shown))
    others = {
        arm: {prediction["row"]: prediction for prediction in rows}
        for arm, rows in predictions.items()
        if arm != AS_GIVEN
    }
    yield make_rows_head(len(shown), len(compared), groups)
    for row in shown:
        number = row.prediction["row"]
        answers = {arm: compare(rows[number]) for arm, rows in others.items() if number in rows}
        yield make_row(folder, row, groups.index(row.prediction["group"]), answers)
    yield f"</section>\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"


def text(value) -> str:
    """Any value as text of HTML or of an attribute."""
    return MISSING if value is None else escape(str(value))


def definitions(values: dict) -> str:
    """A list of names and values; a list or an object has a line for each of its parts."""

    def line(value) -> str:
        return text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))

    def lines(value) -> str:
        if isinstance(value, dict):
            return "\n".join(f"{text(name)}: {line(part)}" for name, part in value.items())
        if isinstance(value, list):
            return "\n".join(map(line, value))
        return MISSING if value is None else line(value)

    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{lines(value)}</dd>" for name, value in values.items()) + "</dl>"


def cell(content: str, style: str = "") -> str:
    return f'<td class="{style}">{content}</td>' if style else f"<td>{content}</td>"


def make_table(heads: list[str], bodies: list[list[tuple[str, list[str]]]], caption: str, style: str = "") -> str:
    """
    A table that scrolls by itself where it is wider than the page.

    Args:
        heads: Of the columns, HTML as all that follows.
        bodies: Groups of rows; a row is its head and its cells.
    """
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    rows = "".join(
        "<tbody>"
        + "".join(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>' for name, cells in body)
        + "</tbody>"
        for body in bodies
    )
    return (  # with a place in the order of the Tab key, so that the keyboard can scroll it
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table class="{style}">'
        f"<caption>{caption}</caption><thead><tr>{head}</tr></thead>{rows}</table></div>\n"
    )


def make_scores(scores: dict) -> str:
    arms = scores["arms"]
    groups = list(dict.fromkeys(group for arm in arms.values() for group in arm))
    whole = arms[AS_GIVEN]["all"]
    rate = percent(whole["wer"])
    rate = "not defined" if rate == MISSING else f"<strong>{rate} %</strong>"
    failed = f"; {count(whole['failed'], 'row')} failed" if whole["failed"] else ""
    failed += f"; {count(whole['too_long'], 'row')} too long to be aligned" if whole.get("too_long") else ""
    page = '<section aria-labelledby="scores">\n<h2 id="scores">Scores</h2>\n'
    over = f"{count(whole['rows'], 'row')} with {count(whole['words'], 'word')}{failed}"
    page += f"<p>As given, the word error rate is {rate}{interval(whole['wer'], ' (', ')')} over {over}.</p>\n"
    page += '<div class="tables">'
    for measure, name in MEASURES.items():
        body = []
        for group in groups:
            found = [arm.get(group) or {} for arm in arms.values()]
            if any(percent(score.get(measure)) != MISSING for score in found):
                rows = next(score["rows"] for score in found if score)
                rates = [cell(rate_with_interval(score.get(measure))) for score in found]
                body.append((text(group), [cell(f"{rows:,}"), *rates]))
        if body:
            page += make_table(["group", "rows", *map(text, arms)], [body], f"{name}, %")
    rule = scores.get("rule", {})
    page += '</div><p class="note">In small type: the confidence interval. '
    page += f"Normalizer: {text(rule.get('normalizer'))}. Alignment: {text(rule.get('alignment'))}.</p>\n"
    page += f"<details><summary>All figures</summary><div>{make_figures(arms)}</div></details>\n"
    for group in groups:
        tables = [
            make_confusion(arm, of_arm[group]["confusion"])
            for arm, of_arm in arms.items()
            if of_arm.get(group, {}).get("confusion")
        ]
        if tables:
            page += f"<details><summary>Confusions of {text(group)}</summary>"
            page += (
                '<div><p class="note">Each cell is shaded by its share of the row. The right answer is outlined.</p>'
            )
            page += f'<div class="tables">{"".join(tables)}</div></div></details>\n'
    return page


def make_figures(arms: dict) -> str:
    counts = {"substitutions": "substituted", "deletions": "deleted", "insertions": "inserted", "words": "words"}
    counts |= {"empty": "empty", "repeating": "repeating"}
    heads = ["arm", "group", "rows", "failed", "WER, %", "CER, %", "accuracy, %", "mean WER of groups, %"]
    heads += [*counts.values(), "answered where nothing is said", "seconds of audio per second"]
    bodies = []
    for arm, of_arm in arms.items():
        body = []
        for group, score in of_arm.items():
            nothing, speed = score.get("nothing_said") or {}, score.get("rtfx")
            cells = [text(group), f"{score['rows']:,}", f"{score['failed']:,}"]
            cells += [rate_with_interval(score.get(name)) for name in ("wer", "cer", "accuracy", "macro_wer")]
            cells += [MISSING if score.get(name) is None else f"{score[name]:,}" for name in counts]
            cells += [f"{nothing['answered']:,} of {nothing['rows']:,}" if nothing.get("rows") else MISSING]
            cells += [MISSING if speed is None else f"{speed:,.1f}"]
            body.append((text(arm), list(map(cell, cells))))
        bodies.append(body)
    return make_table(heads, bodies, "All figures by arm and group", "figures")


def make_confusion(arm: str, confusion: dict) -> str:
    """A table of references by answers, each cell shaded by its share of the row."""
    body = []
    for reference, counts in zip(confusion["references"], confusion["counts"], strict=True):
        cells = []
        for answer, number in zip(confusion["answers"], counts, strict=True):
            step = -(-number * SHADES // max(sum(counts), 1))  # rounded up, so that a single answer is seen
            right = ["right"] if answer == reference else []
            cells.append(cell(f"{number:,}", " ".join([*([f"shade-{step}"] if step else []), *right])))
        body.append((text(reference), cells))
    heads = ["reference \\ answer", *map(text, confusion["answers"])]
    return make_table(heads, [body], f"{text(arm)}: number of answers", "confusion")


def measured(score, name: str = "value"):
    """A rate as scores give it: a number, an object with an interval, or None where there is nothing to measure."""
    if isinstance(score, dict):
        return score.get(name)
    return score if name == "value" else None


def percent(score) -> str:
    value = measured(score)
    return MISSING if value is None else f"{100 * value:.1f}"


def interval(score, before: str = "", after: str = "") -> str:
    low, high = measured(score, "low"), measured(score, "high")
    return "" if low is None or high is None else f"{before}{100 * low:.1f} to {100 * high:.1f}{after}"


def rate_with_interval(score) -> str:
    return percent(score) + interval(score, " <small>", "</small>")


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def make_rows_head(shown: int, total: int, groups: list[str | None]) -> str:
    which = f"All {total:,} rows are" if shown == total else f"The worst {shown:,} of {total:,} rows are"
    options = "".join(f'<option value="{number}">{group_name(group)}</option>' for number, group in enumerate(groups))
    return f"""</section>
<section aria-labelledby="rows">
<h2 id="rows">Rows</h2>
<p>{which} shown: those that failed first, then by word errors per word of the reference.</p>
<p class="note legend"><span>{substituted("reference", "answer")} substituted</span>
<span><del>word</del> deleted</span> <span><ins>word</ins> inserted</span></p>
<form role="search" hidden>
<div class="search"><label for="search">Search the rows</label>
<input type="search" id="search" name="search" autocomplete="off"></div>
<div><label for="group">Group</label>
<select id="group" name="group"><option value="">all</option>{options}</select></div>
<div class="check"><input type="checkbox" id="wrong" name="wrong"><label for="wrong">only rows with errors</label></div>
</form>
<p class="count" id="shown" role="status"></p>
"""


def group_name(group: str | None) -> str:
    return "no group" if group is None else text(group)


def make_row(folder: Path, row: Comparison, group: int, answers: dict[str, Comparison]) -> str:
    """
    Args:
        group: Its number in the select of the filter.
        answers: Of the other arms, to the same row.
    """
    prediction, place = row.prediction, text(row.prediction["place"])
    wrong = "yes" if row.failed or row.errors else "no"
    media = make_media(folder, prediction)
    facts = [f"{prediction['duration']:.1f} s of audio"] if prediction.get("duration") else []
    facts += [f"answered in {prediction['time']:.2f} s"] if prediction.get("time") is not None else []
    media += f"<p><small>{', '.join(facts)}</small></p>" if facts else ""
    parts = {}
    if prediction.get("prompt") is not None:
        parts["Question"] = f'<span class="question">{text(prediction["prompt"])}</span>'
    parts["Reference"] = passage(prediction["text"])
    if row.failed:
        parts["Error"] = f'<span class="error">{text(prediction["error"])}</span>'
    else:
        parts["Answer"] = passage(prediction["pred_text"])
    if row.unaligned:
        parts["Difference"] = "<small>(too long to be aligned)</small>"
    elif row.errors:
        parts["Difference"] = f'<span class="difference">{difference(row.pairs)}</span>'
    listed = "".join(f'<dt>{name}</dt><dd dir="auto">{part}</dd>' for name, part in parts.items())
    return f"""<article data-group="{group}" data-wrong="{wrong}"{' class="failed"' if row.failed else ""}>
<header>
<h3>{place}</h3> <small>{group_name(prediction["group"])}</small> <span class="count">{verdict(row)}</span>
</header>
<div class="row"><div class="media">{media}</div>
<div class="text"><dl>{listed}</dl>{make_answers(answers)}</div></div>
</article>
"""


def make_media(folder: Path, prediction: dict) -> str:
    """Players and pictures with their files inside; a file that is missing is named instead."""
    names = prediction.get("media") or list(filter(None, [prediction.get("audio_filepath")]))
    place, made = text(prediction["place"]), ""
    for number, name in enumerate(names, 1):
        content, kind = read_media(folder, name), MEDIA_TYPES.get(Path(name).suffix)
        if content is None or kind is None:
            made += f'<p class="missing"><small>{text(name)} is missing.</small></p>'
            continue
        source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
        label = f"{kind.split('/')[0]} {number} of {place}"
        if kind.startswith("audio"):
            made += f'<audio controls preload="none" aria-label="{label}" src="{source}"></audio>'
        else:
            made += f'<img alt="{label}" src="{source}">'
    return made


def read_media(folder: Path, name: str) -> bytes | None:
    """None if there is no such file in the folder. One outside it is not put into a page that is handed on."""
    try:
        path = (folder / name).resolve()
        return path.read_bytes() if path.is_relative_to(folder.resolve()) else None
    except (OSError, ValueError):  # the latter for a zero byte in the name
        return None


def make_answers(answers: dict[str, Comparison]) -> str:
    """What the other arms answer, in a table that wraps instead of scrolling."""
    if not answers:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{text(arm)}</th><td dir="auto">'
        + (
            f'<span class="error">{text(row.prediction["error"])}</span>'
            if row.failed
            else passage(row.prediction["pred_text"])
        )
        + f"</td><td>{'failed' if row.failed else row.errors}</td></tr>"
        for arm, row in answers.items()
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("arm", "answer", "errors"))
    return f'<table class="words"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def passage(value: str) -> str:
    """A text of a row; of one that is too long to be aligned the start."""
    if len(value) > MAX_CHARACTERS:
        return f"{text(value[:MAX_CHARACTERS])} <small>(the start of {len(value):,} characters)</small>"
    return text(value) if value.strip() else "<small>(empty)</small>"


def verdict(row: Comparison) -> str:
    return "failed" if row.failed else f"{count(row.errors, 'error')} in {count(row.words, 'word')}"


def difference(pairs: list[tuple[str, str]]) -> str:
    """Words of the answer with those of the reference: read by form as well as by colour."""
    made = []
    for reference, given in pairs:
        if not differ(reference, given):
            made.append(text(given))
        elif not reference:
            made.append(f"<ins>{text(given)}</ins>")
        elif not given:
            made.append(f"<del>{text(reference)}</del>")
        else:
            made.append(substituted(reference, given))
    return " ".join(made)


def substituted(reference: str, given: str) -> str:
    return f'<span class="substituted"><del>{text(reference)}</del> <ins>{text(given)}</ins></span>'
