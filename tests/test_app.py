"""make test-app: the page in a real browser (Debian's chromium), and what it does over HTTP."""

import importlib
import io
import json
import re
import shutil
import sys
import time
import wave
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect
from serving import SPOKEN, free_port, of_skill, serve_page

from audio_utils import SAMPLING_RATE, fetch_audio
from demo.ask import EXAMPLES
from demo.world import SKILLS
from publishing import paths
from publishing.build import build
from transcribe import write_wav


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


@contextmanager
def launch(model):
    """Yields the address of a page in this process, and how many generations are live and were live at most."""
    generate, count = model.model.generate, {"live": 0, "most": 0, "calls": 0}

    def counted(**inputs):
        count["live"] += 1
        count["calls"] += 1
        count["most"] = max(count["most"], count["live"])
        try:
            return generate(**inputs)
        finally:
            count["live"] -= 1

    model.model.generate = counted
    page = sys.modules["app"].make_page(model)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_port=free_port())
    yield address, count
    page.close()


@pytest.fixture
def own_model(demo_repo, monkeypatch):
    """The page's model in this process."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.syspath_prepend(demo_repo)
    return importlib.import_module("app").DemoModel(demo_repo)


@pytest.fixture
def own_page(own_model):
    with launch(own_model) as page:
        yield page


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
    assert count["live"] == 0 and count["most"] == 1


@pytest.fixture(scope="module")
def short_pieces(demo_repo, tmp_path_factory):
    """The address of a page whose model takes pieces of 4 s, because the small model knows no longer speech."""
    folder = tmp_path_factory.mktemp("pieces")
    repo = shutil.copytree(demo_repo, folder / "repo")
    settings = json.loads((repo / "processor_config.json").read_text())
    (repo / "processor_config.json").write_text(json.dumps({**settings, "piece_seconds": 4.0}))
    with serve_page(repo, folder) as address:
        yield address


def join_clips(example: dict, path, count: int, silence: float = 1.0):
    """Writes a recording in which a clip is said `count` times, and returns its path."""
    clip = fetch_audio(EXAMPLES / example["audio"][0])
    parts = [clip, torch.zeros(round(silence * SAMPLING_RATE))] * count
    path.write_bytes(write_wav(torch.cat(parts)))
    return path


def give_recording(page, path):
    page.get_by_role("tab", name="Transcribe").click()
    page.locator("#recording input[type=file]").set_input_files(path)
    page.locator("#recording audio").wait_for(state="attached")
    page.click("#transcribe")


def test_a_recording_is_transcribed_played_and_taken_home(browser, short_pieces, spoken, tmp_path):
    recording = join_clips(spoken, tmp_path / "two <stars>.wav", 4)
    with visit(browser, short_pieces) as page:
        give_recording(page, recording)
        page.locator("#segments [data-start]").first.wait_for()
        expect(page.locator("#download-srt")).to_be_enabled(timeout=TIMEOUT)
        rows = page.locator("#segments [data-start]")
        expect(rows).to_have_count(4)
        for number, row in enumerate(rows.all()):
            expect(row).to_contain_text(spoken["answer"])
            start = float(row.get_attribute("data-start"))
            assert abs(start - 0.24 - number * (len(fetch_audio(recording)) / SAMPLING_RATE / 4)) < 0.1
        expect(rows.first.locator("time")).to_have_text("0:00.2 \u2013 0:01.2")
        expect(page.locator("#progress textarea")).to_have_value(re.compile(r"^9\.7 s, 4 segments$"))
        page.screenshot(path=SCREENSHOT.with_stem("page-transcribe"), full_page=True)
        rows.nth(2).click()
        player, start = page.locator("#recording audio"), float(rows.nth(2).get_attribute("data-start"))
        page.wait_for_function("start => document.querySelector('#recording audio').currentTime > start", arg=start)
        assert player.evaluate("player => !player.paused && player.currentTime") < start + 3
        for ending, words in (("srt", "00:00:00,240 --> "), ("vtt", "WEBVTT"), ("txt", f"{spoken['answer']}\n" * 4)):
            with page.expect_download() as download:
                page.click(f"#download-{ending}")
            assert download.value.suggested_filename.endswith(f".{ending}")
            text = Path(download.value.path()).read_text()
            assert words in text and text.count(spoken["answer"]) == 4


def test_what_cannot_be_transcribed_is_told_in_words(page, spoken, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF this is no audio")
    with wave.open(str(tmp_path / "long.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(4000)
        file.writeframes(bytes(4000 * 3601))
    errors = {None: "Give a recording.", "broken.wav": "This cannot be transcribed: ", "long.wav": "at most 3600"}
    for file, words in errors.items():
        page.get_by_role("tab", name="Transcribe").click()
        if file:
            page.locator("#recording input[type=file]").set_input_files(tmp_path / file)
            page.wait_for_timeout(2000)
        page.click("#transcribe")
        page.get_by_text(words).first.wait_for()
        assert page.locator("#download-srt").is_disabled()
        page.reload()
    give_recording(page, EXAMPLES / spoken["audio"][0])
    expect(page.locator("#segments [data-start]")).to_contain_text(spoken["answer"])


def test_text_of_segments_is_escaped_and_doubt_is_told(browser, own_model, spoken, tmp_path, monkeypatch):
    """Also what Gradio's templates would take for an expression."""
    text = '<b id=bold>${6 * 7} {{value}} & "so"'
    monkeypatch.setattr(own_model.processor, "decode", lambda output, **settings: [text] * len(output))
    monkeypatch.setattr(sys.modules["transcribe"], "find_doubt", lambda samples, answer: "<i id=reason>")
    with launch(own_model) as (address, _), visit(browser, address) as page:
        give_recording(page, EXAMPLES / spoken["audio"][0])
        row = page.locator("#segments [data-start]")
        expect(row.locator("span")).to_have_text(f"{text}Doubtful: <i id=reason>", timeout=TIMEOUT)
        assert not page.locator("#bold, #reason").count()


def test_the_spectrogram_ends_with_the_clip(own_model, spoken):
    """The demo's tokens are fixed: features and attention are of whole windows of 3 s."""
    clip = EXAMPLES / spoken["audio"][0]
    *_, (_, _, figure, _) = own_model.answer(str(clip), None, None)
    axes, over = figure.axes
    seconds = len(fetch_audio(clip)) / SAMPLING_RATE
    assert axes.get_xlim() == over.get_xlim() == (0, seconds)
    assert axes.images[0].get_array().shape[1] == -(-len(fetch_audio(clip)) // 160)
    assert over.collections[0].get_datalim(over.transData).x1 < seconds + 0.02


def test_pictures_are_no_examples_where_vision_is_untrained(browser, own_model, monkeypatch):
    monkeypatch.setattr(own_model.model.config, "vision_is_trained", False)
    with launch(own_model) as (address, _), visit(browser, address) as page:
        page.get_by_text("Transcribe the audio.").first.wait_for()
        assert not page.get_by_text("Answer the spoken question about the photo.").count()


def test_transcription_stops_for_a_visitor_who_left(own_model, spoken, tmp_path):
    """A question that comes after is answered, and the rest of the recording is not transcribed."""
    own_model.processor.piece_seconds = 4.0
    recording = join_clips(spoken, tmp_path / "long.wav", 100, 2.0)
    with launch(own_model) as (address, count), httpx.Client(base_url=f"{address}gradio_api/", timeout=60) as client:
        (path,) = client.post("upload", files={"files": ("long.wav", recording.read_bytes())}).json()
        clip = {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = {"data": [clip], "fn_index": own_index(client, "transcribe"), "session_hash": "one"}
        assert client.post("queue/join", json=body).status_code == 200
        with client.stream("GET", "queue/data", params={"session_hash": "one"}) as response:
            next(line for line in response.iter_lines() if "data-start" in line)
        time.sleep(5)
        calls = count["calls"]
        time.sleep(3)
        assert count["calls"] == calls < 100
        assert own_model.executor.submit(lambda: "free").result(5) == "free"


def test_another_recording_ends_the_transcription_of_the_first(browser, own_model, spoken, tmp_path):
    own_model.processor.piece_seconds = 4.0
    recording = join_clips(spoken, tmp_path / "long.wav", 200, 2.0)
    with launch(own_model) as (address, count), visit(browser, address) as page:
        give_recording(page, recording)
        rows = page.locator("#segments [data-start]")
        rows.nth(2).wait_for()
        page.locator("#recording").get_by_label("Clear").click()
        expect(rows).to_have_count(0)
        page.wait_for_timeout(3000)
        calls = count["calls"]
        give_recording(page, EXAMPLES / spoken["audio"][0])
        expect(page.locator("#download-txt")).to_be_enabled(timeout=TIMEOUT)
        expect(rows).to_have_count(1)
        assert count["calls"] == calls + 1 < 200


def own_index(client, name: str) -> int:
    """Returns the number of the page's function of a name."""
    config = client.get("../config").json()
    return next(each["id"] for each in config["dependencies"] if each["api_name"] == name)
