"""make test ONLY=tests/test_evaluation.py: the demo checkpoint is asked, scored and shown in its card."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import datasets
import httpx
import numpy as np
import openai
import pytest
import soundfile
import yaml
from accelerate.commands import launch
from bombs import gif
from data_rows import chat, damage_png, write_lines
from filelock import FileLock
from helpers import text
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image
from serving import serve
from sounds import encode
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

import upload
from audio_utils import SAMPLING_RATE, fetch_audio
from demo.ask import EXAMPLES, read_examples, read_rows, transcription_examples, write_questions, write_rows
from demo.world import WORLD
from evaluation import __main__ as evaluation
from evaluation import card, pieces, scoring
from evaluation.generate import Server, load
from evaluation.leaderboard import BENCHMARK
from evaluation.scoring import AS_GIVEN, read_folder, read_predictions
from evaluation.settings import Settings
from publishing import check as checking
from publishing import paths
from publishing.card import ENTRIES
from transcribe import transcribe


LASTING = ("row", "group", "audio_filepath", "duration", "prompt", "text", "pred_text")
SHORT = ("--max-new-tokens", "12", "--dtype", "float32")  # float32: many CPUs have no products of bfloat16


def predict(repo, data, output, *more) -> list[dict]:
    """The predictions as given."""
    words = ["predict", str(repo), "--data", str(data), "--output", str(output), *SHORT]
    evaluation.main([*words, *map(str, more)])
    return read_predictions(Path(output) / "predictions.jsonl")


def refusal(capsys, *arguments) -> str:
    """The error, on one line, with which a prediction is refused."""
    with pytest.raises(SystemExit):
        predict(*arguments)
    return " ".join(capsys.readouterr().err.split())


def lasting(rows: list[dict]) -> list[dict]:
    """Keeps what does not depend on the clock or on where the data lie."""
    return [{name: row.get(name) for name in LASTING} for row in rows]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Each transcription, picture and question, and some of the others."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = write_questions(path)
    return write_lines(path, [row for number, row in enumerate(rows) if row["skill"] != "question" or number % 2])


@pytest.fixture(scope="module")
def results(demo_repo, questions, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("evaluation") / "results"
    arms = ("--arms", "silence", "swapped", "no-image", "text")
    predict(demo_repo, questions, output, "--group-column", "skill", "--transcript-column", "said", *arms)
    evaluation.main(["score", str(output)])
    return output


RECORDINGS = ("--audio-column", "wav", "--text-column", "sentence")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """Four recordings with their transcripts, under names of their own."""
    rows = [
        {"wav": str(EXAMPLES / example["audio"][0]), "sentence": example["answer"]}
        for example in transcription_examples()[:4]
    ]
    return write_lines(tmp_path_factory.mktemp("recordings") / "recordings.jsonl", rows)


@pytest.fixture(scope="module")
def results_of_recordings(demo_repo, recordings, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("of-recordings") / "results"
    predict(demo_repo, recordings, output, *RECORDINGS)
    return output


def test_arms_tell_whether_the_model_uses_the_audio(results, questions):
    scores = json.loads((results / "scores.json").read_text())["arms"]
    rows = {arm: len(rows) for arm, rows in read_folder(results).items()}
    with_audio = rows[AS_GIVEN] - 4  # four rows are about a picture alone
    assert rows == {AS_GIVEN: rows[AS_GIVEN], "silence": with_audio, "swapped": with_audio, "text": with_audio} | {
        "no-image": scores["no-image"]["all"]["rows"]
    }
    asked = [row for row in read_rows(questions) if row["skill"] == "question"]
    kinds = Counter(WORLD["questions"][row["said"][0]] for row in asked)
    guess = max(kinds.values()) / len(asked)  # right by who always answers the kind that is asked most
    assert scores[AS_GIVEN]["all"]["wer"]["value"] < 0.05
    assert scores[AS_GIVEN]["question"]["exact"]["value"] == 1
    for arm in ("silence", "swapped"):
        assert scores[arm]["transcribe"]["wer"]["value"] > 0.4  # one word of three is right by chance
        assert scores[arm]["question"]["exact"]["value"] <= guess
    assert scores["no-image"]["question"]["exact"]["value"] <= 0.5


def test_predictions_say_what_they_are_of(results, questions, demo_repo):
    rows = read_predictions(results / "predictions.jsonl")
    assert [row["row"] for row in rows] == list(range(len(read_rows(questions))))
    assert rows[0]["place"] == "questions.jsonl:1" and rows[0]["duration"] > 0.5 and rows[0]["time"] > 0
    assert all((results / name).is_file() for row in rows for name in row["media"])
    assert not [row for row in rows if str(EXAMPLES) in json.dumps(row)]  # no paths of this disk
    manifest = json.loads((results / "manifest.json").read_text())
    assert manifest["rows"] == len(rows) and manifest["failed"] == 0
    assert manifest["model"]["weights"] == paths.weights_of(demo_repo)
    assert [{**source, "sha256": "", "files": ""} for source in manifest["data"]] == [
        {"name": "questions.jsonl", "sha256": "", "files": ""}
    ]
    assert (results / "report.html").read_text().count("<audio") >= 20


@pytest.mark.parametrize("seed", range(10))
def test_run_that_was_killed_goes_on(demo_repo, recordings, results_of_recordings, tmp_path, seed):
    """A kill leaves a file that ends anywhere, also within a line."""
    shutil.copytree(results_of_recordings, tmp_path / "results")
    path = tmp_path / "results" / "predictions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: random.Random(seed).randrange(len(whole))])
    again = predict(demo_repo, recordings, tmp_path / "results", *RECORDINGS)
    assert lasting(again) == lasting(read_predictions(results_of_recordings / "predictions.jsonl"))


def test_one_run_at_a_time_writes_into_a_folder(demo_repo, recordings, results_of_recordings, tmp_path, capsys):
    with FileLock(tmp_path / ".lock"):
        assert "is in use by another run" in refusal(capsys, demo_repo, recordings, tmp_path, *RECORDINGS)
    assert not (tmp_path / "predictions.jsonl").exists()


def test_what_two_runs_at_a_time_left_is_mended(demo_repo, recordings, results_of_recordings, tmp_path):
    """Rows twice, with two answers; a line within a line; and a file of a second process."""
    folder = shutil.copytree(results_of_recordings, tmp_path / "results")
    first, second, third, _ = read_predictions(folder / "predictions.jsonl")
    other = {**first, "pred_text": "of the other run"}
    within = json.dumps(second)[:50] + json.dumps(other)
    write_lines(folder / "predictions.jsonl", [first, within, second, other, "", {**second, "time": 7}])
    write_lines(folder / "predictions.jsonl.rank-1", [third, {**other, "pred_text": "of the other process"}, "{"])
    again = predict(demo_repo, recordings, folder, *RECORDINGS)
    assert again[:3] == [first, second, third]
    assert lasting(again) == lasting(read_predictions(results_of_recordings / "predictions.jsonl"))
    assert not list(folder.glob("*.rank-*"))


def test_a_group_that_utf8_cannot_hold_is_written_down(demo_repo, recordings, tmp_path):
    """JSON may hold half of a surrogate pair."""
    row = {**read_rows(recordings)[0], "voice": "\ud83d"}
    data = write_lines(tmp_path / "odd.jsonl", [row])
    for _ in range(2):  # the second one merges
        (line,) = predict(demo_repo, data, tmp_path / "results", *RECORDINGS, "--group-column", "voice")
        assert (line["group"], line["pred_text"]) == ("\ud83d", row["sentence"])
    evaluation.main(["score", str(tmp_path / "results")])
    assert "\ud83d" in json.loads((tmp_path / "results" / "scores.json").read_text())["arms"][AS_GIVEN]


def test_rows_that_fail_are_counted_and_named(demo_repo, recordings, tmp_path, caplog):
    good = read_rows(recordings)[0]
    (tmp_path / "broken.wav").write_bytes(b"RIFF nothing")
    gone, broken, typed = ({**good, **other} for other in ({"wav": "gone.wav"}, {"wav": "broken.wav"}, {"sentence": 3}))
    data = write_lines(tmp_path / "some.jsonl", [gone, good, broken, "{", typed])
    rows = predict(demo_repo, data, tmp_path / "results", *RECORDINGS, "--group-column", "sentence")
    assert ["error" in row for row in rows] == [True, False, True, True, True]
    assert "some.jsonl:1: there is no file" in rows[0]["error"] and "some.jsonl:3: " in rows[2]["error"]
    assert rows[1]["pred_text"] == good["sentence"]
    evaluation.main(["score", str(tmp_path / "results")])
    scores = json.loads((tmp_path / "results" / "scores.json").read_text())["arms"][AS_GIVEN]["all"]
    assert (scores["rows"], scores["failed"], scores["wer"]["value"]) == (5, 4, 0)


@pytest.fixture(scope="module")
def broken(tmp_path_factory, photo) -> Path:
    """Files that their decoders refuse with errors of many types, and a video, a picture and a clip that are whole."""
    folder = tmp_path_factory.mktemp("broken")
    clip, picture = (EXAMPLES / read_examples()[0]["audio"][0]).read_bytes(), photo.read_bytes()
    film = encode(fetch_audio(clip).numpy(), "aac.m4a", video=True)
    Image.new("RGB", (32, 32)).save(folder / "whole.avif")
    contents = {"good.png": picture, "damaged.png": damage_png(picture), "huge.gif": gif(60_000)}
    contents["zeroed.avif"] = (folder / "whole.avif").read_bytes()[:-20] + bytes(20)  # RuntimeError
    contents |= {"good.mp4": film, "cut.mp4": film[:-500], "nothing.webm": b"\x1a\x45\xdf\xa3 and nothing more"}
    contents |= {"good.wav": clip, "cut.wav": clip[:40]}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def about(modality: str, name: str) -> dict:
    return chat({"type": modality, modality: name}, text("What is this?"), answer="one")


def test_content_that_no_decoder_reads_is_an_error_of_its_row(demo_repo, broken, tmp_path):
    names = {
        "image": ["good.png", "damaged.png", "huge.gif", "zeroed.avif"],
        "video": ["good.mp4", "cut.mp4", "nothing.webm"],
        "audio": ["cut.wav", "good.wav"],
    }
    rows = [{**about(type, name), "kind": type} for type, files in names.items() for name in files]
    data = write_lines(broken / "broken.jsonl", rows)
    rows = predict(demo_repo, data, tmp_path / "results", "--group-column", "kind")
    assert [row["group"] for row in rows] == [type for type, files in names.items() for _ in files]
    assert ["error" in row for row in rows] == [False, True, True, True, False, True, True, True, False]
    assert "broken.jsonl:2: SyntaxError: broken PNG file" in rows[1]["error"]
    assert "broken.jsonl:3: DecompressionBombError: " in rows[2]["error"]


@pytest.fixture(scope="module")
def address():
    """The address of a server with OpenAI's API that always gives the same answer."""

    async def models(request):
        return JSONResponse({"object": "list", "data": [{"id": "someone", "object": "model"}]})

    async def answer(request):
        await request.json()
        return JSONResponse({"id": "1", "choices": [{"message": {"role": "assistant", "content": "one"}}]})

    routes = [Route("/v1/models", models), Route("/v1/chat/completions", answer, methods=["POST"])]
    with serve(Starlette(routes=routes)) as address:
        yield f"{address}/v1"


def test_a_server_is_not_sent_what_no_decoder_reads(demo_repo, broken, tmp_path, address):
    data = write_lines(broken / "served.jsonl", [about("image", name) for name in ("damaged.png", "good.png")])
    rows = predict(demo_repo, data, tmp_path, "--backend", "vllm", "--url", address)
    assert [row.get("pred_text") for row in rows] == [None, "one"]
    assert "served.jsonl:1: SyntaxError" in rows[0]["error"]


def test_the_longest_piece_is_measured_and_stored(demo_repo, tmp_path, capsys, monkeypatch):
    """The small model was trained on clips of up to 3 s; of longer ones it leaves most words out."""
    rows = [{"wav": str(EXAMPLES / row["audio"][0]), "sentence": row["answer"]} for row in transcription_examples()]
    folder, data = tmp_path / "repo", write_lines(tmp_path / "rows.jsonl", rows)
    shutil.copytree(demo_repo, folder)
    monkeypatch.setattr(pieces, "LENGTHS", (1.5, 2.5, 9, 12))
    command = ["pieces", str(folder), "--data", str(data), *RECORDINGS, "--dtype", "float32", "--write"]
    evaluation.main(command)
    *lines, _, longest = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1.5", "2.5", "9"] and "(piece_seconds)" in longest
    assert json.loads((folder / "processor_config.json").read_text())["piece_seconds"] == 2.5
    paths.check_content(folder, paths.read_checksums(folder))
    monkeypatch.setattr(pieces, "LENGTHS", (9, 12))
    with pytest.raises(SystemExit):
        evaluation.main(command)
    assert "no length that the model can take" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluation.main(["pieces", "owner/name", "--data", str(data), "--write"])
    assert "--write needs a folder" in capsys.readouterr().err


def test_long_form(demo_repo, tmp_path, capsys):
    """A recording of any length is transcribed in pieces; a row with more than a recording is refused."""
    clips = [fetch_audio(EXAMPLES / example["audio"][0]).numpy() for example in transcription_examples()[:6]]
    gap = np.zeros(SAMPLING_RATE, np.float32)
    joined = np.concatenate([part for clip in clips for part in (clip, gap)])
    soundfile.write(tmp_path / "long.flac", joined, SAMPLING_RATE)
    words = " ".join(example["answer"] for example in transcription_examples()[:6])
    clip, question = {"type": "audio", "path": "long.flac"}, text("Transcribe the audio.")
    Image.new("RGB", (56, 56)).save(tmp_path / "photo.png")
    rows = [chat(clip, question, answer=words), chat(clip, {"type": "image", "path": "photo.png"}, question)]
    arguments = ("--data", str(write_lines(tmp_path / "long.jsonl", rows)), "--output", str(tmp_path / "results"))
    arguments = ["predict", str(demo_repo), *arguments, "--long-form", "--dtype", "float32"]
    evaluation.main([*arguments, "--batch-size", "4"])
    row, refused = read_predictions(tmp_path / "results" / "predictions.jsonl")
    processor, model = load(demo_repo, "float32")
    assert row["pred_text"] == transcribe(model, processor, joined, batch_size=4).text
    assert len(row["pred_text"].split()) > len(words.split()) / 2
    assert row["duration"] == pytest.approx(len(joined) / SAMPLING_RATE, abs=0.01)
    assert "needs one message with one clip" in refused["error"]
    assert json.loads((tmp_path / "results" / "manifest.json").read_text())["generation"]["long_form"] is True
    for message, *change in (("leave one out", "--arms", "text"), ("leave --max-new-tokens", "--max-new-tokens", "9")):
        with pytest.raises(SystemExit):
            evaluation.main([*arguments, *change])
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "more, message",
    [
        (("--max-new-tokens", "13"), "holds the predictions of another run"),
        (("--text-column", "x"), "must be given together"),
        (("--streaming", "--arms", "swapped"), "which --streaming cannot reach"),
        (("--audio-tokens", "half"), "argument --audio-tokens: invalid choice: 'half'"),
        (("--arms", "text", "words"), "argument --arms: invalid choice: 'words'"),
        (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        (("--backend", "server"), "argument --backend: invalid choice: 'server'"),
        (("--backend", "vllm"), "needs --url"),
    ],
)
def test_what_cannot_be_asked_is_refused(demo_repo, questions, results, capsys, more, message):
    grouped = ("--group-column", "skill", "--transcript-column", "said")
    assert message in refusal(capsys, demo_repo, questions, results, *grouped, *more)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--help", "python -m evaluation score DIR"),
        ("predict --help", "--served-name"),
        ("predict REPO", "required: --data, --output"),
        ("predict REPO --data FILE --output DIR --batch-size 0", "--batch-size must be 1 or more, got 0"),
        ("score nowhere", "There is no folder nowhere"),
    ],
)
def test_the_command_line_answers_before_slow_imports(words, message):
    code = "import sys\nfrom evaluation.__main__ import main\ntry:\n    main()\nfinally:\n    print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, cwd=paths.ROOT)
    assert message in run.stdout + run.stderr
    loaded = set(run.stdout.splitlines()[-1].split())
    assert "evaluation.settings" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "numpy", "huggingface_hub"}


def test_the_manifest_has_a_command_that_gives_the_same_settings():
    settings = Settings("a repo", ["a.jsonl", "b:test"], "out", limit=0, arms=["text"], batch_size=8, keep_media=False)
    assert settings.command == (
        "python -m evaluation predict 'a repo' --data a.jsonl b:test --output out --limit 0 --arms text --no-media"
    )


def write_set(folder: Path, form: str, text: str) -> Path:
    """A set of one recording under a name that does not tell its content: JSON lines, a saved folder, or Parquet."""
    folder.mkdir()
    clip = folder / "clip.wav"
    shutil.copyfile(EXAMPLES / transcription_examples()[0]["audio"][0], clip)
    if form == "lines":
        return write_lines(folder / "data.jsonl", [{"wav": clip.name, "sentence": text, "voice": text}])
    features = {"wav": datasets.Audio(), "sentence": datasets.Value("string"), "voice": datasets.Value("string")}
    rows = [{"wav": {"bytes": clip.read_bytes()}, "sentence": text, "voice": text}]
    clip.unlink()
    dataset = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    dataset.save_to_disk(folder) if form == "saved" else dataset.to_parquet(folder / "train.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["lines", "saved", "parquet"])
def test_other_data_under_the_same_name_are_refused(demo_repo, tmp_path, capsys, form, streaming):
    said = transcription_examples()[0]["answer"]
    data = write_set(tmp_path / "data", form, said)
    arguments = (demo_repo, data, tmp_path / "results", *RECORDINGS, "--no-media", *["--streaming"] * streaming)
    (row,) = rows = predict(*arguments)
    assert (row["prompt"], row["text"], row["pred_text"]) == ("Transcribe the audio.", said, said)
    assert row["audio_filepath"] is None and row["media"] == []
    assert predict(*arguments) == rows
    shutil.rmtree(tmp_path / "data")
    write_set(tmp_path / "data", form, "three red stars")
    changed = {"lines": "sha256 of data.jsonl", "saved": "fingerprint of data", "parquet": "files of data"}
    error = refusal(capsys, *arguments)
    assert "holds the predictions of another run" in error and f"{changed[form]} was " in error


def test_a_clip_that_changed_is_refused(demo_repo, tmp_path, capsys):
    data = write_set(tmp_path / "data", "lines", "one")
    predict(demo_repo, data, tmp_path / "results", *RECORDINGS)
    os.utime(data.parent / "clip.wav", (0, 0))
    assert "files of data.jsonl was " in refusal(capsys, demo_repo, data, tmp_path / "results", *RECORDINGS)
    # A run of a release that did not write the files down goes on, and writes them down.
    manifest = json.loads((tmp_path / "results" / "manifest.json").read_text())
    described = manifest["data"][0]
    manifest["data"] = [{"name": described["name"], "sha256": described["sha256"]}]
    (tmp_path / "results" / "manifest.json").write_text(json.dumps(manifest))
    predict(demo_repo, data, tmp_path / "results", *RECORDINGS)
    assert json.loads((tmp_path / "results" / "manifest.json").read_text())["data"][0].keys() == described.keys()


@pytest.mark.parametrize("form", ["lines", "saved"])
def test_a_group_named_all_is_refused_before_the_model_is_loaded(tmp_path, capsys, form):
    data = write_set(tmp_path / "data", form, "all")
    (tmp_path / "no-model").mkdir()
    for name in ("config.json", "processor_config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / "no-model" / name).touch()  # an error once they are loaded
    more = (*RECORDINGS, "--group-column", "voice")
    error = refusal(capsys, tmp_path / "no-model", data, tmp_path / "results", *more)
    assert f"{data}:1: the group is named 'all', as the scores over all rows are" in error


def test_a_streamed_group_named_all_is_an_error_of_its_row(demo_repo, tmp_path):
    data = write_set(tmp_path / "data", "lines", "all")
    more = (*RECORDINGS, "--group-column", "voice", "--streaming")
    (row,) = predict(demo_repo, data, tmp_path / "results", *more)
    assert "the group is named 'all'" in row["error"]


@pytest.mark.parametrize("pattern", ["processor_config.json", "model.safetensors"])
def test_a_model_that_changed_is_refused(demo_repo, recordings, tmp_path, capsys, pattern):
    model = shutil.copytree(demo_repo, tmp_path / "model")
    arguments = (model, recordings, tmp_path / "results", *RECORDINGS, "--no-media", "--limit", "1")
    predict(*arguments)
    with open(model / pattern, "ab") as file:
        file.write(b" ")
    error = refusal(capsys, *arguments)
    assert f"{pattern} of {'settings' if 'json' in pattern else 'weights'} of model was " in error


@pytest.mark.parametrize("status, is_of_the_row", [(400, True), (413, True), (422, True), (401, False), (429, False)])
def test_what_another_row_would_meet_too_ends_the_run(status, is_of_the_row):
    response = httpx.Response(status, request=httpx.Request("POST", "http://server"))
    error = openai.APIStatusError("refused", response=response, body=None)
    if is_of_the_row:
        assert Server.check(types.SimpleNamespace(url="http://server"), error) is error
        return
    with pytest.raises(ConnectionError, match="Run the command again to go on"):
        Server.check(types.SimpleNamespace(url="http://server"), error)


def test_a_server_that_is_not_there(demo_repo, recordings, tmp_path, capsys):
    address = "http://127.0.0.1:9/v1"
    error = refusal(capsys, demo_repo, recordings, tmp_path, *RECORDINGS, "--backend", "vllm", "--url", address)
    assert f"{address} does not answer as a server" in error


@pytest.fixture
def scored(demo_repo, results, tmp_path) -> Path:
    """A folder with the scores in its card."""
    folder = shutil.copytree(demo_repo, tmp_path / "repo")
    card.add_results(folder, results)
    return folder


def test_the_card_has_the_scores(scored):
    assert "predictions of these weights give" in card.check_results(scored)
    results = ModelCard.load(scored / "README.md").data.eval_results
    shown = {(result.dataset_config, result.metric_type): result.metric_value for result in results}
    assert shown["question", "exact_match"] == 100 and shown["transcribe", "wer"] < 5 and shown[None, "wer"] < 5
    card.add_results(scored, shutil.copytree(scored / "evaluation", scored.parent / "again"))
    assert (scored / "README.md").read_text().count("## Scores") == 1


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("README.md", "value: 100.0", "value: 100.1", "metadata of README.md and the predictions"),
        ("README.md", r"\| as given \| transcribe", "| as given | transcribed", "table of scores in README.md"),
        ("scores.json", r'("silence".*?"macro_wer": )[\d.]+', r"\g<1>0.5", "says silence/all/macro_wer = 0.5, but"),
        ("manifest.json", '"[0-9a-f]{64}"', f'"{"0" * 64}"', "are of other weights"),  # those of the weights come first
        ("manifest.json", '"rows": ', '"rows": 0, "all": ', "of an unfinished run"),
        (
            "predictions.jsonl",
            '"pred_text": "[^"]+"',
            '"pred_text": "nothing"',
            "given/all/.* but its predictions give",
        ),
    ],
)
def test_scores_that_the_predictions_do_not_give_are_refused(scored, name, old, new, message):
    """Checksums are written again, as someone would who means to mislead."""
    path = scored / name if name == "README.md" else scored / "evaluation" / name
    text, count = re.subn(old, new, path.read_text(), count=1, flags=re.DOTALL)
    assert count
    path.write_text(text)
    paths.write_checksums(scored, {})
    with pytest.raises(ValueError, match=message):
        card.check_results(scored)


def publish_leaderboard(results: Path, folder: Path, change=lambda manifest: None) -> list[dict]:
    """
    Adds predictions as of all sets of the Open ASR Leaderboard to a folder, the rows in turns, and returns the entries.
    """
    manifest, rows = json.loads((results / "manifest.json").read_text()), read_rows(results / "predictions.jsonl")
    names = [f"{BENCHMARK['id']}:{name}" for name in BENCHMARK["tasks"]]
    manifest["data"] = [{"name": name, "revision": "3a1c", "files": "0"} for name in names]
    change(manifest)
    rows = [{**row, "place": f"{names[number % len(names)]}:{number}"} for number, row in enumerate(rows)]
    write_rows(results / "predictions.jsonl", rows)
    paths.write_json(results / "manifest.json", manifest)
    card.add_results(folder, results)
    assert "predictions of these weights give" in card.check_results(folder)
    return yaml.safe_load((folder / ENTRIES).read_text()) if (folder / ENTRIES).exists() else []


def test_scores_for_the_leaderboard(demo_repo, results, tmp_path):
    folder, results = shutil.copytree(demo_repo, tmp_path / "repo"), shutil.copytree(results, tmp_path / "results")
    entries = parse_eval_result_entries(publish_leaderboard(results, folder))
    mean, *others = entries
    assert {entry.task_id for entry in others} == set(BENCHMARK["tasks"].values()) and mean.task_id == "mean_wer"
    assert {(entry.dataset_id, entry.dataset_revision) for entry in entries} == {(BENCHMARK["id"], "3a1c")}
    assert mean.value == pytest.approx(np.mean([entry.value for entry in others]), abs=0.01) and mean.value < 5
    rows = [row for row in read_rows(results / "predictions.jsonl") if ":librispeech:test.other:" in row["place"]]
    (other,) = (entry.value for entry in others if entry.task_id == "librispeech_other_wer")
    assert len(rows) > 3 and other == round(100 * scoring.score(rows)["wer"]["value"], 2)
    checking.check_files(folder)

    (folder / ENTRIES).write_text((folder / ENTRIES).read_text().replace("value: ", "value: 1", 1))
    with pytest.raises(ValueError, match="open_asr_leaderboard.yaml is not what the predictions in evaluation/ give"):
        card.check_results(folder)
    shutil.rmtree(folder / "evaluation")
    (folder / "README.md").write_text((demo_repo / "README.md").read_text())
    paths.write_checksums(folder, {})
    with pytest.raises(ValueError, match="open_asr_leaderboard.yaml shows scores, but there is no evaluation/"):
        checking.check_files(folder)


@pytest.mark.parametrize(
    "change, count",
    [
        (lambda manifest: manifest.update(limit=40), 0),
        (lambda manifest: [source.pop("revision") for source in manifest["data"]], 0),
        (lambda manifest: manifest["data"].pop(), 7),
        (lambda manifest: [source.update(name="other/data:test") for source in manifest["data"]], 0),
    ],
)
def test_parts_of_the_leaderboard(demo_repo, results, tmp_path, change, count):
    """A set that was not asked whole, or is not the Hub's, has no entry; without all sets there is no mean."""
    folder, results = shutil.copytree(demo_repo, tmp_path / "repo"), shutil.copytree(results, tmp_path / "results")
    entries = publish_leaderboard(results, folder, change)
    assert len(entries) == count and all(entry["dataset"]["task_id"] != "mean_wer" for entry in entries)


def test_scores_without_predictions_are_refused(scored):
    shutil.rmtree(scored / "evaluation")
    paths.write_checksums(scored, {})
    with pytest.raises(ValueError, match="with the predictions they come from"):
        checking.check_files(scored)


def test_upload_adds_and_checks_the_scores(demo_repo, results, tmp_path, monkeypatch, capsys):
    """`push --results` and `check`, without loading the model or a Hub."""
    folder = shutil.copytree(demo_repo, tmp_path / "repo")
    monkeypatch.setattr("publishing.check.check", lambda folder, trust_code: ({"files": "checked"}, {}))
    commit = types.SimpleNamespace(pr_url=None, commit_url="https://hub/commit/1", oid="1")
    monkeypatch.setattr("publishing.hub.push", lambda folder, repo, loaded, **options: commit)
    upload.main(["push", str(folder), "a/b", "--results", str(results)])
    assert "## Scores" in (folder / "README.md").read_text() and (folder / "evaluation" / "scores.json").is_file()
    upload.main(["check", str(folder)])
    assert re.search(r"/commit/1\ncommit 1\nfiles +checked\nscores +\d+ predictions", capsys.readouterr().out)
    card_text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card_text.replace("value: ", "value: 9", 1))
    for command in (["check", str(folder)], ["push", str(folder), "a/b"]):
        with pytest.raises(SystemExit, match="1"):
            upload.main(command)
        assert "metadata of README.md and the predictions" in capsys.readouterr().err


def test_files_too_large_to_be_read_are_named(demo_repo, tmp_path):
    folder = shutil.copytree(demo_repo, tmp_path / "repo")
    (folder / "evaluation").mkdir()
    names = ["README.md", "config.json", "SHA256SUMS"]
    names += [f"evaluation/{name}" for name in ("manifest.json", "scores.json", "predictions-silence.jsonl")]
    for name in names:
        path, limit = folder / name, checking.LARGEST[Path(name).name.replace("-silence", "*")]
        content = path.read_bytes() if path.exists() else None
        with path.open("ab") as file:
            file.truncate(limit + 1)  # which takes no space on the disk
        with pytest.raises(ValueError, match=f"{name}: {limit + 1:,} bytes are past the limit of {limit:,}"):
            checking.check_files(folder)
        path.unlink() if content is None else path.write_bytes(content)


def start(repo, data, output, *more, launcher=()) -> subprocess.Popen:
    command = [sys.executable, *launcher, "-m", "evaluation", "predict", str(repo), "--data", str(data)]
    command += ["--output", str(output), *SHORT, "--batch-size", "1", *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.endurance
def test_ten_kills(demo_repo, questions, tmp_path):
    output, rng = tmp_path / "results", random.Random(0)
    path = output / "predictions.jsonl"

    def lines() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for _ in range(10):
        process, before = start(demo_repo, questions, output), lines()
        while lines() == before:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(demo_repo, questions, output).wait() == 0
    whole = predict(demo_repo, questions, tmp_path / "whole", "--batch-size", 1)
    assert lasting(read_predictions(output / "predictions.jsonl")) == lasting(whole)


@pytest.mark.endurance
def test_two_processes_ask_the_same(demo_repo, recordings, results_of_recordings, tmp_path):
    launcher = [launch.__file__, "--cpu", "--num_processes", "2", "--main_process_port", "0"]
    process = start(demo_repo, recordings, tmp_path / "results", *RECORDINGS, launcher=launcher)
    assert process.wait() == 0
    rows, expected = (
        read_predictions(folder / "predictions.jsonl") for folder in (tmp_path / "results", results_of_recordings)
    )
    assert lasting(rows) == lasting(expected)
    assert not list((tmp_path / "results").glob("*.rank-*"))
