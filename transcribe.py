"""
Transcribes recordings of any length, piece by piece, with the times of segments and words.

    python transcribe.py REPO FILES...            writes NAME.txt, NAME.srt, NAME.vtt and NAME.json for each file
    python transcribe.py --url http://127.0.0.1:8000/v1 FILES...      asks a server with OpenAI's chat API

REPO is a folder or a Hub id, and a file is a path or an address. A run that was stopped goes on where it was.
"""

import argparse
import base64
import contextlib
import io
import itertools
import json
import math
import os
import sys
import time
import wave
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

from audio_download import READ_LIMITS
from audio_streaming import LEVEL, Piece, ahead, cut_pieces, find_duration, find_voice, halve, stream_audio
from audio_utils import SAMPLING_RATE
from configuration_qwen2_audio_vl import (
    ENCODER_STRIDE,
    HOP_LENGTH,
    LONGEST_PIECE,
    PIECE_SECONDS,
    SHORTEST_PIECE,
    TRANSCRIBE,
    ask_for_words,
)
from shipped_files import WHOLE_MODEL, find_folder
from transcripts import FORMATS, Segment, SubtitleStyle, Transcript, Word, read_segment, rounded, segment_dict
from word_times import Aligner, TooLongError


logger = logging.get_logger(__name__)

BATCH_SIZE = 8  # pieces that are transcribed at once
TOKENS_PER_SECOND, MORE_TOKENS = 12, 16  # the longest answer to a piece: fast speech has 6 tokens a second
# A piece whose text has fewer characters for each second of voice has lost some; speech has 12 to 20.
CHARACTERS_PER_SECOND, LEAST_VOICE = 9.0, 2.0
LEAST_HALVED = 4.0  # seconds; models lose words of long pieces, and halves of short ones have too little context
DENSE = 3  # characters that one of a script without spaces counts for
REPETITIVE = 2.2  # the length of a text by that of its compression; a sentence said three times has 2.3
LIMITS = ("sampling_rate", *READ_LIMITS)
ROW = HOP_LENGTH * ENCODER_STRIDE / SAMPLING_RATE  # seconds of a row of the encoder


@dataclass
class Answer:
    """
    The text of a piece; whether the model ended it by itself; the encoder's rows `(1, rows, d_model)`, None if they
    are not known.
    """

    text: str
    is_complete: bool = True
    encoder_rows: torch.Tensor | None = None


Asker = Callable[[list[torch.Tensor]], list[Answer]]  # what answers pieces, float32 `[samples]` each


def longest_answer(num_samples: int) -> int:
    """Returns the most tokens that the text of a piece may have."""
    return MORE_TOKENS + math.ceil(TOKENS_PER_SECOND * num_samples / SAMPLING_RATE)


def longest_piece(processor) -> float:
    """Returns the seconds of the longest piece for a model; processors of earlier folders name none."""
    return getattr(processor, "piece_seconds", None) or PIECE_SECONDS


@dataclass
class LocalAsker:
    """Transcribes pieces with a model in this process, in one batch. With `keep_rows` answers have the encoder's."""

    model: torch.nn.Module
    processor: object
    language: str | None = None
    prompt: str | None = None
    keep_rows: bool = False

    @torch.inference_mode()
    def __call__(self, clips: list[torch.Tensor]) -> list[Answer]:
        inputs = self.processor.apply_transcription_request(clips, language=self.language, prompt=self.prompt)
        inputs = inputs.to(self.model.device)
        audio = {name: inputs.pop(name) for name in ("input_features", "input_features_mask") if name in inputs}
        features = self.model.get_audio_features(**audio)
        output = self.model.generate(
            **inputs,
            mm_encoder_outputs={"audio": features},
            max_new_tokens=longest_answer(max(map(len, clips))),
            do_sample=False,
        )[:, inputs["input_ids"].shape[1] :]
        ends = torch.tensor(self.model.generation_config.eos_token_id, device=output.device).reshape(-1)
        texts = self.processor.decode(output, return_format="transcription_only")
        answers = [
            Answer(" ".join(text.split()), bool(is_end))
            for text, is_end in zip(texts, torch.isin(output, ends).any(1), strict=True)
        ]
        if self.keep_rows:
            extractor, first = self.processor.feature_extractor, 0
            for answer, clip in zip(answers, clips, strict=True):
                num_windows = -(-len(clip) // extractor.n_samples)
                answer.encoder_rows = features.last_hidden_state[first : first + 1] if num_windows == 1 else None
                first += num_windows
        return answers


@dataclass
class ServerAsker:
    """Transcribes pieces with a server of OpenAI's chat API, all at once. The default model is the server's first."""

    url: str
    model: str | None = None
    language: str | None = None
    prompt: str | None = None

    def __post_init__(self):
        try:
            import openai
        except ImportError as error:
            raise ValueError("--url needs the package openai: pip install openai") from error
        self.refused = openai.APIStatusError
        self.client = openai.OpenAI(base_url=self.url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
        try:
            self.model = self.model or next(iter(self.client.models.list())).id
        except (openai.OpenAIError, StopIteration) as error:
            raise ConnectionError(f"The server at {self.url} names no model: {error}") from error

    def __call__(self, clips: list[torch.Tensor]) -> list[Answer]:
        with ThreadPoolExecutor(len(clips)) as pool:
            return list(pool.map(self.ask, clips))

    def ask(self, clip: torch.Tensor) -> Answer:
        words = ask_for_words(self.language, self.prompt)
        sound = {"data": base64.b64encode(write_wav(clip)).decode(), "format": "wav"}
        content = [{"type": "input_audio", "input_audio": sound}, {"type": "text", "text": words}]
        try:
            completion = self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": content}],
                max_tokens=longest_answer(len(clip)),
                temperature=0.0,
            )
        except self.refused as error:  # its message leaves out what some servers say
            raise ConnectionError(f"HTTP {error.status_code}: {error.response.text:.400}") from error
        choice = completion.choices[0]
        return Answer(" ".join((choice.message.content or "").split()), choice.finish_reason != "length")


def write_wav(clip: torch.Tensor) -> bytes:
    """Returns float32 `[samples]` as a wav file of 16 bits."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes((clip.clamp(-1, 1).numpy() * 32767).round().astype("<i2").tobytes())
    return buffer.getvalue()


def find_doubt(samples: torch.Tensor, answer: Answer) -> str | None:
    """Returns why the text of a piece may be wrong: it ended early, repeats itself, or is too short for the voice."""
    if not answer.is_complete:
        return "the answer did not end"
    content = answer.text.encode()
    if content and len(content) / len(zlib.compress(content)) > REPETITIVE:
        return "the text repeats itself"
    voice = float(find_voice(samples).sum()) * LEVEL / SAMPLING_RATE
    characters = sum(DENSE if "\u2e80" <= letter <= "\uffef" else 1 for letter in answer.text)
    if voice >= LEAST_VOICE and characters / voice < CHARACTERS_PER_SECOND:
        return f"the text has {characters} characters for {voice:.1f} s of voice"
    return None


Judged = tuple[Piece, Answer, str | None]  # a piece, its answer, and why the answer may be wrong


def answer_pieces(ask: Asker, pieces: list[Piece]) -> list[Judged]:
    """Asks about pieces; those of 4 s or more whose text is in doubt are cut in halves and asked once more."""
    results = judge(ask, pieces)
    is_cut = [bool(doubt) and len(piece.samples) >= LEAST_HALVED * SAMPLING_RATE for piece, _, doubt in results]
    cut = [piece for (piece, _, _), cuts in zip(results, is_cut, strict=True) if cuts]
    again = iter(judge(ask, [half for piece in cut for half in halve(piece)]))
    final = []
    for result, cuts in zip(results, is_cut, strict=True):
        halves = [next(again), next(again)] if cuts else []
        # Halves that lost still more text are no improvement.
        is_longer = sum(len(answer.text) for _, answer, _ in halves) >= len(result[1].text)
        is_better = is_longer or not any(doubt for _, _, doubt in halves)
        final += halves if halves and is_better else [result]
    return final


def judge(ask: Asker, pieces: list[Piece]) -> list[Judged]:
    """Asks about pieces, but for those that are silent throughout, because models answer some of them with words."""
    has_voice = [bool(find_voice(piece.samples).any()) for piece in pieces]
    spoken = [piece.samples for piece, has in zip(pieces, has_voice, strict=True) if has]
    given = iter(ask(spoken) if spoken else ())
    answers = [next(given) if has else Answer("") for has in has_voice]
    pairs = zip(pieces, answers, strict=True)
    return [(piece, answer, find_doubt(piece.samples, answer)) for piece, answer in pairs]


def make_segment(piece: Piece, answer: Answer, doubt: str | None, aligner: Aligner | None, language) -> Segment | None:
    """Returns the segment of a piece, whose times are those of its voice; None if there is neither text nor doubt."""
    if not answer.text and not doubt:
        return None
    offset, is_voice = piece.start / SAMPLING_RATE, find_voice(piece.samples).numpy()
    length, places = len(piece.samples) / SAMPLING_RATE, np.flatnonzero(is_voice)
    start, end = (places[0] * ROW, min(length, (places[-1] + 1) * ROW)) if len(places) else (0.0, length)
    words = ()
    if aligner is not None and answer.text:
        try:
            timed = aligner.find_words(answer.text, piece.samples, is_voice, answer.encoder_rows, language)
        except TooLongError as error:  # an answer that repeats itself
            doubt = doubt or f"its words have no times: {error}"
        else:
            words = tuple(Word(offset + start, offset + end, text, chance) for start, end, text, chance in timed)
            start, end = timed[0][0], timed[-1][1]
    return rounded(Segment(offset + float(start), offset + float(end), answer.text, words, doubt))


@dataclass
class Transcriber:
    """
    What transcribes recordings: an [`Asker`], the seconds of the longest piece, the pieces that are asked at once, and
    perhaps what finds the times of words. Raises a ValueError if the pieces are too long or too short.
    """

    ask: Asker
    max_seconds: float = PIECE_SECONDS
    batch_size: int = BATCH_SIZE
    aligner: Aligner | None = None
    language: str | None = None
    pause: float | None = None  # seconds of silence in which a piece ends earlier

    def __post_init__(self):
        longest, reason = (30.0, " with word times") if self.aligner else (LONGEST_PIECE, "")
        if not SHORTEST_PIECE <= self.max_seconds <= longest:
            bounds = f"from {SHORTEST_PIECE:g} to {longest:g}{reason}"
            raise ValueError(f"max_seconds must be {bounds}, got {self.max_seconds}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}.")
        if self.pause is not None and not 0 < self.pause <= self.max_seconds:
            raise ValueError(f"pause must be more than 0 and at most {self.max_seconds:g} s, got {self.pause}.")
        ask_for_words(self.language)  # raises on an unknown language

    def batches(self, audio, start: int = 0, **limits) -> Iterator[tuple[int, list[Segment]]]:
        """
        Yields the sample at which each batch of pieces ends, and its segments, which follow each other in time. What
        lies before the sample `start` is skipped. `limits` are those of `fetch_audio`, without one of length.
        """
        pieces = ahead(cut_pieces(stream_audio(audio, **limits), self.max_seconds, start, self.pause))
        with contextlib.closing(pieces):
            while batch := list(itertools.islice(pieces, self.batch_size)):
                answered = answer_pieces(self.ask, batch)
                segments = [make_segment(*each, self.aligner, self.language) for each in answered]
                segments = [segment for segment in segments if segment]
                for segment in segments:
                    if segment.doubt:
                        place = f"{segment.start:.1f} to {segment.end:.1f} s"
                        logger.warning(f"The text from {place} may be wrong: {segment.doubt}.")
                yield batch[-1].end, segments


def make_transcriber(
    model,
    processor,
    *,
    max_seconds: float | None = None,
    batch_size: int = BATCH_SIZE,
    language: str | None = None,
    prompt: str | None = None,
    aligner: Aligner | None = None,
    pause: float | None = None,
) -> Transcriber:
    """Returns what transcribes with a model in this process. The arguments are those of [`transcribe`]."""
    keeps_rows = aligner is not None and aligner.has_encoder(model.model.audio_encoder)
    ask = LocalAsker(model, processor, language, prompt, keeps_rows)
    longest = longest_piece(processor)
    return Transcriber(ask, longest if max_seconds is None else max_seconds, batch_size, aligner, language, pause)


def transcribe_segments(model, processor, audio, **settings) -> Iterator[Segment]:
    """Yields the segments of a recording as they are transcribed. The arguments are those of [`transcribe`]."""
    limits = {name: settings.pop(name) for name in LIMITS if name in settings}
    for _, segments in make_transcriber(model, processor, **settings).batches(audio, **limits):
        yield from segments


def transcribe(model, processor, audio, **settings) -> Transcript:
    """
    Transcribes a recording of any length. It is decoded in a thread while the model works, so memory does not grow with
    its length.

    Args:
        model, processor: As the Auto classes load them.
        audio: Anything that `audio_utils.fetch_audio` takes.
        max_seconds (`float`, *optional*): The longest piece, in seconds. The default is the processor's
            `piece_seconds`, or 28.
        batch_size (`int`, defaults to 8): Pieces that are transcribed at once.
        language, prompt (`str`, *optional*): As in the processor's `apply_transcription_request`.
        aligner ([`word_times.Aligner`], *optional*): Finds the times of words. Without it segments have no words.
        pause (`float`, *optional*): Seconds of silence in whose middle a piece of 2 s or more ends before it is full.
        sampling_rate, max_bytes, timeout, public_only: As in `audio_utils.fetch_audio`.

    Raises:
        ValueError: on settings that do not fit, or, as its subclass [`AudioError`], if the recording cannot be opened.
    """
    limits = {name: settings.pop(name) for name in LIMITS if name in settings}
    return join_batches(
        make_transcriber(model, processor, **settings).batches(audio, **limits), settings.get("language")
    )


def join_batches(batches: Iterable[tuple[int, list[Segment]]], language: str | None) -> Transcript:
    batches = list(batches)
    end = batches[-1][0] if batches else 0
    segments = tuple(segment for _, batch in batches for segment in batch)
    return Transcript(segments, round(end / SAMPLING_RATE, 3), language)


def resume(
    transcriber: Transcriber, source: str, unfinished: Path, settings: dict
) -> Iterator[tuple[int, list[Segment]]]:
    """
    Yields what [`Transcriber.batches`] yields, and writes each batch as a line of JSON to `unfinished`. The batches of
    an earlier run are read from there, if it had the same settings and the file is the same.
    """
    facts = {**settings, **identify(source)}
    earlier, whole = [], 0  # and the bytes of its lines
    if unfinished.is_file():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may be cut short
            first, *rest = unfinished.read_bytes().splitlines(keepends=True)
            if json.loads(first) == facts:
                whole = len(first)
                for line in rest:
                    end, segments = json.loads(line)
                    if line.endswith(b"\n"):
                        earlier.append((end, [read_segment(fields) for fields in segments]))
                        whole += len(line)
    if earlier:
        os.truncate(unfinished, whole)
    yield from earlier
    is_new = not earlier
    for end, segments in transcriber.batches(source, earlier[-1][0] if earlier else 0):
        content = [end, [segment_dict(segment) for segment in segments]]
        lines = [facts, content] if is_new else [content]  # a file that cannot be opened leaves nothing behind
        with unfinished.open("w" if is_new else "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        is_new = False
        yield end, segments


def identify(source: str) -> dict:
    """
    Returns what tells a file or folder from another of the same name: its address, or its size and time of change, of a
    folder that of its newest file.
    """
    if os.path.isdir(source):
        changed = max((file.stat().st_mtime for file in Path(source).iterdir() if file.is_file()), default=0.0)
        return {"source": os.path.abspath(source), "changed": changed}
    if not os.path.isfile(source):
        return {"source": source}
    stat = os.stat(source)
    return {"source": os.path.abspath(source), "bytes": stat.st_size, "changed": stat.st_mtime}


def name_outputs(sources: list[str]) -> list[str]:
    """Returns the name of each source without its folder and ending. Raises a ValueError if two are the same."""
    names = [Path(unquote(urlsplit(source).path) if "://" in source else source).stem for source in sources]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"Two files are named {', '.join(doubled)}, without their endings; transcribe them separately."
        )
    return names


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", nargs="?", help="folder or Hub id; with --url a folder, or left out")
    parser.add_argument("files", nargs="*", metavar="FILES", help="recordings: paths or addresses")
    parser.add_argument("--output-dir", type=Path, default=Path("."), help="default: the current folder")
    parser.add_argument("--output-format", choices=[*FORMATS, "all"], default="all", help="default: all")
    parser.add_argument("--word-timestamps", action="store_true", help="find the times of words, with --aligner")
    parser.add_argument(
        "--aligner", help="folder or Hub id of a complete Whisper (default: the audio encoder's origin)"
    )
    parser.add_argument("--max-seconds", type=float, help="longest piece (default: the model's)")
    parser.add_argument("--pause", type=float, help="end a piece in the first silence of so many seconds")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"pieces at once (default: {BATCH_SIZE})")
    parser.add_argument("--language", help="Whisper's code or name, such as en; the model is told")
    parser.add_argument("--prompt", help=f"the instruction (default: {TRANSCRIBE})")
    parser.add_argument("--max-line-width", type=int, default=42, help="characters of a subtitle's line (default: 42)")
    parser.add_argument("--max-line-count", type=int, default=2, help="lines of a subtitle (default: 2)")
    parser.add_argument("--highlight-words", action="store_true", help="underline the spoken word in subtitles")
    parser.add_argument("--stream", action="store_true", help="print segments as they come, instead of a progress bar")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights (default: auto, as stored)")
    parser.add_argument("--url", help="address of a server with OpenAI's chat API, up to and with /v1")
    parser.add_argument("--served-name", help="name of the model at the server (default: the first)")
    return parser


def load_transcriber(options: argparse.Namespace) -> Transcriber:
    """Loads what the command line names. Raises a ValueError or ConnectionError with what is missing."""
    aligner = options.aligner
    if options.url:
        if options.word_timestamps and not aligner:
            raise ValueError("--word-timestamps with --url needs --aligner, a folder or Hub id of a complete Whisper.")
        aligner = Aligner(find_folder(aligner)) if options.word_timestamps else None
        ask = ServerAsker(options.url, options.served_name, options.language, options.prompt)
        longest = options.max_seconds
        if longest is None:
            of_model = AutoProcessor.from_pretrained(options.repo, trust_remote_code=True) if options.repo else None
            longest = longest_piece(of_model)
        return Transcriber(ask, longest, options.batch_size, aligner, options.language, options.pause)
    folder = find_folder(options.repo, needed=WHOLE_MODEL)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=options.dtype, device_map="auto").eval()
    if options.word_timestamps:
        aligner = aligner or getattr(model.config, "audio_encoder_origin", None)
        if not aligner:
            raise ValueError(
                "--word-timestamps needs the complete Whisper of the audio encoder, and the model does not name it; "
                "give its folder or Hub id as --aligner."
            )
    return make_transcriber(
        model,
        processor,
        max_seconds=options.max_seconds,
        batch_size=options.batch_size,
        language=options.language,
        prompt=options.prompt,
        aligner=Aligner(find_aligner(aligner)) if options.word_timestamps else None,
        pause=options.pause,
    )


def find_aligner(name: str) -> Path:
    repo, _, revision = (name, "", "") if os.path.isdir(name) else name.partition("@")
    return find_folder(repo, revision or None, ("config.json",), ignore_patterns=["*.bin", "*.h5", "*.msgpack"])


def transcribe_file(transcriber: Transcriber, source: str, name: str, style: SubtitleStyle, options) -> Path:
    """
    Transcribes one file, and writes the formats that were asked for when it is done. Returns the file of its batches,
    from which the same command reads them again.
    """
    unfinished = options.output_dir / f"{name}.unfinished.jsonl"
    asked = ("url", "dtype", "max_seconds", "pause", "language", "prompt", "word_timestamps", "aligner")
    settings = {option: getattr(options, option) for option in asked}
    settings["model"] = transcriber.ask.model if options.url else identify(transcriber.ask.model.name_or_path)
    start, batches = time.monotonic(), []
    total = find_duration(source)
    bar_format = "{desc}: {n:.0f} of {total:.0f} s |{bar}| {postfix}, {remaining} left"
    bar_format = bar_format if total else "{desc}: {n:.0f} s, {postfix}"
    with tqdm(desc=name, total=total, bar_format=bar_format, disable=options.stream) as bar:
        for end, segments in resume(transcriber, source, unfinished, settings):
            batches.append((end, segments))
            for segment in segments if options.stream else ():
                print(f"[{segment.start:9.2f} - {segment.end:9.2f}] {segment.text}", flush=True)
            seconds = min(end / SAMPLING_RATE, total or math.inf)
            speed = (end - batches[0][0] * (len(batches) > 1)) / SAMPLING_RATE / max(1e-3, time.monotonic() - start)
            bar.set_postfix_str(f"{speed:.1f} times real time", refresh=False)
            bar.update(seconds - bar.n)
    transcript = join_batches(batches, options.language)
    for ending in FORMATS if options.output_format == "all" else (options.output_format,):
        target = options.output_dir / f"{name}.{ending}"
        target.write_text(FORMATS[ending](transcript, style), encoding="utf-8")
    warn_of_losses(transcript, source, total)
    return unfinished


def warn_of_losses(transcript: Transcript, source: str, total: float | None):
    """Warns if a recording is shorter than its header says, or if nothing is said in it."""
    if total and transcript.duration < total - max(1.0, total / 100):
        logger.warning(
            f"{source}: its audio ends after {transcript.duration:.1f} s, its header says {total:.1f}; is it complete?"
        )
    if not transcript.segments:
        logger.warning(f"{source}: no voice was found in {transcript.duration:.1f} s.")


def main() -> int:
    parser = make_parser()
    options = parser.parse_intermixed_args()
    sources = options.files
    if options.url and options.repo and not os.path.isdir(options.repo):
        sources, options.repo = [options.repo, *sources], None
    if options.aligner and not options.word_timestamps:
        parser.error("--aligner needs --word-timestamps")
    if not sources:
        parser.error("name the recordings to transcribe")
    try:
        names = name_outputs(sources)
        style = SubtitleStyle(options.max_line_width, options.max_line_count, options.highlight_words)
        options.output_dir.mkdir(parents=True, exist_ok=True)
        transcriber = load_transcriber(options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"transcribe.py: {error}\n")
    failed, done = 0, []
    for source, name in zip(sources, names, strict=True):
        try:
            done.append(transcribe_file(transcriber, source, name, style, options))
        except KeyboardInterrupt:
            sys.stderr.write("transcribe.py: stopped; the same command goes on after the last batch.\n")
            return 130
        except Exception as error:  # of many types; the other files are transcribed all the same
            failed += 1
            sys.stderr.write(f"transcribe.py: {source} failed: {error or type(error).__name__}\n")
    for unfinished in done:  # not earlier, so that a run that was stopped does not begin again with its first file
        unfinished.unlink(missing_ok=True)
    if failed:
        sys.stderr.write(f"transcribe.py: {failed} of {len(sources)} files failed.\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
