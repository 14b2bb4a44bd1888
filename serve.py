"""
Serves a repository with OpenAI's chat API and its route for transcripts, by `transformers serve`:

    python serve.py REPO [--aligner WHISPER] [options of transformers serve]
                                              needs: pip install "transformers[serving]" python-multipart

REPO is a folder, a Hub id or ID@REVISION, and the name of the model in requests. `transformers serve` looks for models
among the classes of transformers, so those of REPO are registered there. It does not run the code of other repositories
that a request may name, as --trust-remote-code is neither needed nor set. Requests that cannot be answered get HTTP 400
(404 for another model) and OpenAI's `{"error": {"message": "one sentence", "param": "the field", ...}}`. WHISPER,
a folder or Hub id of a complete Whisper, finds the times of words; by default it is the one that the model's audio
encoder is from.
"""

import argparse
import asyncio
import contextlib
import inspect
import json
import os
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import BinaryIO

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor
from transformers.cli.serving import server
from transformers.cli.transformers import app
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.import_utils import is_multipart_available

from audio_download import FETCH_LIMITS
from configuration_qwen2_audio_vl import PIECE_SECONDS
from handler import decode_image
from openai_requests import Asked, check_bias, check_model, read_chat, read_fields
from shipped_files import WHOLE_MODEL, find_folder
from transcribe import Transcriber, find_aligner, join_batches, longest_piece, make_transcriber
from transcripts import Segment, Transcript, segment_dict, to_srt, to_vtt
from word_times import Aligner


logger = logging.get_logger(__name__)

# Files come from strangers: they are decoded in processes of limited memory and time.
FILE_LIMITS = {"public_only": True, "max_seconds": 3600.0, "max_bytes": 2**28}
MAX_FORM = 2**28 + 2**20  # bytes of a whole request: a file, and the other fields
OPENERS = 16  # clips and pictures of chats that are opened at once
MAX_FILES = 4  # recordings that are transcribed at once, each with its file in memory; others wait


def register(repo: str):
    """Makes the classes of a repository known to transformers."""
    name, _, revision = (repo, "", "") if os.path.isdir(repo) else repo.partition("@")
    # An error here says what is missing; `transformers serve` downloads the rest.
    needed = WHOLE_MODEL if os.path.isdir(name) else ("config.json",)
    folder = find_folder(name, revision or None, needed, allow_patterns=["config.json"])
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
    if not {"AutoConfig", "AutoModel", "AutoProcessor"} <= auto_map.keys():
        raise ValueError(f"{repo} is no folder of this repository: its config.json names no classes of remote code.")
    load = partial(get_class_from_dynamic_module, pretrained_model_name_or_path=name, revision=revision or None)
    config_class, model_class, processor_class = (
        load(auto_map[f"Auto{part}"].rpartition("--")[2]) for part in ("Config", "Model", "Processor")
    )

    class CheckedProcessor(processor_class):
        def apply_chat_template(self, *args, **kwargs):
            try:
                inputs = super().apply_chat_template(*args, **kwargs)
            except Exception as error:  # of many types, where files are broken and addresses do not answer
                raise ValueError(str(error) or type(error).__name__) from error
            length, positions = len(inputs["input_ids"][0]), self.tokenizer.model_max_length
            if length >= positions:
                raise ValueError(
                    f"The prompt has {length} tokens, but prompt and answer must fit the model's {positions} positions."
                )
            return inputs

    class SeededModel(model_class):
        def generate(self, *args, generation_config=None, **kwargs):
            if (seed := getattr(generation_config, "seed", None)) is not None:
                torch.manual_seed(seed)  # in the thread that answers one request after another
            return super().generate(*args, generation_config=generation_config, **kwargs)

    SeededModel.__name__ = model_class.__name__  # which is looked up below
    CheckedProcessor.__name__ = processor_class.__name__  # which stands in processor_config.json
    AutoConfig.register(config_class.model_type, config_class)
    AutoProcessor.register(config_class, CheckedProcessor)
    AutoModelForMultimodalLM.register(config_class, SeededModel)
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config_class.model_type] = model_class.__name__  # what the server looks up


def verbose(transcript: Transcript, granularities: tuple[str, ...]) -> dict:
    """Returns OpenAI's `verbose_json`; as there, words alone come without segments."""
    facts = {"task": "transcribe", "language": transcript.language or "unknown", "duration": transcript.duration}
    body = {**facts, "text": transcript.text}
    if "segment" in granularities or not granularities:
        fields = [segment_dict(segment) for segment in transcript.segments]
        body["segments"] = [
            {"id": number, **{name: value for name, value in each.items() if name != "words"}}
            for number, each in enumerate(fields)
        ]
    if "word" in granularities:
        body["words"] = [{"word": word.text, "start": word.start, "end": word.end} for word in transcript.words]
    return body


def event(**fields) -> str:
    """Returns a server-sent event."""
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"


class Chats:
    """
    Checks what `POST /v1/chat/completions` asks for, before upstream's handler, which ignores much of it, and opens
    clips and pictures in threads, because upstream would let all other requests wait for them. They wait for video.
    """

    def __init__(self, handler, model_manager):
        self.handler, self.model_manager, self.openers = handler, model_manager, ThreadPoolExecutor(OPENERS)
        limits = getattr(handler, "chat_template_kwargs", {})  # of newer releases
        self.limits = {name: limits[name] for name in FETCH_LIMITS if name in limits}
        # Upstream drops content of types that it does not know.
        handler.get_processor_inputs_from_messages = lambda messages, modality: messages

    async def handle_request(self, body: dict, request_id: str):
        served = self.model_manager.force_model
        name = self.model_manager.process_model_name(served)
        model, processor = await asyncio.to_thread(self.model_manager.load_model_and_processor, name)
        defaults = {name: value for name, value in model.generation_config.to_dict().items() if value is not None}
        chat, loop = read_chat(body, served, defaults), asyncio.get_running_loop()
        check_bias(chat, model.config.get_text_config().vocab_size)
        for message in chat["messages"]:
            opening = (loop.run_in_executor(self.openers, self.open, processor, item) for item in message["content"])
            message["content"] = await asyncio.gather(*opening)
        return await self.handler.handle_request(chat, request_id)

    def open(self, processor, item: dict) -> dict:
        """Opens a clip or a picture, as far as it has a source; an empty one may stand for the sound of a video."""
        if item["type"] not in ("audio", "image") or item["type"] not in item:
            return item
        opened = processor.open_item(item, **self.limits)
        if item["type"] == "image":
            opened["image"] = decode_image(opened["image"])  # here, and not where all others would wait for it
        return opened


class Transcriptions:
    """Answers `POST /v1/audio/transcriptions`, in the place of transformers' handler for models of other families."""

    def __init__(self, model_manager, generation_state, aligner: str | None = None):
        self.model_manager, self.generation_state = model_manager, generation_state
        self.aligner_name, self.aligner, self.lock = aligner, None, threading.Lock()
        self.places = asyncio.Semaphore(MAX_FILES)

    async def handle_request(self, request):
        """Returns the response to a request, which is a form. What is wrong with it raises a ValueError."""
        from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

        asked, file = await self.read_form(request)
        transcriber = await asyncio.to_thread(self.make_transcriber, asked)
        batches = self.run(transcriber, file)
        first = await anext(batches, None)  # a file that is no audio raises here, before a stream begins
        if asked.stream:
            return StreamingResponse(self.stream(first, batches), media_type="text/event-stream")
        done = [] if first is None else [first]
        # What comes after the form is that the client has left; middleware hides it from `is_disconnected`.
        has_left = asyncio.ensure_future(request.receive())
        try:
            async with contextlib.aclosing(batches):
                async for batch in batches:
                    done.append(batch)
                    if has_left.done():  # nobody waits for the rest
                        break
        finally:
            has_left.cancel()
        transcript = join_batches(done, asked.language)
        if asked.response_format == "verbose_json":
            return JSONResponse(verbose(transcript, asked.granularities))
        if asked.response_format == "json":
            return JSONResponse({"text": transcript.text})
        write = {"text": lambda whole: whole.text + "\n", "srt": to_srt, "vtt": to_vtt}[asked.response_format]
        return PlainTextResponse(await asyncio.to_thread(write, transcript))  # an hour of subtitles takes seconds

    async def read_form(self, request) -> tuple[Asked, BinaryIO]:
        """Returns what a request asks for, and its file, which lies on the disk if it is larger than 1 MB."""
        from starlette.exceptions import HTTPException
        from starlette.requests import Request

        if not is_multipart_available():
            raise ValueError("This server cannot read forms; it needs the package python-multipart.")
        left, too_large = MAX_FORM, f"The request is larger than the limit of {MAX_FORM} bytes."

        async def receive():
            nonlocal left
            message = await request.receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise ValueError(too_large)
            return message

        try:
            form = await Request(request.scope, receive).form()
            return read_fields(form), form["file"].file
        except HTTPException as error:
            raise ValueError(f"The form cannot be read: {error.detail}") from error

    def make_transcriber(self, asked: Asked) -> Transcriber:
        """Returns what transcribes as asked. It asks the model in the thread in which chats are answered as well."""
        served = self.model_manager.force_model
        check_model(asked.model, served)
        name = self.model_manager.process_model_name(served)
        model, processor = self.model_manager.load_model_and_processor(name)
        settings = {"language": asked.language, "prompt": asked.prompt}
        if "word" in asked.granularities:
            settings["aligner"] = self.find_aligner(model.config)
            settings["max_seconds"] = min(longest_piece(processor), PIECE_SECONDS)
        transcriber = make_transcriber(model, processor, **settings)
        manager, ask = self.generation_state.get_manager(name), transcriber.ask
        transcriber.ask = lambda clips: manager.submit(ask, clips).result()
        return transcriber

    def find_aligner(self, config) -> Aligner:
        """Returns what finds the times of words, which is loaded when it is first asked for."""
        name = self.aligner_name or getattr(config, "audio_encoder_origin", None)
        if not name:
            raise ValueError(
                "This server has no times of words: they need the complete Whisper of the audio encoder, and the model "
                "does not name it; start serve.py with --aligner and its folder or Hub id."
            )
        with self.lock:
            self.aligner = self.aligner or Aligner(find_aligner(name))
        return self.aligner

    async def run(self, transcriber: Transcriber, file: BinaryIO) -> AsyncIterator[tuple[int, list[Segment]]]:
        """Yields what [`Transcriber.batches`] yields. It runs in a thread, so that other requests are answered."""
        async with self.places:
            batches, loop = transcriber.batches(file, **FILE_LIMITS), asyncio.get_running_loop()
            pool = ThreadPoolExecutor(1)
            try:
                while (batch := await loop.run_in_executor(pool, next, batches, None)) is not None:
                    yield batch
            finally:
                # The thread may still be at work for a client that has left, so it closes the file itself.
                pool.submit(batches.close)
                pool.shutdown(wait=False)

    async def stream(self, first, batches: AsyncIterator) -> AsyncIterator[str]:
        """Yields OpenAI's events: a delta for each segment, and the whole text at the end."""
        text = ""
        async with contextlib.aclosing(batches):
            try:
                while first is not None:
                    for segment in first[1]:
                        if segment.text:
                            delta = f" {segment.text}" if text else segment.text
                            text += delta
                            yield event(type="transcript.text.delta", delta=delta)
                    first = await anext(batches, None)
                yield event(type="transcript.text.done", text=text)
                yield "data: [DONE]\n\n"
            except Exception as error:  # of many types; the status of the response is already sent
                logger.warning(f"A transcript ended early: {error!r}")
                yield event(error={"message": f"The transcript ended early: {error}"})


def describe_error(error: Exception) -> dict:
    """Returns an error as OpenAI's API describes it."""
    message = getattr(error, "detail", str(error))  # starlette's own
    if isinstance(error, KeyError):
        message = f"The request has no {error}."
    elif not isinstance(error, ValueError) and hasattr(error, "errors"):  # FastAPI's
        message = f"The body of the request must be a JSON object: {error.errors()[0]['msg']}."
    fields = {name: getattr(error, name, None) for name in ("param", "code")}
    message = str(message).encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be sent
    return {"message": message, "type": "invalid_request_error", **fields}


def change_server(aligner: str | None):
    """Makes `transformers serve` transcribe with this model, and answer bad requests with HTTP 400 and the reason."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    build_server = server.build_server

    def build(*args, **kwargs):
        bound = inspect.signature(build_server).bind(*args, **kwargs)
        given = bound.arguments
        transcriptions = Transcriptions(given["model_manager"], given["generation_state"], aligner)
        given["transcription_handler"] = transcriptions
        given["chat_handler"] = Chats(given["chat_handler"], given["model_manager"])
        api = build_server(*bound.args, **bound.kwargs)

        @api.exception_handler(ValueError)
        @api.exception_handler(KeyError)  # of a field that is missing, on upstream's other routes
        @api.exception_handler(HTTPException)
        @api.exception_handler(RequestValidationError)  # a body that is no JSON, or no object
        async def refuse(request, error):
            logger.warning(f"A request was refused: {error!r}")
            status = getattr(error, "status_code", getattr(error, "status", 400))
            return JSONResponse({"error": describe_error(error)}, status_code=status)

        return api

    server.build_server = build


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--aligner")
    options, arguments = parser.parse_known_args()
    if not arguments or arguments[0].startswith("-"):
        sys.exit(__doc__)
    try:
        if options.aligner:
            find_aligner(options.aligner)  # which says now, and not with the first request, that it is not there
        register(arguments[0])
    except ValueError as error:
        sys.exit(f"serve.py: {error}")
    change_server(options.aligner)
    app(["serve", *arguments])
