"""Data -> questions -> predictions in a folder; docs/evaluation.md has the files that it holds."""

import importlib.metadata
import itertools
import json
import math
import platform
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm
from transformers.utils import logging

from collator import ChatCollator
from configuration_qwen2_audio_vl import TRANSCRIBE
from evaluation.generate import LocalModel, LongForm, Server, load, write_sound
from evaluation.questions import Question, Questions, check_groups
from evaluation.rows import describe_data, describe_model, list_changes, load_rows
from evaluation.scoring import AS_GIVEN, compare, file_of, read_prediction
from evaluation.settings import Settings
from publishing.paths import load_processor, only_run, replace_file, resolve, write_json
from shipped_files import WHOLE_MODEL
from transcribe import longest_piece


logger = logging.get_logger(__name__)

BUFFER = 16  # batches that are sorted by length together
THUMBNAIL = 320  # pixels a side of the pictures that the report shows
VERSIONS = ("torch", "transformers", "accelerate", "datasets", "av", "numpy", "kaldialign")
# What a run that goes on must have in common with the one that was stopped, beside the data.
LASTING = ("model", "columns", "instruction", "group_column", "transcript_column", "backend", "served_name")
LASTING += ("generation",)


def predict(repo: str | Path, data: list[str | Path], output: str | Path, **settings) -> Path:
    """
    Asks a model about every row of the data, and writes every answer into a folder. Started again, it goes on. The
    settings are the other fields of [`Settings`]. Raises a ValueError if they exclude each other, the data cannot be
    read, or the folder belongs to another run, and a ConnectionError if the server does not answer.
    """
    settings = Settings(repo, data, output, **settings)
    resolve(settings.repo, WHOLE_MODEL)  # a model that is not there is reported before the data is read
    with only_run(settings.output, "--output", PartialState().is_main_process):
        predict_arms(settings)
    return settings.output


def predict_arms(settings: Settings):
    state, folder = PartialState(), settings.output
    instruction = TRANSCRIBE if settings.instruction is None else settings.instruction
    rows = load_data(settings)
    if state.is_main_process:
        manifest = make_manifest(settings, instruction)
        refuse_another_run(folder, manifest)
    processor, model = load_backend(settings)
    collator = ChatCollator(processor, instruction=instruction)
    limits = {"max_seconds": math.inf} if settings.long_form else {}
    questions = Questions(rows, collator, settings.group_column, settings.transcript_column, **limits)
    if state.is_main_process:
        (folder / "media").mkdir(exist_ok=True)
        manifest |= {"device": model.device, "dtype": model.dtype}
        write_json(folder / "manifest.json", manifest)
    state.wait_for_everyone()
    for arm in (AS_GIVEN, *settings.arms):
        predict_arm(arm, questions, model, settings)
    if state.is_main_process:
        done = rows_done(folder, AS_GIVEN)
        failed = sum("error" in row for row in done.values())
        write_json(folder / "manifest.json", {**manifest, "rows": len(done), "failed": failed})


def load_data(settings: Settings):
    """Loads the rows that are asked; refuses groups that cannot be scored before a model is loaded."""
    keep = tuple(filter(None, (settings.group_column, settings.transcript_column)))
    rows = load_rows(settings.data, settings.streaming, settings.columns, keep)
    if settings.limit is not None:
        rows = rows.take(settings.limit if settings.streaming else min(settings.limit, len(rows)))
    if settings.group_column is not None and not settings.streaming:
        check_groups(rows, settings.group_column)
    return rows


def load_backend(settings: Settings) -> tuple:
    """Returns the processor and what answers conversations."""
    limits = settings.batch_size, settings.max_new_tokens
    if settings.backend == "vllm":
        processor = load_processor(settings.repo, settings.audio_tokens)
        answers = Server(settings.url, settings.served_name, *limits)
    else:
        processor, model = load(settings.repo, settings.dtype, settings.audio_tokens)
        answers = LocalModel(processor, model.to(PartialState().device), *limits)
    return processor, LongForm(answers, longest_piece(processor)) if settings.long_form else answers


def predict_arm(arm: str, questions: Questions, model: LocalModel | Server | LongForm, settings: Settings):
    """Asks the rows that have no answer yet, shared among the processes, and merges the answers."""
    state, folder = PartialState(), settings.output
    if state.is_main_process:
        merge(folder, arm)
    state.wait_for_everyone()
    done = rows_done(folder, arm)
    state.wait_for_everyone()  # all have read before one writes
    mine = itertools.islice(enumerate(questions.rows), state.process_index, None, state.num_processes)
    rows = ((index, row) for index, row in mine if index not in done)
    name = file_of(arm) + (f".rank-{state.process_index}" if state.process_index else "")
    total = settings.limit if settings.streaming else len(questions.rows)
    with tqdm(desc=arm, total=total, initial=len(done), unit="row", disable=state.process_index > 0) as bar:
        same = write_lines(folder / name, answer_rows(rows, arm, questions, model, settings), arm, bar)
    state.wait_for_everyone()
    if state.is_main_process:
        merge(folder, arm)
    state.wait_for_everyone()
    if same:
        logger.warning(f"{arm}: {same} rows would be asked the same and are left out.")


def write_lines(path: Path, lines: Iterable[dict | None], arm: str, bar: tqdm) -> int:
    """Appends each line to a file as soon as it is there; returns how many rows have None instead of a line."""
    errors = words = right = answered = same = 0
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        for line in lines:
            bar.update()
            if line is None:
                same += 1
                continue
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            if "error" in line:
                logger.warning(f"{arm}: {line['error']}")
                continue
            comparison = compare(line)
            errors, words = errors + comparison.word_errors, words + comparison.words
            right, answered = right + comparison.is_exact, answered + 1
            rate = f", WER {errors / words:.1%}" if words else ""
            bar.set_postfix_str(f"exact {right / answered:.1%}{rate}", refresh=False)
    return same


def answer_rows(
    rows: Iterator[tuple[int, dict]],
    arm: str,
    questions: Questions,
    model: LocalModel | Server | LongForm,
    settings: Settings,
) -> Iterator[dict | None]:
    """Yields the line of each row, in the order of the answers; None for a row that the arm would ask the same."""
    # The batches of long recordings are their pieces, so few recordings are in memory.
    size = 1 if settings.long_form else BUFFER * settings.batch_size
    while buffered := list(itertools.islice(rows, size)):
        asked = []
        for index, row in buffered:
            question = questions.change(questions.read(index, row), arm)
            if question is None:
                yield None
            elif question.error:
                yield {**line_of(question), "error": question.error}
            else:
                asked.append(question)
        # The longest come first, so that memory runs out at the start or not at all.
        asked.sort(key=lambda question: question.duration, reverse=True)
        for index, answer, seconds in model([question.messages for question in asked]):
            question = asked[index]
            media = write_media(question, settings.output) if arm == AS_GIVEN and settings.keep_media else []
            line = line_of(question, media, duration=round(question.duration, 3), time=round(seconds, 4))
            failed = isinstance(answer, Exception)
            yield line | ({"error": f"{question.place}: {answer}"} if failed else {"pred_text": answer.strip()})


def line_of(question: Question, media: list[str] = (), **seconds: float) -> dict:
    """The line of predictions.jsonl about a question, without its answer or error."""
    line = {"row": question.row, "place": question.place, "group": question.group}
    line["audio_filepath"] = next((name for name in media if name.endswith(".mp3")), None)
    line |= {"media": list(media), "duration": None, "time": None, **seconds}
    return {**line, "prompt": question.prompt, "text": question.text}


def write_media(question: Question, folder: Path) -> list[str]:
    """Writes what the report plays and shows of a row; returns the names of the files."""
    names = []
    for number, clip in enumerate(question.clips, 1):
        names.append(f"media/{question.row:06}-{number}.mp3")
        write_sound(clip, str(folder / names[-1]), "mp3", "mp3")
    for number, item in enumerate(question.items("image"), 1):
        names.append(f"media/{question.row:06}-{number}.jpg")
        picture = item["image"].copy()
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        picture.save(folder / names[-1], quality=85)
    return names


def rank_files(folder: Path, arm: str) -> list[Path]:
    """The files of all processes of a run except the first, which writes into the file of the arm itself."""
    return sorted(folder.glob(f"{file_of(arm)}.rank-*"))


def rows_done(folder: Path, arm: str) -> dict[int, dict]:
    """
    Reads the predictions of an arm by their row. Of two lines with the same row the first one counts. Lines that a kill
    cut short, or into which two runs wrote at a time, do not count.
    """
    done = {}
    for path in (folder / file_of(arm), *rank_files(folder, arm)):
        lines = path.read_bytes().splitlines() if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = read_prediction(line, f"{path}:{number}")
            except ValueError as error:
                logger.warning(f"Left out, its row is asked again: {error}")
                continue
            done.setdefault(row["row"], row)
    return done


def merge(folder: Path, arm: str):
    """Replaces the files of an arm by one that has each row once, in the order of the data."""
    done = rows_done(folder, arm)
    with replace_file(folder / file_of(arm)) as file:
        file.writelines(json.dumps(done[row], ensure_ascii=False) + "\n" for row in sorted(done))
    for part in rank_files(folder, arm):
        part.unlink()


def make_manifest(settings: Settings, instruction: str) -> dict:
    """Describes everything that the predictions depend on, as far as it is known."""
    generation = {name: getattr(settings, name) for name in ("max_new_tokens", "audio_tokens", "batch_size")}
    if settings.long_form:
        generation = {"audio_tokens": settings.audio_tokens, "batch_size": settings.batch_size, "long_form": True}
    as_given = ("columns", "group_column", "transcript_column", "limit", "backend", "served_name", "command")
    return {
        "model": describe_model(settings.repo),
        "data": describe_data(settings.data, settings.columns),
        "instruction": instruction,
        "arms": [AS_GIVEN, *settings.arms],
        "generation": {**generation, "do_sample": False},
        **{name: getattr(settings, name) for name in as_given},
        "processes": PartialState().num_processes,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": None,
    }


def refuse_another_run(folder: Path, manifest: dict):
    """Raises a ValueError if the folder holds the predictions of other weights, data or settings."""
    path = folder / "manifest.json"
    if not path.is_file():
        if (folder / file_of(AS_GIVEN)).is_file():
            raise ValueError(f"{folder} holds predictions but no manifest.json; name a new --output.")
        return
    if differing := list_changes(json.loads(path.read_text(encoding="utf-8")), manifest, LASTING, "data"):
        raise ValueError(f"{folder} holds the predictions of another run; name a new --output. {'; '.join(differing)}")
