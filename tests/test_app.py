"""The demo page in a real browser, and what it does over HTTP. `make test-app`; needs Debian's chromium."""

import importlib
import io
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import expect
from serving import free_port, serve_process

from audio_utils import fetch_audio
from demo.ask import EXAMPLES
from demo.world import SKILLS
from publishing import paths
from publishing.build import build


pytestmark = pytest.mark.app
SCREENSHOT = paths.ROOT / "build" / "page.png"
TIMEOUT = 60_000  # milliseconds


@contextmanager
def serve_page(repo: Path, folder: Path):
    port = free_port()
    command = [sys.executable, str(repo / "app.py"), "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with serve_process(command, address, folder / "log.txt", timeout=120, GRADIO_ANALYTICS_ENABLED="False"):
        yield address


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


def give(page, clip=None, picture=None, question=""):
    if clip:
        page.locator("#audio input[type=file]").set_input_files(clip)
        page.locator("#audio").get_by_label("Play", exact=True).wait_for()
    if picture:
        page.locator("#picture input[type=file]").set_input_files(picture)
        page.locator("#picture img").wait_for()
    page.fill("#question textarea", question)
    page.click("#ask")


def test_clip_and_picture_are_answered_and_shown(page, examples):
    example = next(example for example in examples if example["skill"] == "question")
    give(page, EXAMPLES / example["audio"][0], EXAMPLES / example["image"], SKILLS["question"]["instruction"])
    expect(page.locator("#answer textarea")).to_have_value(example["answer"], timeout=TIMEOUT)
    seconds = len(fetch_audio(EXAMPLES / example["audio"][0])) / 16_000
    facts = re.compile(rf"^{seconds:.2f} s of audio, 150 audio tokens, 16 image tokens, \d+ tokens in all$")
    expect(page.locator("#facts textarea")).to_have_value(facts)
    for figure in ("#audio-figure img", "#picture-figure img"):
        drawn = page.locator(figure)
        drawn.wait_for()
        assert drawn.evaluate("image => image.naturalWidth") > 300
    SCREENSHOT.parent.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOT, full_page=True)


def test_a_folder_of_trimmed_tokens(browser, demo_repo, examples, tmp_path):
    folder = build(checkpoint=demo_repo, output=tmp_path / "trimmed", audio_tokens="trimmed")
    example = next(example for example in examples if example["skill"] == "transcribe")
    with serve_page(folder, tmp_path) as address, visit(browser, address) as page:
        give(page, EXAMPLES / example["audio"][0])
        expect(page.locator("#answer textarea")).to_have_value(example["answer"], timeout=TIMEOUT)
        samples = len(fetch_audio(EXAMPLES / example["audio"][0]))
        facts = re.compile(
            rf"^{samples / 16_000:.2f} s of audio, {-(-samples // 320)} audio tokens, \d+ tokens in all$"
        )
        expect(page.locator("#facts textarea")).to_have_value(facts)
        page.locator("#audio-figure img").wait_for()
        page.screenshot(path=SCREENSHOT.with_stem("page-trimmed"), full_page=True)


def test_bare_clip_and_bare_picture_have_their_usual_questions(page, examples):
    clip = next(example for example in examples if example["skill"] == "transcribe")
    give(page, EXAMPLES / clip["audio"][0])
    expect(page.locator("#answer textarea")).to_have_value(clip["answer"], timeout=TIMEOUT)
    page.reload()
    picture = next(example for example in examples if example["skill"] == "picture")
    give(page, picture=EXAMPLES / picture["image"])
    expect(page.locator("#answer textarea")).to_have_value(picture["answer"], timeout=TIMEOUT)


def test_examples_of_the_repository_are_there_to_click(page):
    page.get_by_text("Transcribe the audio.").first.click()
    expect(page.locator("#question textarea")).to_have_value("Transcribe the audio.")
    page.locator("#audio").get_by_label("Play", exact=True).wait_for()
    page.click("#ask")
    expect(page.locator("#answer textarea")).to_have_value("how many are there", timeout=TIMEOUT)


def test_bad_file_is_an_error_in_words_and_the_page_goes_on(page, examples, tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF this is no audio")
    page.locator("#audio input[type=file]").set_input_files(broken)
    page.wait_for_timeout(500)
    page.click("#ask")
    page.get_by_text("This audio cannot be opened").wait_for()
    page.reload()
    page.click("#ask")
    page.get_by_text("Give audio, a picture or a question.").wait_for()
    page.reload()
    clip = next(example for example in examples if example["skill"] == "transcribe")
    give(page, EXAMPLES / clip["audio"][0])
    expect(page.locator("#answer textarea")).to_have_value(clip["answer"], timeout=TIMEOUT)


def test_limits_are_the_handlers_and_others_are_answered(page, address, examples, tmp_path):
    """A question, a picture and a strip of a picture that would keep everyone else waiting."""
    start = time.monotonic()
    for number, (question, size, words) in enumerate(
        [
            ("why " * 50_000, None, "at most 100000 characters, got 200000"),
            ("why " * 20_000, None, "must fit the model's 4096 positions"),
            ("", (8192, 8193), "at most 67108864 pixels"),
        ]
    ):
        picture = tmp_path / f"{number}.png"
        if size:
            Image.new("1", size).save(picture)
            page.locator("#picture input[type=file]").set_input_files(picture)
            page.wait_for_timeout(1000)
        page.fill("#question textarea", question)
        page.click("#ask")
        page.get_by_text(words).wait_for()
        page.reload()
    strip = tmp_path / "strip.png"
    Image.new("RGB", (1, 199)).save(strip)
    give(page, picture=strip)
    expect(page.locator("#answer textarea")).not_to_have_value("", timeout=TIMEOUT)
    page.locator("#picture-figure img").wait_for()
    assert time.monotonic() - start < 60
    # The queue is the only way in.
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

        def ask(session: str, until: str, data: list) -> str:
            body = {"data": data, "fn_index": 0, "session_hash": session}
            assert client.post("queue/join", json=body).status_code == 200
            with client.stream("GET", "queue/data", params={"session_hash": session}) as response:
                return next(line for line in response.iter_lines() if until in line)

        def seconds_of(session: str, until: str, data: list, answer: str) -> float:
            start = time.monotonic()
            assert answer in ask(session, until, data)
            return time.monotonic() - start

        whole = seconds_of("whole", "process_completed", [None, picture, None], "two" * 256)
        visitors = [f"visitor {number}" for number in range(8)]
        left = sum(seconds_of(visitor, "process_generating", [None, picture, None], "") for visitor in visitors)
        stayed = seconds_of("ninth", "process_completed", [None, None, "Hi."], "how many are there")
    assert left + stayed < 3 * whole
    assert count == {"live": 0, "most": 1}
