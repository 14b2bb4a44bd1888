"""
Serves the folder that it lies in, to clients that are not trusted.

An Inference Endpoint makes one `EndpointHandler` and calls it with the body of each request. It answers HTTP 400 and
`{"error": "..."}` when the call raises (https://github.com/huggingface/huggingface-inference-toolkit).
"""

import inspect
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoModel, AutoProcessor, BatchFeature, ProcessorMixin, StoppingCriteria
from transformers.utils import logging

from audio_streaming import find_voice
from audio_utils import SAMPLING_RATE
from configuration_qwen2_audio_vl import LONGER, PIECE_SECONDS, TRANSCRIBE
from content_items import join_texts
from transcribe import BATCH_SIZE, Answer, Transcriber, find_aligner, join_batches, longest_answer, longest_piece
from word_times import Aligner


logger = logging.get_logger(__name__)

# oneDNN reads this when it computes for the first time. On a CPU it keeps kernels for every shape in bfloat16, about a
# megabyte each: by default 1024 of them, which take gigabytes as prompts differ in length.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
CPU_LENGTHS = 64  # on a CPU prompts are padded to a multiple of this, so that there are fewer shapes

DESCRIBE = "What is in the photo?"  # what is asked about a picture that comes without a question
# Base64 that is too long to be a word. `InferenceClient.automatic_speech_recognition` sends clips so with parameters.
FILE = re.compile(r"[A-Za-z0-9+/]{1000,}={0,2}")
ROLES = ("system", "user", "assistant")
MODALITIES = ("image", "audio", "text")  # the types of content that are served
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_BYTES = 2**25  # bytes of a picture or clip
MAX_SECONDS = 600.0  # seconds of a clip
MAX_PIXELS = 2**26  # pixels of all pictures of a request
MAX_ITEMS = 8  # pictures of a request, and clips likewise
MAX_CONTENT = 1024  # items of a request, texts included
MAX_MESSAGES = 64  # messages of a request
MAX_TEXT = 100_000  # characters of a request
TIMEOUT = 15.0  # seconds to open all pictures and clips of a request
QUEUE_SECONDS = 30.0  # seconds from the arrival of a request until its answer begins
MAX_DOWNLOADS = 16  # requests with addresses that are opened at once, so that others find a free thread
NUM_DECODERS = 2  # requests whose pictures are decoded at once
STRIP = 256  # rows of a picture that are converted at a time
MAX_WAITING = 64  # requests that are opened, wait or are answered at once
MAX_WAITING_BYTES = 2**31  # bytes of the inputs of requests that wait; a picture of full size has 308 MB of them
MAX_BATCH = 16  # requests answered together
MAX_BATCH_TOKENS = 2**16  # tokens computed at once, padding and answers included
SHORT = 64  # a batch pauses for answers of at most this many tokens
NEW_TOKENS = 256  # the default of `max_new_tokens`
# The type and the bounds of each generation parameter.
PARAMETERS = {
    "max_new_tokens": (int, 1, 1024),
    "do_sample": (bool, False, True),
    "temperature": (float, 0.0, 2.0),
    "top_k": (int, 1, 1000),
    "top_p": (float, 0.01, 1.0),
    "repetition_penalty": (float, 0.5, 2.0),
    "return_timestamps": (bool, False, True),
}
SAMPLING, WORD_TIMES = ("temperature", "top_k", "top_p"), ("return_timestamps", "word")
# transformers before 5.23 cannot encode a user's control tokens as text.
SANITIZES = "sanitize_control_tokens" in inspect.signature(ProcessorMixin.apply_chat_template).parameters


class RequestError(ValueError):
    """A request cannot be answered. The message is one sentence for its sender."""


def check_limit(count: int, what: str, maximum: int):
    """Raises a [`RequestError`] if a request has more of something than it may have."""
    if count > maximum:
        raise RequestError(f"The request has {count} {what}; it must have at most {maximum}.")


def check_length(num_tokens: int, max_new_tokens: int, positions: int):
    parts = f"tokens ({num_tokens} of the prompt and {max_new_tokens} of the answer)"
    check_limit(num_tokens + max_new_tokens, parts, positions)


class Deadline:
    """The moment when a request has waited long enough; `message` tells its sender so. The default is the queue's."""

    def __init__(self, seconds: float = 0.0, message: str = ""):
        busy = f"The server could not begin the answer within {QUEUE_SECONDS:g} s; send the request again later."
        self.end, self.message = time.monotonic() + (seconds or QUEUE_SECONDS), message or busy

    def left(self) -> float:
        """Returns the seconds that are left, or raises a [`RequestError`] if none are."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise RequestError(self.message)
        return left

    def wait_for(self, future: Future):
        """Returns a future's result. If it does not begin in time it is cancelled, and a [`RequestError`] raised."""
        try:
            return future.result(max(0.0, self.end - time.monotonic()))
        except TimeoutError:
            if future.cancel():
                raise RequestError(self.message) from None
            return future.result()


@dataclass(eq=False)
class Request:
    """A request that waits for its answer: the processor's inputs for one prompt, and the settings of `generate`."""

    inputs: BatchFeature
    max_new_tokens: int
    settings: dict
    answer: Future = field(default_factory=Future)
    is_complete: bool = False  # whether the model ended the answer by itself

    @property
    def num_tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.inputs.values())


def padded_tokens(batch: list[Request]) -> int:
    """Returns how many tokens a batch computes at most."""
    return len(batch) * (max(each.num_tokens for each in batch) + max(each.max_new_tokens for each in batch))


class RowEnds(StoppingCriteria):
    """
    Ends each row of a batch at its own request's `max_new_tokens`, and answers a request as soon as its row has ended.
    `end_ids` are one token that ends an answer, or several, or None. `after_step` is called after every step.
    """

    def __init__(self, batch: list[Request], prompt_length: int, tokenizer, end_ids, after_step: Callable):
        self.batch, self.prompt_length, self.tokenizer, self.after_step = batch, prompt_length, tokenizer, after_step
        self.end_ids = torch.tensor([] if end_ids is None else end_ids, dtype=torch.long).reshape(-1)
        self.limits = torch.tensor([request.max_new_tokens for request in batch])

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        num_new = input_ids.shape[1] - self.prompt_length
        ended = (self.limits <= num_new) | torch.isin(input_ids[:, -1].cpu(), self.end_ids)
        if ended.any():
            self.answer(input_ids, ended.tolist())
        self.after_step()
        return ended.to(input_ids.device)

    def answer(self, sequences: torch.LongTensor, ended: list[bool]):
        for request, ids, has_ended in zip(self.batch, sequences[:, self.prompt_length :], ended, strict=True):
            if has_ended and not request.answer.done():
                request.is_complete = bool(torch.isin(ids.cpu(), self.end_ids).any())
                request.answer.set_result(self.tokenizer.decode(ids, skip_special_tokens=True).strip())


class EndpointHandler:
    """
    Answers one request per call. Calls may come from many threads. Requests that wait at the same time are answered as
    one batch if they differ in nothing but `max_new_tokens`. `path` is the repository's, by default this file's folder.
    """

    def __init__(self, path: str = ""):
        path = path or str(Path(__file__).parent)
        if not os.path.isdir(path) and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
            raise OSError(f"There is no folder {path}, and it is no Hub id either, which would be OWNER/NAME.")
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True, dtype="auto", device_map="auto").eval()
        self.max_positions = self.model.config.text_config.max_position_embeddings
        self.max_batch_tokens = max(MAX_BATCH_TOKENS, self.max_positions)
        self.places = threading.BoundedSemaphore(MAX_WAITING)
        self.downloads = threading.BoundedSemaphore(MAX_DOWNLOADS)
        self.decoders = ThreadPoolExecutor(NUM_DECODERS)  # few, as each thread keeps some memory of the pictures
        self.executor = ThreadPoolExecutor(1)  # one, as every thread that computes has OpenMP threads of its own
        self.waiting: list[Request] = []
        self.last_settings, self.next_pause = None, 0.0

    def __call__(self, data: dict) -> dict:
        """
        Args:
            data: `inputs` is one of
                - chat messages, `[{"role", "content"}, ...]` or `{"messages": [...]}`, with content items of
                  transformers or OpenAI;
                - `{"text", "image", "audio"}`, where image and audio are an address, base64, or a list of these;
                - the bytes of an audio file, or their base64; or a [`PIL.Image.Image`].
                `parameters`, as in `PARAMETERS`, are optional. By default the answer is greedy and has at most
                `NEW_TOKENS` tokens.

        Returns:
            `{"text": answer}`, for a clip alone with `return_timestamps` also `chunks` of `text` and `timestamp`.

        Raises:
            RequestError: if the request cannot be answered; its message tells why. Others are not affected.
            RuntimeError: if the fault is the server's. The log has the reason, and the message has not.
        """
        try:
            with one_of(self.places, f"{MAX_WAITING} requests are waiting already; send the request again later."):
                return self._answer_request(data)
        except ValueError as error:
            message = " ".join(str(error).split())
            raise RequestError(message if len(message) <= 400 else message[:397] + "...") from None
        except Exception:
            logger.exception("A request failed.")
            raise RuntimeError("The request could not be answered.") from None

    def _answer_request(self, data: dict) -> dict:
        deadline = Deadline()
        if not isinstance(data, dict) or "inputs" not in data or set(data) - {"inputs", "parameters"}:
            raise RequestError(f"A request must be an object of inputs and perhaps parameters, got {name_keys(data)}.")
        settings = read_parameters(data.get("parameters") or {})
        max_new_tokens, times = settings.pop("max_new_tokens"), settings.pop("return_timestamps", False)
        messages = self._open_messages(read_messages(data["inputs"]))
        clips = [item["audio"] for item in items_of(messages) if item["type"] == "audio"]
        others = [item.get("text") for item in items_of(messages) if item["type"] != "audio"]
        is_alone = len(clips) == len(messages) == 1 and others == [TRANSCRIBE]
        if times and not is_alone:
            raise RequestError("return_timestamps is for one clip alone, without a text, a picture or another clip.")
        longest = longest_piece(self.processor)
        # Models answer some silent clips with words, and leave out words of long ones.
        is_silent = is_alone and not find_voice(clips[0]).any()
        if is_alone and (times or is_silent or len(clips[0]) > LONGER * longest * SAMPLING_RATE):
            return self._transcribe(clips[0], longest, settings, times)
        return {"text": deadline.wait_for(self._put(messages, max_new_tokens, settings, deadline).answer)}

    def _put(self, messages: list[dict], max_new_tokens: int, settings: dict, deadline: Deadline) -> Request:
        """Lets a request with open messages wait for its answer."""
        has_pictures, process = count_pixels(items_of(messages)), partial(self._process, messages)
        inputs = deadline.wait_for(self.decoders.submit(process)) if has_pictures else process()
        request = Request(inputs, max_new_tokens, settings)
        check_length(request.num_tokens, request.max_new_tokens, self.max_positions)
        others = list(self.waiting)
        if others and request.num_bytes + sum(other.num_bytes for other in others) > MAX_WAITING_BYTES:
            raise RequestError("The requests that wait take all memory for them; send the request again later.")
        self.waiting.append(request)
        self.executor.submit(lambda: self._answer(self._next_batch(self.max_batch_tokens)))
        return request

    def _transcribe(self, clip: torch.Tensor, longest: float, settings: dict, times: bool | str) -> dict:
        """Transcribes a clip in pieces of at most `longest` seconds, each as a request of its own."""
        aligner = self.aligner if times == "word" else None
        longest = min(longest, PIECE_SECONDS) if aligner else longest
        with ThreadPoolExecutor(BATCH_SIZE) as pool:
            ask = partial(self._ask_piece, settings)
            transcriber = Transcriber(lambda clips: list(pool.map(ask, clips)), longest, aligner=aligner)
            transcript = join_batches(transcriber.batches(clip), None)
        return {"text": transcript.text} | ({"chunks": transcript.chunks} if times else {})

    def _ask_piece(self, settings: dict, clip: torch.Tensor) -> Answer:
        messages = make_messages({"audio": clip})
        request = self._put(messages, longest_answer(len(clip)), settings, deadline := Deadline())
        return Answer(" ".join(deadline.wait_for(request.answer).split()), request.is_complete)

    @cached_property
    def aligner(self) -> Aligner:
        """What finds the times of words, loaded when it is first asked for."""
        if not (name := getattr(self.model.config, "audio_encoder_origin", None)):
            raise RequestError('return_timestamps "word" needs a model that names its audio_encoder_origin.')
        return Aligner(find_aligner(name))

    def _open_messages(self, messages: list[dict]) -> list[dict]:
        """Returns a copy of messages, with clips as samples, and with pictures that are opened but not decoded."""
        (messages,), _ = self.processor.normalize_conversations(messages)
        items = items_of(messages)
        check_items(items)
        full = f"{MAX_DOWNLOADS} requests with addresses are being opened; send the request again later."
        with one_of(self.downloads, full) if any(map(names_address, items)) else nullcontext():
            self._open_items(items)
        return messages

    def _open_items(self, items: list[dict]):
        """Puts pictures and samples into their items, before one deadline for all of them."""
        deadline = Deadline(TIMEOUT, f"The pictures and clips of a request must be opened within {TIMEOUT:g} s.")
        limits = {"max_bytes": MAX_BYTES, "max_seconds": MAX_SECONDS, "public_only": True, "formats": IMAGE_FORMATS}
        # Pictures come first, because only their headers are read.
        for item in sorted(items, key=lambda item: item["type"] != "image"):
            if item["type"] != "text":
                opened = dict(self.processor.open_item(item, timeout=deadline.left(), **limits))
                item.clear()
                item.update(opened)
                check_limit(count_pixels(items), "pixels together", MAX_PIXELS)

    def _process(self, messages: list[dict]) -> BatchFeature:
        """Returns the model's inputs for open messages. Pictures are decoded here, and removed from the messages."""
        pictures = [item for item in items_of(messages) if item["type"] == "image"]
        for item in pictures:
            item["image"] = read_pixels(decode_image(item["image"]))
        if not SANITIZES:
            refuse_control_tokens(messages, self.processor.tokenizer.all_special_tokens)
        inputs = self.processor.make_inputs(messages, **({"sanitize_control_tokens": True} if SANITIZES else {}))
        for item in pictures:
            item.clear()
        return inputs

    def _next_batch(self, max_tokens: int, max_new_tokens: int = sys.maxsize) -> list[Request]:
        """
        Takes the first request that waits, if any does, and as many others with the same settings as fit `max_tokens`,
        padding and answers included. Requests with more than `max_new_tokens` are left to wait.
        """
        for request in [request for request in self.waiting if request.answer.cancelled()]:
            self.waiting.remove(request)
        waiting = [request for request in self.waiting if request.max_new_tokens <= max_new_tokens]
        # They are taken in the order of arrival, but never twice in a row with the same settings while others wait.
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
        """Answers a batch. If that fails its requests are answered one by one, so that only the one at fault fails."""
        if not batch:  # the requests were answered in earlier batches
            return
        self.last_settings = batch[0].settings
        try:
            self._generate(batch, lambda: may_pause and self._pause(batch))
        except Exception as error:
            unanswered = [request for request in batch if not request.answer.done()]
            if len(batch) > 1:
                for request in unanswered:
                    self._answer([request], may_pause)
            elif unanswered:
                # It must not be a ValueError, which `__call__` would report as the request's fault.
                failure = RuntimeError("generate failed")
                failure.__cause__ = error
                batch[0].answer.set_exception(failure)

    def _generate(self, batch: list[Request], after_step: Callable):
        multiple = CPU_LENGTHS if self.model.device.type == "cpu" else 1
        inputs = self.processor.join_rows([request.inputs for request in batch], multiple)
        prompt_length, end_ids = inputs["input_ids"].shape[1], self.model.generation_config.eos_token_id
        ends = RowEnds(batch, prompt_length, self.processor.tokenizer, end_ids, after_step)
        with torch.inference_mode():
            sequences = self.model.generate(
                **inputs.to(self.model.device),
                **batch[0].settings,
                max_new_tokens=max(request.max_new_tokens for request in batch),
                stopping_criteria=[ends],
            )
        # Something else in the generation config, such as `max_time`, may have ended rows.
        ends.answer(sequences, [True] * len(batch))

    def _pause(self, batch: list[Request]):
        """Answers short requests that came after a batch began, and lets it go on for as long as that took."""
        start = time.monotonic()
        if self.waiting and start >= self.next_pause:
            self._answer(self._next_batch(self.max_batch_tokens - padded_tokens(batch), SHORT), may_pause=False)
            self.next_pause = 2 * time.monotonic() - start


@contextmanager
def one_of(places: threading.BoundedSemaphore, message: str):
    """Holds one of some places during a block, or raises a [`RequestError`] at once if no place is free."""
    if not places.acquire(blocking=False):
        raise RequestError(message)
    try:
        yield
    finally:
        places.release()


def read_messages(inputs) -> list[dict]:
    """Returns chat messages for any form of `inputs`. Their structure is checked, and their content becomes a list."""
    if isinstance(inputs, dict) and set(inputs) == {"messages"}:
        inputs = inputs["messages"]
    elif isinstance(inputs, (bytes, bytearray)):
        inputs = {"audio": bytes(inputs)}
    elif isinstance(inputs, Image.Image):
        inputs = {"image": inputs}
    elif isinstance(inputs, str):
        inputs = {"audio": inputs} if FILE.fullmatch(inputs) else {"text": inputs}
    messages = make_messages(inputs) if isinstance(inputs, dict) else inputs
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        got = len(messages) if isinstance(messages, list) else f"a {type(messages).__name__}"
        raise RequestError(f"Messages must be a list of 1 to {MAX_MESSAGES}, got {got}.")
    checked = []
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise RequestError(f"A message must have a role and a content and nothing else, got {name_keys(message)}.")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise RequestError(f"The role of a message must be one of {', '.join(ROLES)}; got {role!r:.40}.")
        if not isinstance(content, (str, list)):
            got = type(content).__name__
            raise RequestError(f"The content of a message must be a text or a list of items, got a {got}.")
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        checked.append({"role": role, "content": items})
    check_limit(len(items_of(checked)), "items", MAX_CONTENT)
    if checked[-1]["role"] != "user":
        raise RequestError(f"The last message must be the user's, got one of role {checked[-1]['role']}.")
    return checked


def make_messages(inputs: dict) -> list[dict]:
    """Returns the user's message for `{"text", "image", "audio"}`, with a question where there is no text."""
    if not inputs or set(inputs) - set(MODALITIES):
        raise RequestError(f"Inputs must be messages, or an object of text, image and audio; got {name_keys(inputs)}.")
    given = {name: source for name, source in inputs.items() if source is not None}
    if not given or [] in given.values():
        raise RequestError(f"Inputs need a text, an image or audio; {name_keys(inputs)} have null or an empty list.")
    given = {"text": TRANSCRIBE if "audio" in given else DESCRIBE, **given}
    sources = {name: given[name] for name in MODALITIES if name in given}
    lists = {name: source if isinstance(source, list) else [source] for name, source in sources.items()}
    check_limit(sum(map(len, lists.values())), "items", MAX_CONTENT)  # before each becomes an item
    content = [{"type": name, name: source} for name, sources in lists.items() for source in sources]
    return [{"role": "user", "content": content}]


def name_keys(value) -> str:
    """Names the keys of an object, or the type of anything else, for messages."""
    return (", ".join(map(str, value)) or "nothing") if isinstance(value, dict) else f"a {type(value).__name__}"


def items_of(messages: list[dict]) -> list[dict]:
    return [item for message in messages for item in message["content"]]


def check_items(items: list[dict]):
    """Raises a [`RequestError`] on normalized items of other types than are served, or on too many of them."""
    for item in items:
        if item["type"] not in MODALITIES:
            raise RequestError(f"Content of type {item['type']} is not served: it must be text, image or audio.")
    for modality in ("image", "audio"):
        check_limit(sum(item["type"] == modality for item in items), f"items of type {modality}", MAX_ITEMS)
    check_limit(sum(len(item["text"]) for item in items if item["type"] == "text"), "characters of text", MAX_TEXT)


def names_address(item: dict) -> bool:
    """Tells whether a normalized content item has to be downloaded."""
    source = None if item["type"] == "text" else item.get(item["type"])
    return isinstance(source, str) and source[:4096].lstrip().lower().startswith(("http://", "https://"))


def count_pixels(items: list[dict]) -> int:
    """Counts the pixels of all pictures that are open already."""
    pictures = (item["image"] for item in items if isinstance(item.get("image"), Image.Image))
    return sum(picture.width * picture.height for picture in pictures)


def refuse_control_tokens(messages: list[dict], control_tokens: list[str]):
    """Raises a [`RequestError`] if a text, or several that are adjacent, spell a control token of the chat template."""
    for item in (item for message in messages for item in join_texts(message["content"])):
        for token in control_tokens:
            if item["type"] == "text" and token in item["text"]:
                raise RequestError(f"Text must not hold the model's control tokens, got {token}.")


def decode_image(image: Image.Image) -> Image.Image:
    """Decodes a picture in place, and turns it upright."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
        return image
    except Exception as error:  # Pillow's decoders raise errors of many types for broken files
        raise RequestError("A picture is broken or cut short: the whole file must be sent.") from error


def read_pixels(image: Image.Image) -> torch.Tensor:
    """
    Returns the pixels of a decoded picture, uint8 `[3, height, width]`. They are converted strip by strip, because
    Pillow and the processor would copy the whole picture several times.
    """
    pixels = torch.empty(3, image.height, image.width, dtype=torch.uint8)
    for top in range(0, image.height, STRIP):
        strip = image.crop((0, top, image.width, min(top + STRIP, image.height))).convert("RGB")
        pixels[:, top : top + STRIP] = torch.from_numpy(np.array(strip)).permute(2, 0, 1)
    return pixels


def read_parameters(parameters: dict) -> dict:
    """Returns the settings of `generate`, within bounds; greedy unless a parameter of sampling is given."""
    if not isinstance(parameters, dict):
        raise RequestError(f"Parameters must be an object of names and values, got a {type(parameters).__name__}.")
    settings = {}
    for name, value in parameters.items():
        if name not in PARAMETERS:
            raise RequestError(f"There is no parameter {name!s:.40}; it must be one of {', '.join(PARAMETERS)}.")
        number, low, high = (str, value, value) if (name, value) == WORD_TIMES else PARAMETERS[name]
        types = (int, float) if number is float else (number,)
        if type(value) not in types or not low <= value <= high:  # Python counts a bool as an int
            bounds = f"{'an' if number is int else 'a'} {number.__name__} from {low} to {high}"
            if number is bool:
                bounds = 'true, false or "word"' if name == WORD_TIMES[0] else "true or false"
            raise RequestError(f"{name} must be {bounds}, got {value!r:.40}.")
        settings[name] = number(value)  # `generate` refuses 2 where it takes 2.0
    if settings.get("temperature", 1.0) < 1e-6:  # 0 is the usual way to ask for greedy, and close to 0 logits overflow
        del settings["temperature"]
        settings.setdefault("do_sample", False)
    sampling = [name for name in SAMPLING if name in settings]
    if sampling and settings.get("do_sample") is False:
        raise RequestError(f"{' and '.join(sampling)} must not be given with do_sample false, which does not sample.")
    return {"max_new_tokens": NEW_TOKENS, "do_sample": bool(sampling), **settings}
