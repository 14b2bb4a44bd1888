"""Conversations -> answers, by a model in this process or by a server with OpenAI's API."""

import base64
import io
import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import av
import numpy as np
import torch
from transformers import AutoModel

from audio_utils import SAMPLING_RATE
from collator import refuse_unreadable
from publishing.paths import load_processor
from transcribe import Answer, Asker, LocalAsker, ServerAsker, Transcriber


REFUSED = (400, 413, 415, 422)  # statuses of HTTP that blame the content of a request


def load(repo: str | Path, dtype: str | torch.dtype = "auto", audio_tokens: str | None = None) -> tuple:
    """
    Loads `(processor, model)` of a folder or a Hub id, the model on the CPU. `dtype` is one of torch
    or its name, or "auto", as stored. `audio_tokens` is "fixed" or "trimmed"; the default is that of the model.
    """
    processor = load_processor(repo, audio_tokens)
    return processor, AutoModel.from_pretrained(repo, trust_remote_code=True, dtype=dtype).eval()


class LocalModel:
    """Answers by a model in this process, a batch at a time."""

    def __init__(self, processor, model, batch_size: int, max_new_tokens: int):
        self.processor, self.model = processor, model
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        self.dtype = str(model.dtype).removeprefix("torch.")

    def __call__(self, conversations: list[list[dict]]) -> Iterator[tuple[int, str | Exception, float]]:
        """Yields for each conversation its index, the answer or why there is none, and the seconds it took."""
        for start in range(0, len(conversations), self.batch_size):
            batch = conversations[start : start + self.batch_size]
            for index, (answer, seconds) in enumerate(self.answer(batch), start):
                yield index, answer, seconds

    def asker(self, prompt: str) -> Asker:
        """Returns what transcribes pieces."""
        return LocalAsker(self.model, self.processor, prompt=prompt)

    def answer(self, batch: list[list[dict]]) -> list[tuple[str | Exception, float]]:
        start = time.perf_counter()
        try:
            with refuse_unreadable():  # videos are opened here
                answers = self.processor.answer(self.model, batch, self.max_new_tokens)
        except ValueError as error:
            if len(batch) > 1:  # one of them cannot be asked, the others can
                return [result for conversation in batch for result in self.answer([conversation])]
            answers = [error]
        seconds = (time.perf_counter() - start) / len(batch)
        return [(answer, seconds) for answer in answers]


class Server:
    """Answers by a server with OpenAI's API, `batch_size` requests at a time. Raises ConnectionError if it is down."""

    device, dtype = "of the server", "of the server"

    def __init__(self, url: str, name: str | None, batch_size: int, max_new_tokens: int):
        from openai import OpenAI, OpenAIError  # only this backend needs it

        self.url, self.batch_size, self.max_new_tokens, self.error = url, batch_size, max_new_tokens, OpenAIError
        self.client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
        try:
            served = [model.id for model in self.client.models.list()]
        except OpenAIError as error:
            raise ConnectionError(f"{url} does not answer as a server with OpenAI's API: {error}") from error
        if name not in (None, *served):
            raise ValueError(f"{url} serves {', '.join(served)}, not {name}.")
        self.name = name or served[0]

    def __call__(self, conversations: list[list[dict]]) -> Iterator[tuple[int, str | Exception, float]]:
        """Yields the same as [`LocalModel`], with the seconds since the last answer: their sum is the time of all."""
        with ThreadPoolExecutor(self.batch_size) as pool:
            last = time.perf_counter()
            futures = {pool.submit(self.answer, messages): index for index, messages in enumerate(conversations)}
            for future in as_completed(futures):
                now = time.perf_counter()
                yield futures[future], future.result(), now - last
                last = now

    def asker(self, prompt: str) -> Asker:
        """Returns what transcribes pieces. It raises a ValueError where the server refuses one."""
        ask = ServerAsker(self.url, self.name, prompt=prompt)

        def checked(clips: list[torch.Tensor]) -> list[Answer]:
            try:
                return ask(clips)
            except self.error as error:
                raise ValueError(str(self.check(error))) from error

        return checked

    def answer(self, messages: list[dict]) -> str | Exception:
        sent = [{**message, "content": openai_content(message["content"])} for message in messages]
        settings = {"temperature": 0, "max_tokens": self.max_new_tokens}
        try:
            reply = self.client.chat.completions.create(model=self.name, messages=sent, **settings)
        except self.error as error:
            return self.check(error)
        return reply.choices[0].message.content or ""

    def check(self, error: Exception) -> Exception:
        """Returns the error of a row that the server refuses. Raises a ConnectionError if any row would fail."""
        if getattr(error, "status_code", 500) not in REFUSED:
            raise ConnectionError(f"{self.url} failed: {error}. Run the command again to go on.") from error
        return error


class LongForm:
    """Transcribes recordings of any length, one after another, in pieces of at most `max_seconds`."""

    def __init__(self, answers: LocalModel | Server, max_seconds: float):
        self.answers, self.max_seconds = answers, max_seconds
        self.device, self.dtype = answers.device, answers.dtype

    def __call__(self, conversations: list[list[dict]]) -> Iterator[tuple[int, str | Exception, float]]:
        """Yields the same as [`LocalModel`]."""
        for index, messages in enumerate(conversations):
            start = time.perf_counter()
            try:
                answer = self.transcribe(messages)
            except ValueError as error:
                answer = error
            yield index, answer, time.perf_counter() - start

    def transcribe(self, messages: list[dict]) -> str:
        items = [item for message in messages if isinstance(message["content"], list) for item in message["content"]]
        kinds = [item["type"] for item in items]
        if len(messages) != 1 or kinds.count("audio") != 1 or {*kinds} - {"audio", "text"}:
            what = f"{len(messages)} messages with {', '.join(kinds) or 'text alone'}"
            raise ValueError(f"--long-form needs one message with one clip and what is asked about it, not {what}.")
        clip = next(item["audio"] for item in items if item["type"] == "audio")
        asked = " ".join(item["text"] for item in items if item["type"] == "text")
        transcriber = Transcriber(self.answers.asker(asked), self.max_seconds, self.answers.batch_size)
        return " ".join(segment.text for _, segments in transcriber.batches(clip) for segment in segments)


def openai_content(content):
    """The content of a message as OpenAI's API takes it: audio as WAV, pictures as PNG."""
    return [openai_item(item) for item in content] if isinstance(content, list) else content


def openai_item(item: dict) -> dict:
    if item["type"] not in ("audio", "image"):
        return item
    file = io.BytesIO()
    if item["type"] == "audio":
        write_sound(item["audio"], file, "wav", "pcm_f32le")
    else:
        item["image"].save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    if item["type"] == "audio":
        return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def write_sound(samples: np.ndarray, file, container: str, codec: str):
    """Writes float32 samples [samples] at 16 kHz to a path or a binary file."""
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=SAMPLING_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate = SAMPLING_RATE
        output.mux([*stream.encode(frame), *stream.encode(None)])
