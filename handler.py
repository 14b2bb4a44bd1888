"""
Serves the folder that it lies in: untrusted requests -> answers.

An Inference Endpoint makes one `EndpointHandler` and calls it with the body of every request; what it raises is
answered with HTTP 400 and `{"error": "..."}` (https://github.com/huggingface/huggingface-inference-toolkit).
"""

import inspect
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoModel, AutoProcessor, BatchFeature, ProcessorMixin, StoppingCriteria
from transformers.utils import logging

from audio_utils import join_texts
from configuration_qwen2_audio_vl import TRANSCRIBE


logger = logging.get_logger(__name__)

# Read by oneDNN when it computes for the first time. On a CPU it keeps kernels for every shape in bfloat16, about a
# megabyte each: 1024 of them by default, which grow into gigabytes with the lengths of prompts.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
CPU_LENGTHS = 64  # on a CPU prompts are padded to a multiple of this, for fewer shapes

DESCRIBE = "What is in the photo?"  # the question about a picture that comes without one
# Base64, too long to be a word: how `InferenceClient.automatic_speech_recognition` sends a clip beside parameters.
FILE = re.compile(r"[A-Za-z0-9+/]{1000,}={0,2}")
ROLES = ("system", "user", "assistant")
MAX_MESSAGES = 64
MAX_ITEMS = 8  # pictures in a request, and clips likewise
MAX_TEXT = 100_000  # characters of a request
MAX_BYTES = 2**25  # of a picture or clip
MAX_SECONDS = 600.0  # of a clip
MAX_PIXELS = 2**26  # of all pictures of a request
NUM_DECODERS = 2  # requests whose pictures are decoded at once
STRIP = 256  # rows of a picture that are converted at a time
MAX_CONTENT = 1024  # items of a request, texts included
MAX_DOWNLOADS = 16  # requests with addresses that are opened at once, so that others find a free thread
TIMEOUT = 15.0  # seconds to open all pictures and clips of a request
QUEUE_SECONDS = 30.0  # from a request's arrival until its answer begins
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# Type and bounds of each generation parameter.
PARAMETERS = {
    "max_new_tokens": (int, 1, 1024),
    "do_sample": (bool, False, True),
    "temperature": (float, 0.0, 2.0),
    "top_k": (int, 1, 1000),
    "top_p": (float, 0.01, 1.0),
    "repetition_penalty": (float, 0.5, 2.0),
}
SAMPLING = ("temperature", "top_k", "top_p")
# transformers before 5.23 cannot encode a user's control tokens as text.
SANITIZES = "sanitize_control_tokens" in inspect.signature(ProcessorMixin.apply_chat_template).parameters
MAX_WAITING = 64  # requests that are opened, wait or are answered at once
MAX_WAITING_BYTES = 2**31  # of the inputs of requests that wait; a picture of full size is 308 MB of them
MAX_BATCH = 16  # requests answered together
MAX_BATCH_TOKENS = 2**16  # of all that is computed at once, padding and answers included
SHORT = 64  # tokens of an answer for which a longer batch pauses


class RequestError(ValueError):
    """A request that cannot be answered. The message is one sentence for its sender."""


class Deadline:
    """The moment when a request has waited long enough, so many seconds from now."""

    def __init__(self, seconds: float, message: str):
        self.end, self.message = time.monotonic() + seconds, message

    def left(self) -> float:
        """
        Returns the seconds that are left.

        Raises:
            RequestError: with the message, if none are.
        """
        left = self.end - time.monotonic()
        if left <= 0:
            raise RequestError(self.message)
        return left


@dataclass(eq=False)
class Request:
    """A request that waits for its answer: the processor's inputs for one prompt, and the settings of `generate`."""

    inputs: BatchFeature
    max_new_tokens: int
    settings: dict
    answer: Future = field(default_factory=Future)

    @property
    def num_tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.inputs.values())


def padded_tokens(batch: list[Request]) -> int:
    """How many tokens a batch computes at most."""
    longest_prompt = max(request.num_tokens for request in batch)
    return len(batch) * (longest_prompt + max(request.max_new_tokens for request in batch))


class RowEnds(StoppingCriteria):
    """
    Ends each row of a batch at its own request's `max_new_tokens`, and answers a request as soon as its row has ended.

    Args:
        batch: The requests, one a row.
        prompt_length: Tokens before the answers, padding included.
        tokenizer: Decodes the answers.
        end_ids: One token that ends an answer, or several, or None.
        after_step: Called after every step.
    """

    def __init__(self, batch: list[Request], prompt_length: int, tokenizer, end_ids, after_step: Callable):
        self.batch, self.prompt_length, self.tokenizer, self.after_step = batch, prompt_length, tokenizer, after_step
        self.end_ids = torch.tensor([] if end_ids is None else end_ids, dtype=torch.long).reshape(-1)
        self.limits = torch.tensor([request.max_new_tokens for request in batch])

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        num_new = input_ids.shape[1] - self.prompt_length
        ended = (self.limits <= num_new) | torch.isin(input_ids[:, -1].cpu(), self.end_ids)
        if ended.any():
            self.answer(input_ids[:, self.prompt_length :], ended.tolist())
        self.after_step()
        return ended.to(input_ids.device)

    def answer(self, new: torch.LongTensor, ended: list[bool]):
        for request, row, has_ended in zip(self.batch, new, ended, strict=True):
            if has_ended and not request.answer.done():
                request.answer.set_result(self.tokenizer.decode(row, skip_special_tokens=True).strip())


class EndpointHandler:
    """
    Answers one request per call. Calls may come from many threads. Requests that wait at the same time are answered as
    one batch if they differ in nothing but `max_new_tokens`.

    Args:
        path (`str`): The repository folder. The default is the one of this file.
    """

    def __init__(self, path: str = ""):
        path = path or str(Path(__file__).parent)
        if not os.path.isdir(path) and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
            raise OSError(f"There is no folder {path}, and it is no Hub id either, which would be OWNER/NAME.")
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True, dtype="auto", device_map="auto").eval()
        self.max_positions = self.model.config.text_config.max_position_embeddings
        self.max_batch_tokens = max(MAX_BATCH_TOKENS, self.max_positions)
        self.downloads = threading.BoundedSemaphore(MAX_DOWNLOADS)
        # Few threads, because each keeps some of the memory that pictures took.
        self.decoders = ThreadPoolExecutor(NUM_DECODERS)
        self.places = threading.BoundedSemaphore(MAX_WAITING)
        self.waiting: list[Request] = []
        self.last_settings, self.next_pause = None, 0.0
        self.executor = ThreadPoolExecutor(1)  # one thread, as each that computes has OpenMP threads of its own

    def __call__(self, data: dict) -> dict:
        """
        Args:
            data: `inputs` is one of
                - chat messages, `[{"role", "content"}, ...]` or `{"messages": [...]}`, with content items of
                  transformers or OpenAI;
                - `{"text", "image", "audio"}`: each of the latter an address, base64, or a list of these;
                - the bytes of an audio file, or their base64; or a [`PIL.Image.Image`].
                `parameters`, as in `PARAMETERS`, is optional. The default is greedy, of at most 256 tokens.

        Returns:
            `{"text": answer}`.

        Raises:
            RequestError: if the request cannot be answered; its message tells why. Others are not affected.
            RuntimeError: if the fault is the server's. The log has the reason; the message does not.
        """
        try:
            if not self.places.acquire(blocking=False):
                raise RequestError(f"{MAX_WAITING} requests are waiting already; send the request again later.")
            try:
                return {"text": self._answer_request(data)}
            finally:
                self.places.release()
        except ValueError as error:
            message = " ".join(str(error).split())
            raise RequestError(message if len(message) <= 400 else message[:397] + "...") from None
        except Exception:
            logger.exception("A request failed.")
            raise RuntimeError("The request could not be answered.") from None

    def _answer_request(self, data: dict) -> str:
        busy = f"The server could not begin the answer within {QUEUE_SECONDS:g} s; send the request again later."
        deadline = Deadline(QUEUE_SECONDS, busy)
        if not isinstance(data, dict) or "inputs" not in data or set(data) - {"inputs", "parameters"}:
            raise RequestError(f"A request must be an object of inputs and perhaps parameters, got {name_keys(data)}.")
        settings = read_parameters(data.get("parameters") or {})
        max_new_tokens = settings.pop("max_new_tokens")
        messages = self._open_messages(read_messages(data["inputs"]))
        if count_pixels(items_of(messages)):
            inputs = wait_for(self.decoders.submit(self._process, messages), deadline)
        else:
            inputs = self._process(messages)
        request = Request(inputs, max_new_tokens, settings)
        if request.num_tokens + max_new_tokens > self.max_positions:
            raise RequestError(
                f"Prompt and answer must fit the model's {self.max_positions} positions, but the prompt has "
                f"{request.num_tokens} tokens and max_new_tokens is {max_new_tokens}."
            )
        others = list(self.waiting)
        if others and request.num_bytes + sum(other.num_bytes for other in others) > MAX_WAITING_BYTES:
            raise RequestError("The requests that wait take all memory for them; send the request again later.")
        self.waiting.append(request)
        self.executor.submit(self._answer_waiting)
        return wait_for(request.answer, deadline)

    def _open_messages(self, messages: list[dict]) -> list[dict]:
        """Copies of messages, with samples in the place of clips, and pictures that are opened but not decoded."""
        (normalized,), _ = self.processor.normalize_conversations(messages)
        opened = [self._read_message(message) for message in normalized]
        items = items_of(opened)
        for kind in ("image", "audio"):
            count = sum(item["type"] == kind for item in items)
            if count > MAX_ITEMS:
                raise RequestError(f"The request has {count} items of type {kind}; it must have at most {MAX_ITEMS}.")
        length = sum(len(item["text"]) for item in items if item["type"] == "text")
        if length > MAX_TEXT:
            raise RequestError(f"The request has {length} characters of text; it must have at most {MAX_TEXT}.")
        if any(names_address(item) for item in items):
            if not self.downloads.acquire(blocking=False):
                raise RequestError(f"{MAX_DOWNLOADS} requests with addresses are being opened; send it again later.")
            try:
                self._open_items(items)
            finally:
                self.downloads.release()
        else:
            self._open_items(items)
        return opened

    def _read_message(self, message: dict) -> dict:
        """A copy of a normalized message whose content is a list of items that are served, adjacent texts joined."""
        content = message["content"]
        items = [{"type": "text", "text": content}] if isinstance(content, str) else join_texts(content)
        for item in items:
            if item["type"] not in ("text", "image", "audio"):
                raise RequestError(
                    f"Content of type {item['type']} is not served here: the type must be text, image or audio."
                )
        return {"role": message["role"], "content": items}

    def _open_items(self, items: list[dict]):
        """Puts pictures and samples into their items, before one deadline for all of them."""
        deadline = Deadline(TIMEOUT, f"The pictures and clips of a request must be opened within {TIMEOUT:g} s.")
        limits = {"max_bytes": MAX_BYTES, "max_seconds": MAX_SECONDS, "public_only": True, "formats": IMAGE_FORMATS}
        for kind in ("image", "audio"):  # pictures first, whose headers alone are read
            for item in items:
                if item["type"] == kind:
                    opened = self.processor.open_item(item, timeout=deadline.left(), **limits)
                    replace_item(item, opened[kind])
                    if count_pixels(items) > MAX_PIXELS:
                        raise RequestError(f"The pictures of a request must have at most {MAX_PIXELS} pixels together.")

    def _process(self, messages: list[dict]) -> BatchFeature:
        """The model's inputs for messages that are open. Pictures are decoded here, and taken out of the messages."""
        pictures = [item for item in items_of(messages) if item["type"] == "image"]
        for item in pictures:
            replace_item(item, read_pixels(decode_image(item["image"])))
        inputs = self._apply_template(messages)
        for item in pictures:
            item.clear()
        return inputs

    def _apply_template(self, messages: list[dict]) -> BatchFeature:
        settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        if SANITIZES:
            settings["sanitize_control_tokens"] = True
        else:
            special = self.processor.tokenizer.all_special_tokens
            texts = [item["text"] for item in items_of(messages) if item["type"] == "text"]
            found = next((token for token in special for text in texts if token in text), None)
            if found is not None:
                raise RequestError(f"Text must not hold the model's control tokens, got {found}.")
        return self.processor.apply_chat_template(messages, **settings)

    def _answer_waiting(self):
        """Answers the next batch of requests that wait, if any do: others may have been answered with earlier ones."""
        if batch := self._next_batch(self.max_batch_tokens):
            self._answer(batch)

    def _next_batch(self, max_tokens: int, max_new_tokens: int = sys.maxsize) -> list[Request]:
        """
        Takes the first request that waits, and others with the same settings, as many as fit.

        Args:
            max_tokens: Of the batch, padding and answers included.
            max_new_tokens: Of each answer.
        """
        for request in [request for request in self.waiting if request.answer.cancelled()]:
            self.waiting.remove(request)
        waiting = [request for request in self.waiting if request.max_new_tokens <= max_new_tokens]
        # In the order of arrival, but never twice in a row with the same settings while others wait.
        waiting.sort(key=lambda request: request.settings == self.last_settings)
        batch = []
        for request in waiting:
            has_room = len(batch) < MAX_BATCH and padded_tokens([*batch, request]) <= max_tokens
            if has_room and request.settings == waiting[0].settings and request.answer.set_running_or_notify_cancel():
                batch.append(request)
        for request in batch:
            self.waiting.remove(request)
        return batch

    def _answer(self, batch: list[Request], may_pause: bool = True):
        def pause():
            """Answers short requests that came later, and lets the batch go on for as long as that took."""
            start = time.monotonic()
            if not may_pause or not self.waiting or start < self.next_pause:
                return
            if short := self._next_batch(self.max_batch_tokens - padded_tokens(batch), SHORT):
                self._answer(short, may_pause=False)
                self.next_pause = 2 * time.monotonic() - start

        self.last_settings = batch[0].settings
        try:
            multiple = CPU_LENGTHS if self.model.device.type == "cpu" else 1
            tokenizer, end_ids = self.processor.tokenizer, self.model.generation_config.eos_token_id
            inputs = self.processor.join_rows([request.inputs for request in batch], multiple)
            ends = RowEnds(batch, inputs["input_ids"].shape[1], tokenizer, end_ids, pause)
            with torch.inference_mode():
                output = self.model.generate(
                    **inputs.to(self.model.device),
                    **batch[0].settings,
                    max_new_tokens=max(request.max_new_tokens for request in batch),
                    stopping_criteria=[ends],
                )
            # Something else in the generation config, such as `max_time`, may have ended rows.
            ends.answer(output[:, ends.prompt_length :], [True] * len(batch))
        except Exception as error:
            unanswered = [request for request in batch if not request.answer.done()]
            if len(batch) > 1:  # each is answered alone, so that only the request that causes the error fails
                for request in unanswered:
                    self._answer([request], may_pause)
            elif unanswered:
                # Never a ValueError, which `__call__` would report as the request's fault.
                failure = RuntimeError("generate failed")
                failure.__cause__ = error
                batch[0].answer.set_exception(failure)


def wait_for(future: Future, deadline: Deadline):
    """
    The result of what a thread computes for a request.

    Raises:
        RequestError: if it has not begun before the deadline; it is cancelled then.
    """
    try:
        return future.result(max(0.0, deadline.end - time.monotonic()))
    except TimeoutError:
        if future.cancel():
            raise RequestError(deadline.message) from None
        return future.result()


def items_of(messages: list[dict]) -> list[dict]:
    return [item for message in messages for item in message["content"]]


def names_address(item: dict) -> bool:
    """Whether a normalized content item has to be downloaded."""
    source = item.get(item["type"]) if item["type"] != "text" else None
    return isinstance(source, str) and source[:4096].lstrip().lower().startswith(("http://", "https://"))


def replace_item(item: dict, content):
    kind = item["type"]
    item.clear()
    item.update({"type": kind, kind: content})


def count_pixels(items: list[dict]) -> int:
    """The pixels of all pictures that are open already."""
    pictures = (item["image"] for item in items if isinstance(item.get("image"), Image.Image))
    return sum(picture.width * picture.height for picture in pictures)


def decode_image(image: Image.Image) -> Image.Image:
    """Decodes a picture in place, and turns it upright."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
        return image
    except Exception as error:  # of many types, in Pillow's decoders of broken files
        raise RequestError("A picture is broken or cut short: the whole file must be sent.") from error


def read_pixels(image: Image.Image) -> torch.Tensor:
    """
    The pixels of a decoded picture, uint8 `[3, height, width]`. They are converted strip by strip, because Pillow and
    the processor would copy the whole picture several times.
    """
    pixels = torch.empty(3, image.height, image.width, dtype=torch.uint8)
    for top in range(0, image.height, STRIP):
        strip = image.crop((0, top, image.width, min(top + STRIP, image.height))).convert("RGB")
        pixels[:, top : top + STRIP] = torch.from_numpy(np.array(strip)).permute(2, 0, 1)
    return pixels


def read_messages(inputs) -> list[dict]:
    """Chat messages from any of the forms of a request, checked but not opened."""
    if isinstance(inputs, (bytes, bytearray)):
        inputs = {"audio": bytes(inputs), "text": TRANSCRIBE}
    elif isinstance(inputs, Image.Image):
        inputs = {"image": inputs, "text": DESCRIBE}
    elif isinstance(inputs, str):
        inputs = {"audio": inputs, "text": TRANSCRIBE} if FILE.fullmatch(inputs) else {"text": inputs}
    if isinstance(inputs, dict) and set(inputs) == {"messages"}:
        inputs = inputs["messages"]
    if isinstance(inputs, dict):
        if not inputs or set(inputs) - {"text", "image", "audio"}:
            raise RequestError(
                f"Inputs must be messages, or an object of text, image and audio; got {name_keys(inputs)}."
            )
        given = {kind: inputs[kind] for kind in ("image", "audio", "text") if inputs.get(kind) is not None}
        sources = {kind: value if isinstance(value, list) else [value] for kind, value in given.items()}
        check_count(sum(map(len, sources.values())))  # before an item is made of each
        content = [{"type": kind, kind: source} for kind, listed in sources.items() for source in listed]
        if "text" not in inputs:
            content.append({"type": "text", "text": TRANSCRIBE if "audio" in inputs else DESCRIBE})
        inputs = [{"role": "user", "content": content}]
    if not isinstance(inputs, list) or not 1 <= len(inputs) <= MAX_MESSAGES:
        given = len(inputs) if isinstance(inputs, list) else f"a {type(inputs).__name__}"
        raise RequestError(f"Messages must be a list of 1 to {MAX_MESSAGES}, got {given}.")
    for message in inputs:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise RequestError(
                f"Every message must have a role and a content and nothing else, got {name_keys(message)}."
            )
        if message["role"] not in ROLES:
            raise RequestError(f"The role of a message must be one of {', '.join(ROLES)}; got {message['role']!r:.40}.")
        if not isinstance(message["content"], (str, list)):
            given = type(message["content"]).__name__
            raise RequestError(f"The content of a message must be a text or a list of items, got a {given}.")
    check_count(sum(len(message["content"]) for message in inputs if isinstance(message["content"], list)))
    if inputs[-1]["role"] != "user":
        raise RequestError(f"The last message must be the user's, got one of role {inputs[-1]['role']}.")
    return inputs


def check_count(items: int):
    if items > MAX_CONTENT:
        raise RequestError(f"The request has {items} items; it must have at most {MAX_CONTENT}.")


def name_keys(value) -> str:
    """The keys of an object, or the type of anything else, for messages."""
    return (", ".join(map(str, value)) or "nothing") if isinstance(value, dict) else f"a {type(value).__name__}"


def read_parameters(parameters: dict) -> dict:
    """The settings of `generate`, within bounds; greedy unless a parameter of sampling is given."""
    if not isinstance(parameters, dict):
        raise RequestError(f"Parameters must be an object of names and values, got a {type(parameters).__name__}.")
    settings = {}
    for name, value in parameters.items():
        if name not in PARAMETERS:
            raise RequestError(f"There is no parameter {name!s:.40}; it must be one of {', '.join(PARAMETERS)}.")
        kind, low, high = PARAMETERS[name]
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and kind is not bool) or not low <= value <= high:
            article = "an" if kind is int else "a"
            raise RequestError(f"{name} must be {article} {kind.__name__} from {low} to {high}, got {value!r:.40}.")
        settings[name] = kind(value)  # `generate` refuses 2 where it takes 2.0
    if settings.get("temperature", 1.0) < 1e-6:  # 0 is the usual way to ask for greedy, and less divides by nothing
        del settings["temperature"]
        settings.setdefault("do_sample", False)
    sampling = [name for name in SAMPLING if name in settings]
    if sampling and settings.get("do_sample") is False:
        raise RequestError(
            f"{' and '.join(sampling)} must not be given with do_sample false, which is without sampling."
        )
    return {"max_new_tokens": 256, "do_sample": bool(sampling), **settings}
