"""
Scores a model, in two steps that may be far apart in time and place:

    python -m evaluation predict REPO --data DATA --output DIR    asks the model row by row; goes on where it stopped
    python -m evaluation score DIR                                scores the answers; needs no model and no GPU

DATA is what `python -m training` takes: chat messages, or with --audio-column and --text-column recordings with
transcripts, from JSON lines or `datasets` (NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT). For several GPUs: `accelerate
launch -m evaluation`.
"""

import argparse
import base64
import importlib.metadata
import io
import itertools
import json
import logging as standard_logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple


# transformers imports peft and so bitsandbytes, which on a CPU warns about a kernel that it can do without.
standard_logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(standard_logging.ERROR)

import av
import datasets
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image, ImageOps
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, set_seed
from transformers.utils import logging

from audio_utils import SAMPLING_RATE
from collator import BadRow, ChatCollator, answer_text, content_of, place_of, prefix_errors, refuse_unreadable
from configuration_qwen2_audio_vl import TRANSCRIBE, WHOLE_MODEL
from evaluation.report import write_page
from evaluation.scoring import ALL, AS_GIVEN, compare, file_of, read_folder, read_prediction, score_arms, table
from publishing.paths import only_run, replace_file, resolve, sha256, write_json
from training.rows import changed_data, columns_of, describe_data, load_rows


logger = logging.get_logger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
ARMS = ("silence", "swapped", "no-image", "text")
BUFFER = 16  # batches that are sorted by length together
LINES = {"encoding": "utf-8", "errors": "backslashreplace"}  # half of a surrogate pair is an escape of JSON
THUMBNAIL = 320  # pixels a side of the pictures that the report shows
VERSIONS = ("torch", "transformers", "accelerate", "datasets", "av", "numpy", "kaldialign")
# What a run that goes on must have in common with the one that was stopped, beside the data.
LASTING = ("model", "columns", "instruction", "group_column", "transcript_column", "backend", "generation")


class Question(NamedTuple):
    """A row, ready to be asked."""

    row: int
    place: str
    group: str | None
    messages: list[dict]  # all but the answer; sound as samples at 16 kHz, pictures opened
    text: str  # the expected answer
    said: list[str]  # the transcript of each clip, where the data has them

    def items(self, kind: str) -> list[dict]:
        contents = (message["content"] for message in self.messages if isinstance(message["content"], list))
        return [item for content in contents for item in content if item["type"] == kind]

    @property
    def clips(self) -> list[np.ndarray]:
        return [item["audio"] for item in self.items("audio")]

    @property
    def duration(self) -> float:
        """Seconds of all clips."""
        return sum(map(len, self.clips)) / SAMPLING_RATE

    def replace(self, kind: str, replacements: Iterator[dict]) -> "Question":
        """With other items in the place of those of a kind; they are left out where there are no others."""
        messages = []
        for message in self.messages:
            content = message["content"]
            if isinstance(content, list):
                content = [next(replacements, None) if item["type"] == kind else item for item in content]
                content = [item for item in content if item is not None]
            messages.append({**message, "content": content})
        return self._replace(messages=messages)


class Questions:
    """Rows of data -> questions. Rows that cannot be asked raise [`BadRow`]."""

    def __init__(self, rows, collator: ChatCollator, group_column: str | None, transcript_column: str | None):
        self.rows, self.collator = rows, collator
        self.group_column, self.transcript_column = group_column, transcript_column

    def group(self, row: dict) -> str | None:
        with prefix_errors(place_of(row)):
            group = content_of(row).get(self.group_column)
            refuse_group(group)
            return None if group is None else str(group)

    def read(self, index: int, row: dict) -> Question:
        messages = self.collator.messages(row)
        with prefix_errors(place_of(row)):
            content = content_of(row)
            text, said = answer_text(messages[-1]["content"]), content.get(self.transcript_column)
            if said is None and content.get("messages") is None:  # a recording with its transcript
                said = text
            return Question(
                row=index,
                place=short_place(row),
                group=self.group(row),
                messages=self.open_messages(messages[:-1]),
                text=text,
                said=[said] if isinstance(said, str) else list(said or []),
            )

    @refuse_unreadable()
    def open_messages(self, messages: list[dict]) -> list[dict]:
        """Opens audio and pictures. Whatever is wrong with one of them is a ValueError."""
        (normalized,), _ = self.collator.processor.normalize_conversations(messages)
        opened = []
        for message in normalized:
            content = message["content"]
            if isinstance(content, list):
                content = [self.open_item(item) for item in content]
            opened.append({**message, "content": content})
        return opened

    def open_item(self, item: dict) -> dict:
        opened = self.collator.processor.open_item(item)
        if item["type"] == "audio":
            return {"type": "audio", "audio": opened["audio"].numpy()}
        if item["type"] == "image":
            return {"type": "image", "image": ImageOps.exif_transpose(opened["image"]).convert("RGB")}
        return opened

    def change(self, question: Question, arm: str) -> Question | None:
        """
        What an arm asks instead, None where it would ask the same.

        Raises:
            BadRow: if there is no clip to swap, or no transcript to show.
        """
        if arm == AS_GIVEN:
            return question
        if arm == "no-image":
            return question.replace("image", iter(())) if question.items("image") else None
        clips = question.clips
        if not clips:
            return None
        if arm == "silence":
            return question.replace("audio", ({"type": "audio", "audio": np.zeros_like(clip)} for clip in clips))
        if arm == "swapped":
            others = itertools.cycle(self.other(question).clips)
            return question.replace("audio", ({"type": "audio", "audio": clip} for clip in others))
        if len(question.said) != len(clips):
            raise BadRow(
                f"{question.place}: {len(question.said)} transcripts for {len(clips)} clips; the arm `text` needs one "
                "for each, in the column that --transcript-column names"
            )
        return question.replace("audio", ({"type": "text", "text": text} for text in question.said))

    def other(self, question: Question) -> Question:
        """The next question of the same group in which something else is said."""
        for step in range(1, len(self.rows)):
            index = (question.row + step) % len(self.rows)
            try:
                other = self.read(index, self.rows[index])
            except BadRow:
                continue
            is_same = (other.said or other.text) == (question.said or question.text)
            if other.clips and other.group == question.group and not is_same:
                return other
        raise BadRow(f"{question.place}: no other row has a clip that says something else")


def refuse_group(group):
    """
    Raises:
        ValueError: if a group would take the name of the scores over all rows.
    """
    if str(group) == ALL:
        raise ValueError(f"the group is named {ALL!r}, as the scores over all rows are; rename it")


def check_groups(rows: datasets.Dataset, column: str):
    """
    Raises:
        BadRow: if the group of a row has a name that cannot be scored. Other faults are found where rows are read.
    """
    for row in rows.select_columns([name for name in ("line", "place", column) if name in rows.column_names]):
        try:
            group = content_of(row).get(column)
        except (ValueError, RecursionError):
            continue
        with prefix_errors(place_of(row)):
            refuse_group(group)


def short_place(row: dict) -> str:
    """The place of a row without the folders above a local file, which are nobody's business."""
    source, _, number = place_of(row).rpartition(":")
    return f"{Path(source).name}:{number}" if Path(source).exists() else place_of(row)


class OwnModel:
    """Answers by `generate` in this process, a batch at a time."""

    def __init__(self, processor, options: argparse.Namespace):
        self.processor, self.options = processor, options
        self.model = AutoModel.from_pretrained(options.repo, trust_remote_code=True, dtype=options.dtype)
        self.model.to(PartialState().device).eval()
        self.device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        self.dtype = str(self.model.dtype).removeprefix("torch.")

    def __call__(self, conversations: list[list[dict]]) -> Iterator[tuple[int, str | Exception, float]]:
        """For each conversation its place in the list, the answer or why there is none, and the seconds it took."""
        for start in range(0, len(conversations), self.options.batch_size):
            yield from self.ask(list(enumerate(conversations))[start : start + self.options.batch_size])

    def ask(self, batch: list[tuple[int, list[dict]]]) -> Iterator[tuple[int, str | Exception, float]]:
        start = time.perf_counter()
        places, conversations = zip(*batch, strict=True)
        try:
            with refuse_unreadable():  # videos are opened here
                given = self.processor.answer(self.model, list(conversations), self.options.max_new_tokens)
        except ValueError as error:  # of one row, so the others are asked without it
            if len(batch) == 1:
                yield places[0], error, time.perf_counter() - start
                return
            for single in batch:
                yield from self.ask([single])
            return
        seconds = (time.perf_counter() - start) / len(batch)
        yield from ((place, text, seconds) for place, text in zip(places, given, strict=True))


class Server:
    """
    Answers by a server with OpenAI's API, such as `vllm serve`; a batch is the number of requests at a time.

    Raises:
        ConnectionError: if the server does not answer, at the start or later.
    """

    device, dtype = "of the server", "of the server"

    def __init__(self, processor, options: argparse.Namespace):
        from openai import OpenAI, OpenAIError

        self.options, self.error = options, OpenAIError
        self.client = OpenAI(base_url=options.url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
        try:
            served = [model.id for model in self.client.models.list()]
        except OpenAIError as error:
            raise ConnectionError(f"{options.url} does not answer as a server with OpenAI's API: {error}") from error
        if options.served_name not in (None, *served):
            raise ValueError(f"{options.url} serves {', '.join(served)}, not {options.served_name}.")
        self.name = options.served_name or served[0]

    def __call__(self, conversations: list[list[dict]]) -> Iterator[tuple[int, str | Exception, float]]:
        """As [`OwnModel`]; seconds are those since the last answer, so that their sum is the time of all."""
        with ThreadPoolExecutor(self.options.batch_size) as pool:
            last = time.perf_counter()
            asked = {pool.submit(self.ask, messages): place for place, messages in enumerate(conversations)}
            for future in as_completed(asked):
                now = time.perf_counter()
                yield asked[future], future.result(), now - last
                last = now

    def ask(self, messages: list[dict]) -> str | Exception:
        sent = [{**message, "content": openai_content(message["content"])} for message in messages]
        settings = {"temperature": 0, "max_tokens": self.options.max_new_tokens}
        try:
            reply = self.client.chat.completions.create(model=self.name, messages=sent, **settings)
        except self.error as error:
            if getattr(error, "status_code", 500) >= 500:  # the server's fault, not the row's
                raise ConnectionError(f"{self.options.url} failed: {error}. Run the command again to go on.") from error
            return error
        return reply.choices[0].message.content or ""


def write_sound(samples: np.ndarray, file, container: str, codec: str):
    """Writes samples at 16 kHz to a path or a binary file."""
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=SAMPLING_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate = SAMPLING_RATE
        output.mux([*stream.encode(frame), *stream.encode(None)])


def openai_content(content):
    if not isinstance(content, list):
        return content
    sent = []
    for item in content:
        if item["type"] == "audio":
            file = io.BytesIO()
            write_sound(item["audio"], file, "wav", "pcm_f32le")
            sound = {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}
            sent.append({"type": "input_audio", "input_audio": sound})
        elif item["type"] == "image":
            file = io.BytesIO()
            item["image"].save(file, "PNG")
            address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            sent.append({"type": "image_url", "image_url": {"url": address}})
        else:
            sent.append(item)
    return sent


BACKENDS = {"transformers": OwnModel, "vllm": Server}


def write_media(question: Question, folder: Path) -> list[str]:
    """Writes what the report plays and shows of a row; returns the names of the files."""
    names = []
    for number, clip in enumerate(question.clips, 1):
        names.append(f"media/{question.row:06}-{number}.mp3")
        write_sound(clip, str(folder / names[-1]), "mp3", "mp3")
    for number, item in enumerate(question.items("image"), 1):
        names.append(f"media/{question.row:06}-{number}.jpg")
        picture: Image.Image = item["image"].convert("RGB")
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        picture.save(folder / names[-1], quality=85)
    return names


def rank_files(folder: Path, arm: str) -> list[Path]:
    """What the processes of a run on several devices wrote; the first one writes into the file itself."""
    return sorted(folder.glob(f"{file_of(arm)}.rank-*"))


def rows_done(folder: Path, arm: str) -> dict[int, dict]:
    """
    The predictions of an arm by their row. Two runs at a time could write a row twice, where the first line counts, or
    write into each other's lines; such a line, or one that a kill cut short, does not count.
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
    """Writes one file of all rows in their order, each once, in the place of all files of an arm."""
    done, path = rows_done(folder, arm), folder / file_of(arm)
    with replace_file(path) as file:
        file.writelines(json.dumps(done[row], ensure_ascii=False) + "\n" for row in sorted(done))
    for part in rank_files(folder, arm):
        part.unlink()


def make_manifest(options: argparse.Namespace) -> dict:
    """Everything that the predictions depend on, as far as it is known."""
    origin = resolve(options.repo)
    patterns = ("*.safetensors", "*.py")
    weights, code = ({file.name: sha256(file) for file in sorted(origin.folder.glob(each))} for each in patterns)
    columns = columns_of(options.audio_column, options.text_column)
    return {
        "model": {"name": origin.name, "revision": origin.commit, "weights": weights, "code": code},
        "data": describe_data(options.data, columns),
        "columns": columns,
        "instruction": options.instruction,
        "group_column": options.group_column,
        "transcript_column": options.transcript_column,
        "arms": [AS_GIVEN, *options.arms],
        "limit": options.limit,
        "backend": options.backend,
        "generation": {
            "max_new_tokens": options.max_new_tokens,
            "do_sample": False,
            "audio_tokens": options.audio_tokens,
            "batch_size": options.batch_size,
        },
        "seed": options.seed,
        "processes": PartialState().num_processes,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "command": " ".join(["evaluation", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": None,
    }


def refuse_another_run(folder: Path, manifest: dict):
    """
    Raises:
        ValueError: if the folder holds the predictions of other weights, data or settings.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        if (folder / file_of(AS_GIVEN)).is_file():
            raise ValueError(f"{folder} holds predictions but no manifest.json; name a new --output.")
        return
    then, now = json.loads(path.read_text()), json.loads(json.dumps(manifest))
    differing = [f"{name} was {then.get(name)}, is {now[name]}" for name in LASTING if then.get(name) != now[name]]
    if differing := [*differing, *changed_data(then.get("data", []), now["data"])]:
        raise ValueError(f"{folder} holds the predictions of another run; name a new --output. {'; '.join(differing)}")


def predict_arm(arm: str, questions: Questions, backend, options: argparse.Namespace):
    """Asks what was not asked yet, and writes a line for each row as soon as it is there."""
    state, folder = PartialState(), Path(options.output)
    if state.is_main_process:
        merge(folder, arm)
    state.wait_for_everyone()
    done = rows_done(folder, arm)
    state.wait_for_everyone()  # before any of them writes
    name = file_of(arm) + (f".rank-{state.process_index}" if state.process_index else "")
    rows = itertools.islice(enumerate(questions.rows), options.limit)
    rows = (pair for pair in rows if pair[0] % state.num_processes == state.process_index and pair[0] not in done)
    known = None if isinstance(questions.rows, datasets.IterableDataset) else len(questions.rows)
    total = min(filter(None, (known, options.limit)), default=None)
    errors = words = same = 0
    with (
        (folder / name).open("a", **LINES) as file,
        tqdm(desc=arm, total=total, initial=len(done), unit="row", disable=state.process_index > 0) as bar,
    ):

        def write(line: dict):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()

        while pairs := list(itertools.islice(rows, BUFFER * options.batch_size)):
            asked = []
            for index, row in pairs:
                line = dict.fromkeys(("group", "audio_filepath", "duration", "time"))
                line |= {"row": index, "place": short_place(row), "media": [], "prompt": "", "text": ""}
                try:
                    line["group"] = questions.group(row)
                    question = questions.read(index, row)
                    line["text"] = question.text
                    if changed := questions.change(question, arm):
                        asked.append(changed)
                    else:
                        same += 1
                        bar.update()
                except BadRow as error:
                    logger.warning(f"{arm}: {error}")
                    write({**line, "error": str(error).replace(place_of(row), line["place"])})
            asked.sort(key=lambda question: question.duration, reverse=True)  # memory would run out at the start
            for place, given, seconds in backend([question.messages for question in asked]):
                question = asked[place]
                media = write_media(question, folder) if arm == AS_GIVEN and not options.no_media else []
                line = {
                    "row": question.row,
                    "place": question.place,
                    "group": question.group,
                    "audio_filepath": next((name for name in media if name.endswith(".mp3")), None),
                    "media": media,
                    "duration": round(question.duration, 3),
                    "time": round(seconds, 4),
                    "prompt": " ".join(item["text"] for item in question.items("text")),
                    "text": question.text,
                }
                if isinstance(given, Exception):
                    logger.warning(f"{arm}: {question.place}: {given}")
                    write({**line, "error": f"{question.place}: {given}"})
                    continue
                line["pred_text"] = given.strip()
                write(line)
                found = compare(line)
                errors, words = errors + found.word_errors, words + found.words
                bar.set_postfix_str(f"WER {errors / max(words, 1):.1%}", refresh=False)
    state.wait_for_everyone()
    if state.is_main_process:
        merge(folder, arm)
    state.wait_for_everyone()
    if same:
        logger.warning(f"{arm}: {same} rows would be asked the same and are left out.")


def predict(options: argparse.Namespace) -> Path:
    """
    Asks a model about every row, and writes `predictions.jsonl`, `predictions-ARM.jsonl`, `manifest.json` and what the
    report plays and shows, `media/`. Started again, it goes on.

    Raises:
        ValueError: if the data cannot be read, or the folder holds the predictions of another run.
    """
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be 1 or more, got {options.batch_size}.")
    if options.backend == "vllm" and not options.url:
        raise ValueError("--backend vllm needs --url, the address of the server, such as http://127.0.0.1:8000/v1.")
    if options.streaming and "swapped" in options.arms:
        raise ValueError("--arms swapped takes the clips of other rows, which --streaming cannot reach; leave one out.")
    set_seed(options.seed)
    state, folder = PartialState(), Path(options.output)
    columns = columns_of(options.audio_column, options.text_column)
    keep = tuple(filter(None, (options.group_column, options.transcript_column)))
    rows = load_rows(options.data, options.streaming, columns, keep)
    if not options.streaming and options.limit is not None:
        rows = rows.select(range(min(options.limit, len(rows))))
    if not options.streaming and options.group_column is not None:
        check_groups(rows, options.group_column)
    extra = {} if options.audio_tokens is None else {"audio_tokens": options.audio_tokens}
    processor = AutoProcessor.from_pretrained(options.repo, trust_remote_code=True, **extra)
    questions = Questions(
        rows, ChatCollator(processor, instruction=options.instruction), options.group_column, options.transcript_column
    )
    if state.is_main_process:
        manifest = make_manifest(options)
        refuse_another_run(folder, manifest)
    backend = BACKENDS[options.backend](processor, options)
    if state.is_main_process:
        (folder / "media").mkdir(parents=True, exist_ok=True)
        manifest |= {"device": backend.device, "dtype": backend.dtype}
        write_json(folder / "manifest.json", manifest)
    state.wait_for_everyone()
    for arm in (AS_GIVEN, *options.arms):
        predict_arm(arm, questions, backend, options)
    if state.is_main_process:
        done = rows_done(folder, AS_GIVEN)
        failed = sum("error" in row for row in done.values())
        write_json(folder / "manifest.json", {**manifest, "rows": len(done), "failed": failed})
    return folder


def score(options: argparse.Namespace) -> dict:
    """Scores the predictions of a folder; writes `scores.json` and `report.html` into it."""
    folder = Path(options.folder)
    predictions = read_folder(folder)
    scores = score_arms(predictions)
    write_json(folder / "scores.json", scores)
    write_page(folder, predictions, scores)
    return scores


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("predict", help="ask a model")
    command.add_argument("repo", metavar="REPO", help="folder of upload.py build, or a Hub id")
    command.add_argument("--data", nargs="+", required=True, help="as for training")
    command.add_argument("--output", required=True, metavar="DIR", help="folder of the results")
    command.add_argument("--audio-column", help="of recordings that have transcripts")
    command.add_argument("--text-column", help="of their transcripts")
    command.add_argument("--instruction", default=TRANSCRIBE, help="what is asked about each of them")
    command.add_argument("--group-column", help="groups of rows that are scored for themselves as well")
    command.add_argument("--transcript-column", help="what each clip of a row says, for the arms text and swapped")
    command.add_argument("--streaming", action="store_true", help="read the data as it is needed")
    command.add_argument("--limit", type=int, help="the first so many rows")
    command.add_argument("--arms", nargs="+", default=[], choices=ARMS, help="ask again, with something taken away")
    command.add_argument("--batch-size", type=int, default=8, help="rows, or requests, at a time (default: 8)")
    command.add_argument("--max-new-tokens", type=int, default=256, help="of an answer (default: 256)")
    command.add_argument("--audio-tokens", help="fixed or trimmed (default: the model's; a server has its own)")
    command.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights (default: as they are stored)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--backend", default="transformers", choices=BACKENDS, help="vllm: a server with OpenAI's API")
    command.add_argument("--url", help="of the server, up to and with /v1")
    command.add_argument("--served-name", help="of the model at the server (default: the first)")
    command.add_argument("--no-media", action="store_true", help="keep no sound and pictures for the report")
    command = commands.add_parser("score", help="score the answers")
    command.add_argument("folder", metavar="DIR", help="what predict wrote")
    options = parser.parse_args(arguments)
    try:
        if options.command == "score":
            if not Path(options.folder).is_dir():
                raise ValueError(f"There is no folder {options.folder}; `python -m evaluation predict` makes one.")
            print(table(score(options)))
            print(f"\n{Path(options.folder) / 'report.html'} has every answer.")
        else:
            resolve(options.repo, WHOLE_MODEL)  # a model that is not there is reported before the data is read
            with only_run(options.output, "--output", PartialState().is_main_process):
                predict(options)
    except (ValueError, OSError) as error:
        parser.exit(1, f"evaluation {options.command}: {error}\n")
