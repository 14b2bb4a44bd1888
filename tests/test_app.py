"""make test-app: the page in a real browser (Debian's chromium), and what it does over HTTP."""

import importlib
import io
import re
import sys
import time
from contextlib import contextmanager

import httpx
import pytest
from PIL import Image
from playwright.sync_api import expect
from serving import SPOKEN, free_port, of_skill, serve_page

from audio_utils import SAMPLING_RATE, fetch_audio
from demo.ask import EXAMPLES
from demo.world import SKILLS
from publishing import paths
from publishing.build import build


pytestmark = pytest.mark.app
SCREENSHOT = paths.ROOT / "build" / "page.png"
TIMEOUT = 60_000  # milliseconds


@pytest.fixture(scope="module")
def address(demo_repo, tmp_path_factory):
    with serve_page(demo_repo, tmp_path_factory.mktemp("app")) as address:
        yield address


@contextmanager
def visit(browser, address: str):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(TIMEOUT)
    page.goto(address)
    yield page
    page.close()


@pytest.fixture
def page(browser, address):
    with visit(browser, address) as page:
        yield page


@pytest.fixture
def spoken(examples) -> dict:
    """An example that asks for a transcript."""
    return of_skill(examples, "transcribe")


def give(page, clip=None, picture=None, question=""):
    if clip:
        page.locator("#audio input[type=file]").set_input_files(clip)
        page.locator("#audio").get_by_label("Play", exact=True).wait_for()
    if picture:
        page.locator("#picture input[type=file]").set_input_files(picture)
        page.locator("#picture img").wait_for()
    page.fill("#question textarea", question)
    page.click("#ask")


def expect_answer(page, answer: str):
    expect(page.locator("#answer textarea")).to_have_value(answer, timeout=TIMEOUT)


def expect_facts(page, clip, rest: str):
    seconds = len(fetch_audio(clip)) / SAMPLING_RATE
    expect(page.locator("#facts textarea")).to_have_value(re.compile(rf"^{seconds:.2f} s of audio, {rest} in all$"))


def test_clip_and_picture_are_answered_and_shown(page, examples):
    example = of_skill(examples, "question")
    clip = EXAMPLES / example["audio"][0]
    give(page, clip, EXAMPLES / example["image"], SKILLS["question"]["instruction"])
    expect_answer(page, example["answer"])
    expect_facts(page, clip, r"150 audio tokens, 16 image tokens, \d+ tokens")
    for figure in ("#audio-figure img", "#picture-figure img"):
        drawn = page.locator(figure)
        drawn.wait_for()
        assert drawn.evaluate("image => image.naturalWidth") > 300
    SCREENSHOT.parent.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOT, full_page=True)


def test_a_folder_of_trimmed_tokens(browser, demo_repo, spoken, tmp_path):
    folder, clip = tmp_path / "trimmed", EXAMPLES / spoken["audio"][0]
    build(checkpoint=demo_repo, output=folder, audio_tokens="trimmed")
    with serve_page(folder, tmp_path) as address, visit(browser, address) as page:
        give(page, clip)
        expect_answer(page, spoken["answer"])
        expect_facts(page, clip, rf"{-(-len(fetch_audio(clip)) // 320)} audio tokens, \d+ tokens")
        page.locator("#audio-figure img").wait_for()
        page.screenshot(path=SCREENSHOT.with_stem("page-trimmed"), full_page=True)


def test_bare_clip_and_bare_picture_have_their_usual_questions(page, spoken, examples):
    give(page, EXAMPLES / spoken["audio"][0])
    expect_answer(page, spoken["answer"])
    page.reload()
    picture = of_skill(examples, "picture")
    give(page, picture=EXAMPLES / picture["image"])
    expect_answer(page, picture["answer"])


def test_examples_of_the_repository_are_there_to_click(page):
    page.get_by_text("Transcribe the audio.").first.click()
    expect(page.locator("#question textarea")).to_have_value("Transcribe the audio.")
    page.locator("#audio").get_by_label("Play", exact=True).wait_for()
    page.click("#ask")
    expect_answer(page, SPOKEN)


def test_errors_are_told_in_words_and_the_page_goes_on(page, spoken, tmp_path):
    """Also those of a question or a picture that would keep everyone else waiting."""
    (tmp_path / "broken.wav").write_bytes(b"RIFF this is no audio")
    (tmp_path / "broken.png").write_bytes((EXAMPLES / "photo.png").read_bytes()[:400])
    Image.new("1", (8192, 8193)).save(tmp_path / "large.png")
    for file, question, words in (
        ("broken.wav", "", "This audio cannot be opened"),
        ("broken.png", "", "This picture cannot be opened: A picture is broken or cut short"),
        ("large.png", "", "it must have at most 67108864"),
        (None, "", "Give audio, a picture or a question."),
        (None, "why " * 50_000, "200000 characters of text; it must have at most 100000"),
        (None, "why " * 20_000, "of the answer); it must have at most 4096"),
    ):
        if file:
            place = "#audio" if file.endswith("wav") else "#picture"
            page.locator(f"{place} input[type=file]").set_input_files(tmp_path / file)
            page.wait_for_timeout(1000)
        page.fill("#question textarea", question)
        page.click("#ask")
        page.get_by_text(words).wait_for()
        page.reload()
    give(page, EXAMPLES / spoken["audio"][0])
    expect_answer(page, spoken["answer"])


def test_a_strip_of_a_picture_holds_nobody_up_and_the_queue_is_the_only_way_in(page, address, tmp_path):
    start, strip = time.monotonic(), tmp_path / "strip.png"
    Image.new("RGB", (1, 199)).save(strip)
    give(page, picture=strip)
    expect(page.locator("#answer textarea")).not_to_have_value("", timeout=TIMEOUT)
    page.locator("#picture-figure img").wait_for()
    assert time.monotonic() - start < 60
    body = {"data": [None, None, "Hi."], "fn_index": 0, "session_hash": "x"}
    assert httpx.post(f"{address}/gradio_api/api/answer", json=body, timeout=60).status_code == 404


@pytest.fixture
def own_page(demo_repo, monkeypatch):
    """The page in this process: its address, and how many generations are live and were live at most."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.syspath_prepend(demo_repo)
    model = importlib.import_module("app").DemoModel(demo_repo)
    generate, count = model.model.generate, {"live": 0, "most": 0}

    def counted(**inputs):
        count["live"] += 1
        count["most"] = max(count["most"], count["live"])
        try:
            return generate(**inputs)
        finally:
            count["live"] -= 1

    monkeypatch.setattr(model.model, "generate", counted)
    page = sys.modules["app"].make_page(model)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_port=free_port())
    yield address, count
    page.close()


def test_nothing_is_generated_for_visitors_who_left(own_page):
    """Eight ask what would be answered with 256 tokens, and hang up. A ninth stays and is answered."""
    (address, count), file = own_page, io.BytesIO()
    Image.new("RGB", (100, 100)).save(file, "PNG")
    with httpx.Client(base_url=f"{address}gradio_api/", timeout=60) as client:
        (path,) = client.post("upload", files={"files": ("blank.png", file.getvalue())}).json()
        picture = {"path": path, "meta": {"_type": "gradio.FileData"}}

        def seconds_of(session: str, until: str, data: list, answer: str) -> float:
            start, body = time.monotonic(), {"data": data, "fn_index": 0, "session_hash": session}
            assert client.post("queue/join", json=body).status_code == 200
            with client.stream("GET", "queue/data", params={"session_hash": session}) as response:
                assert answer in next(line for line in response.iter_lines() if until in line)
            return time.monotonic() - start

        whole = seconds_of("whole", "process_completed", [None, picture, None], "two" * 256)
        visitors = [f"visitor {number}" for number in range(8)]
        left = sum(seconds_of(visitor, "process_generating", [None, picture, None], "") for visitor in visitors)
        stayed = seconds_of("ninth", "process_completed", [None, None, "Hi."], SPOKEN)
    assert left + stayed < 3 * whole
    assert count == {"live": 0, "most": 1}
