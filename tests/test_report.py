"""make test ONLY=tests/test_report.py: the page of results shows the worst rows first, and nothing in the data acts."""

import json
import re
import types
from html.parser import HTMLParser

import pytest
from data_rows import prediction, write_lines
from PIL import Image

from audio_utils import fetch_audio
from demo.ask import EXAMPLES, read_examples
from demo.world import SKILLS
from evaluation.generate import write_sound
from evaluation.report import MEDIA_TYPES, SCRIPT, SHADES, STYLE, score_folder, write_page
from evaluation.scoring import compare, score, summarize_arms


HOSTILE = '</script><script>alert(1)</script>"><img src=x onerror=alert(1)>&lt;\ud800\x00'
VOID = {"meta", "img", "input", "br", "link"}
MANIFEST = {
    "model": {"name": "someone/a-model", "revision": "0123456789abcdef"},
    **{"data": [{"name": "data.jsonl"}], "date": "2026-01-02T03:04:05+00:00", "device": "cpu", "seed": 0},
    "versions": {"torch": "2.9.0"},
    "generation": {"max_new_tokens": 128, "do_sample": False},
    "command": "evaluation predict DIR --data data.jsonl",
}


class Page(HTMLParser):
    """Elements of a page in their order: name, attributes, and the text within; raises if they are not well nested."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        element = types.SimpleNamespace(tag=tag, attributes=dict(attributes), text="", inside=list(self.open))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        for element in self.open:
            element.text += data

    def all(self, tag: str, style: str | None = None, inside=None) -> list:
        return [
            element
            for element in self.elements
            if element.tag == tag
            and (style is None or style in element.attributes.get("class", "").split())
            and (inside is None or inside in element.inside)
        ]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "results"
    (folder / "media").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    return folder


def written(folder, rows: list[dict], limit: int = 200, **arms) -> Page:
    """The page of some predictions."""
    compared = {arm: [*map(compare, lines)] for arm, lines in {"as given": rows, **arms}.items()}
    return Page(write_page(folder, compared, summarize_arms(compared), limit))


def test_rows_are_in_order_worst_first(folder):
    rows = [
        prediction("one red star", "one red star", 0),
        prediction("one red star", "two red stars", 1),
        prediction("one", "two", 2),
        prediction("one red star", None, 3),
        prediction("red star", "blue square", 4),
        prediction("", "thank you for your attention", 5),
    ]
    page = written(folder, rows)
    assert [heading.text for heading in page.all("h3")] == [f"data.jsonl:{n}" for n in (4, 6, 5, 3, 2, 1)]
    counts = [next(iter(page.all("span", "count", inside=row))).text for row in page.all("article")]
    assert counts == [
        *("failed", "5 errors in 0 words", "2 errors in 2 words", "1 error in 1 word"),
        *("2 errors in 3 words", "0 errors in 3 words"),
    ]
    assert "All 6 rows are shown" in page.all("main")[0].text
    assert "out of memory" in page.all("article")[0].text
    assert len(page.all("article", "failed")) == 1


def test_limit_is_told(folder):
    rows = [prediction("one", "one", row) for row in range(1200)]
    page = written(folder, rows, limit=7)
    assert len(page.all("article")) == 7
    assert "The worst 7 of 1,200 rows are shown" in page.all("main")[0].text
    assert page.all("article")[0].inside[-1].tag == "section"
    assert not list(folder.glob("*.unfinished"))


def test_difference_is_read_by_form(folder):
    page = written(folder, [prediction("two red stars here", "two blue stars or")])
    (row,) = page.all("article")
    (difference,) = page.all("span", "difference", inside=row)
    pairs = page.all("span", "substituted", inside=difference)
    assert [pair.text for pair in pairs] == ["red blue", "here or"]
    page = written(folder, [prediction("red stars", "two red")])
    assert [word.text for word in page.all("ins")][-1] == "2"
    assert [word.text for word in page.all("del")][-1] == "stars"
    assert not page.all("span", "substituted", inside=page.all("article")[0])
    page = written(folder, [prediction("Red stars!", "red stars"), prediction("", "", 1)])
    assert not page.all("span", "difference")
    assert page.all("article")[1].text.count("(empty)") == 2


def test_answers_of_other_arms_are_beside(folder):
    rows = [prediction("red star", "red star"), prediction("one", "two", 1)]
    silence = [prediction("one", "nothing at all", 1), prediction("red star", None)]
    page = written(folder, rows, silence=silence, text=silence[:1])
    tables = [
        ["".join(row.text.split("\n")) for row in page.all("tr", inside=table)[1:]]
        for table in page.all("table", "words")
    ]
    assert tables == [
        ["silencenothing at all3", "textnothing at all3"],
        ["silenceout of memoryfailed"],
    ]


def test_scores_and_confusions_are_tables(folder):
    pairs = [("yes", "yes")] * 6 + [("yes", "no")] * 2 + [("no", "yes")] + [("no", "no")] * 7 + [("no", "maybe")]
    rows = [prediction(text, answer, number, "agree") for number, (text, answer) in enumerate(pairs)]
    texts = [("red blue tree star " * 300, "red blue tree moon " * 300), ("", "thank you"), ("", ""), ("one", None)]
    rows += [prediction(text, answer, number, "transcribe") for number, (text, answer) in enumerate(texts, start=17)]
    page = written(folder, rows, silence=[prediction("one", None, 21, "transcribe")])
    rates, exact, figures, confusion = page.all("table")
    cells = [[cell.text for cell in page.elements if row in cell.inside[-1:]] for row in page.all("tr", inside=rates)]
    all_rows, agree = (
        "{value:.1f} {low:.1f} to {high:.1f}".format(**{name: 100 * rate for name, rate in score(part)["wer"].items()})
        for part in (rows, rows[:17])
    )
    none = "\u2013"
    assert all_rows.startswith("25.0 ") and agree.startswith("23.5 ")
    assert cells == [
        ["group", "rows", "as given", "silence"],
        ["all", "21", all_rows, none],
        ["agree", "17", agree, none],
        ["transcribe", "4", "25.0 25.0 to 25.0", none],
    ]
    assert page.all("caption", inside=exact)[0].text == "Exact answers, %"
    assert len(page.all("tr", inside=exact)) == len(page.all("tr", inside=rates))
    assert len(page.all("tr", inside=figures)) == 6
    assert "1 of 2" in figures.text and "1,217" in figures.text
    assert "76.5 " in exact.text and "76.5 " in figures.text
    shades = [cell.attributes.get("class") for cell in page.all("td", inside=confusion)]
    assert shades == ["shade-7 right", "shade-1", "shade-1", "shade-2", "shade-6 right", "shade-0"]
    interval = all_rows.replace(" ", " % (", 1)
    assert f"{interval}) over 21 rows with 1,217 words; 1 row failed." in page.all("main")[0].text
    assert "max_new_tokens: 128" in page.all("details")[-1].text
    assert {"someone/a-model", "0123456789abcdef", "data.jsonl"} <= {
        element.text for element in page.elements if element.tag in ("h1", "dd")
    }
    levels = [int(element.tag[1]) for element in page.elements if re.fullmatch(r"h\d", element.tag)]
    assert levels == [1, 2, 2] + [3] * 21


def test_rates_may_be_undefined(folder):
    page = written(folder, [prediction("one", None)])
    assert "the word error rate is not defined over 1 row with 0 words" in page.all("main")[0].text
    assert "None" not in page.all("main")[0].text


def test_media_are_inside_and_missing_ones_are_named(folder):
    Image.new("RGB", (8, 8)).save(folder / "media" / "1.jpg")
    (folder / "media" / "1.mp3").write_bytes(b"any bytes")
    (folder / "media" / "1.exe").write_bytes(b"any bytes")
    (folder.parent / "outside.mp3").write_bytes(b"secret")
    names = ["media/1.mp3", "media/1.jpg", "media/2.mp3", "media/1.exe", "../outside.mp3"]
    rows = [prediction("one", "one", audio_filepath="media/1.mp3", media=names)]
    rows += [prediction("one", "one", 1, audio_filepath="media/1.mp3")]
    page = written(folder, rows)
    players, pictures = page.all("audio"), page.all("img")
    assert [player.attributes["src"] for player in players] == ["data:audio/mpeg;base64,YW55IGJ5dGVz"] * 2
    assert all(player.attributes["preload"] == "none" and "controls" in player.attributes for player in players)
    assert players[0].attributes["aria-label"] == "audio 1 of data.jsonl:1"
    assert [picture.attributes["src"][:23] for picture in pictures] == ["data:image/jpeg;base64,"]
    assert [note.text for note in page.all("p", "missing")] == [f"{name} is missing." for name in names[2:]]


def hostile(value):
    """The same data with every text and every name of a group replaced."""
    if isinstance(value, dict):
        return {name: hostile(part) for name, part in value.items()}
    if isinstance(value, list):
        return [hostile(part) for part in value]
    return HOSTILE if isinstance(value, str) else value


def test_nothing_in_the_data_is_markup(folder):
    (folder / "manifest.json").write_text(json.dumps(hostile(MANIFEST) | {HOSTILE: {HOSTILE: HOSTILE}}))
    more = {"group": HOSTILE, "prompt": HOSTILE, "place": HOSTILE}
    rows = [
        prediction("one", f"a {HOSTILE}", media=[HOSTILE, "x" * 5000], **more),
        prediction("one", "two", 1, audio_filepath=HOSTILE, **more),
        {**prediction("one", None, 2, **more), "error": HOSTILE},
        prediction(HOSTILE, HOSTILE, 3),
    ]
    page = written(folder, rows, **{HOSTILE: rows})
    assert len(page.all("script")) == 1 and page.all("script")[0].text == SCRIPT
    assert page.all("img") == []
    assert not [name for element in page.elements for name in element.attributes if name.startswith("on")]
    assert "onerror=alert(1)" in page.all("title")[0].text
    tags = {element.tag for element in page.elements}
    plain = {element.tag for element in written(folder, [prediction("one", "two", prompt="Why?")]).elements}
    assert tags <= plain | {"audio", "img", "table", "caption"}


def test_page_is_self_contained(folder):
    page = written(folder, [prediction("one", "two")])
    for element in page.elements:
        assert not {"href", "srcset", "style", "action", "data"} & set(element.attributes)
        assert element.attributes.get("src", "data:").startswith("data:")
    assert not re.search(r"https?:|url\(|@import", STYLE + SCRIPT)
    policy = page.all("meta")[1].attributes["content"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert page.all("option")[1].text == "no group"


def luminance(color: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return sum(part * share for part, share in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def test_colours_have_contrast():
    """At least 4.5, as WCAG asks for text, in light and dark."""
    palettes = [dict(re.findall(r"--(\w+): ([^;]+);", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.S)]
    assert len(palettes) == 2
    for palette in palettes:
        colors = {
            name: tuple(int(value[i : i + 2], 16) / 255 for i in (1, 3, 5))
            for name, value in palette.items()
            if value.startswith("#")
        }
        shade = [int(part) / 255 for part in palette["shade"].split(",")]
        strongest = 0.5  # of the last of the shades
        assert f".shade-{SHADES} {{ background: rgba(var(--shade), {strongest:.3f}); }}" in STYLE
        mix = tuple(strongest * a + (1 - strongest) * b for a, b in zip(shade, colors["paper"], strict=True))
        pairs = [(name, colors["paper"]) for name in ("ink", "muted", "accent", "removed", "added")]
        pairs += [(name, colors["raised"]) for name in ("ink", "muted")]
        pairs += [(name, colors["pair"]) for name in ("removed", "added")] + [("ink", mix)]
        for name, behind in pairs:
            high, low = sorted([luminance(colors[name]), luminance(behind)], reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, behind)


@pytest.fixture
def report(folder):
    """The page of some answers to the examples of the demo, with their audio and pictures."""
    answers = {1: "two yellow squares", 2: "yellow stars", 4: None, 6: "three small red circles", 7: "one", 8: "maybe"}
    rows, silence = [], []
    for row, example in enumerate(read_examples()):
        media = []
        for number, name in enumerate(example["audio"], 1):
            media.append(f"media/{row:06}-{number}.mp3")
            write_sound(fetch_audio(EXAMPLES / name).numpy(), str(folder / media[-1]), "mp3", "mp3")
        audio = media[0] if media else None
        if example["image"]:
            media.append(f"media/{row:06}-{len(media) + 1}.jpg")
            Image.open(EXAMPLES / example["image"]).convert("RGB").save(folder / media[-1])
        more = {"audio_filepath": audio, "media": media, "group": example["skill"]}
        more["prompt"] = SKILLS[example["skill"]]["instruction"]
        rows.append(prediction(example["answer"], answers.get(row + 1, example["answer"]), row, **more))
        silence.append(prediction(example["answer"], "no", row, **more))
    for row in rows[-1:] + silence[-1:]:  # with nothing in it where a line could break
        row |= {"group": "g" * 80, "place": f"{'p' * 80}:20", "prompt": "q" * 80, "pred_text": "w" * 80}
    written(folder, rows, silence=silence)
    return folder / "report.html"


@pytest.mark.app
def test_page_in_a_browser(report, browser, tmp_path):
    context = browser.new_context(offline=True, viewport={"width": 1200, "height": 900})
    page, problems, requests = context.new_page(), [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url.split(":")[0]))
    page.goto(report.as_uri())
    assert page.locator("#shown").inner_text() == "20 of 20 rows match."

    # The first row that has audio plays by the keyboard, to the end of its recording.
    player = page.locator("audio").first
    place = int(player.get_attribute("aria-label").rpartition(":")[2])
    seconds = len(fetch_audio(EXAMPLES / read_examples()[place - 1]["audio"][0])) / 16_000
    player.focus()
    page.keyboard.press("Space")
    page.wait_for_function("player => player.currentTime > 0.1", arg=player.element_handle())
    assert player.evaluate("player => player.readyState") >= 2
    assert player.evaluate("player => player.duration") == pytest.approx(seconds, abs=0.15)
    assert page.locator("img").first.evaluate("image => image.naturalWidth") > 0

    page.get_by_label("only rows with errors").check()
    assert page.locator("#shown").inner_text() == "7 of 20 rows match."
    page.get_by_label("Search the rows").fill("YELLOW squares")
    assert page.locator("article:visible h3").all_inner_texts() == ["data.jsonl:1"]
    page.get_by_label("Search the rows").fill("")
    page.get_by_label("only rows with errors").uncheck()
    page.get_by_label("Group", exact=True).select_option("agree")
    assert page.locator("article:visible").count() == 4
    page.get_by_label("Group", exact=True).select_option("all")
    page.get_by_label("Search the rows").press("Enter")
    assert page.locator("article:visible").count() == 20

    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (1200, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
            assert page.evaluate("document.documentElement.scrollWidth") == width
            page.locator("details").evaluate_all("all => all.forEach(one => one.open = false)")
            page.screenshot(path=tmp_path / f"{scheme}-{width}.png")
    assert problems == [] and set(requests) <= {"file", "data"}
    assert len(report.read_bytes()) < 1e6 and set(MEDIA_TYPES) == {".mp3", ".jpg"}
    context.close()


def test_a_text_that_is_too_long_is_shown_by_its_start(folder):
    page = written(folder, [prediction("one red star", "[" * 1_000_000), prediction("one " * 3_000, "one", 1)])
    second, first = page.all("article")  # the worst one first
    assert "3 errors in 3 words" in first.text and "3,000 errors in 3,000 words" in second.text
    assert "the start of 1,000,000 characters" in first.text
    assert first.text.count("too long to be aligned") == second.text.count("too long to be aligned") == 1
    assert "2 rows too long to be aligned." in page.all("main")[0].text


def test_references_that_must_be_json(folder):
    """A clip that failed has no reference to judge; one that was asked and has a text is named."""
    right, failed = {"text": '{"a": 1}', "pred_text": '{"a": 1}'}, {"text": "", "error": "there is no file"}
    write_lines(folder / "predictions.jsonl", [DOCUMENTED | right, DOCUMENTED | failed | {"row": 1}])
    whole = score_folder(folder, needs_json=True)["arms"]["as given"]["all"]
    assert whole["exact"]["value"] == 1 and whole["failed"] == 1
    write_lines(folder / "predictions.jsonl", [DOCUMENTED | right, DOCUMENTED | right | {"text": "one", "row": 1}])
    with pytest.raises(ValueError, match="JSON objects; 1 of 2 are not, that of data.jsonl:1 is 'one'"):
        score_folder(folder, needs_json=True)


DOCUMENTED = {"row": 0, "place": "data.jsonl:1", "group": None, "audio_filepath": None, "duration": None, "time": None}


@pytest.mark.parametrize(
    "row",
    [
        {"text": "one", "pred_text": "two"},
        {"text": "one", "error": "out of memory"},
        {"text": "", "pred_text": "", "group": ""},
        {"text": "one", "pred_text": "one", "duration": 0, "time": 0, "audio_filepath": ""},
        {"text": "one", "pred_text": "one", "duration": 10_000_000, "time": 1e-9, "audio_filepath": "gone.mp3"},
        {"text": "one", "pred_text": "one", "media": None, "prompt": None},
        {"text": "one", "pred_text": "one", "media": [], "prompt": "", "more": {"of": ["others"]}},
        {"text": "one", "pred_text": "one", "media": ["gone.jpg", "", "."], "row": 10**30},
    ],
)
def test_every_row_that_is_documented_has_a_page(folder, row):
    for name in ("predictions.jsonl", "predictions-silence.jsonl"):
        write_lines(folder / name, [DOCUMENTED | row])
    scores = score_folder(folder)
    assert json.loads((folder / "scores.json").read_text()) == scores
    page = Page(folder / "report.html")
    assert len(page.all("article")) == 1
    assert ("Question" in page.all("article")[0].text) == (row.get("prompt") is not None)
