"""Rows of chat messages, or of recordings and transcripts, -> batches to train on."""

import json
import re
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch


try:
    from .configuration_qwen2_audio_vl import IGNORED_LABEL, TRANSCRIBE
except ImportError:  # not part of a package: the tools beside this file import it by its bare name
    from configuration_qwen2_audio_vl import IGNORED_LABEL, TRANSCRIBE


RECORDING = ("audio", "text")  # columns of a recording and its transcript
# What the processor writes in the place of audio, pictures and videos, and around it.
MEDIA_TOKENS = ("<|audio_bos|>", "<|audio_pad|>", "<|audio_eos|>")
MEDIA_TOKENS += ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")


class BadRow(ValueError):
    """A row that cannot be trained on; the message begins with its place."""


def names_lines(source: str) -> bool:
    """Tells whether a source is a file of JSON lines, by its name; others are opened by `datasets`."""
    return source.endswith((".json", ".jsonl"))


class ChatCollator:
    """
    Rows of chat messages -> batches to train on: a `data_collator` for transformers' Trainer and for TRL's SFTTrainer.
    A row has `messages`, or a recording as `audio` and its transcript as `text`, or either in `line` (JSON text), and
    may have `place`, its file and line. Bad rows raise [`BadRow`].

    Args:
        processor: [`Qwen2AudioVLProcessor`].
        needs_audio: Whether a row without audio is a bad one.
        audio_tokens: "fixed", "trimmed", or "both", which draws one of them for each batch. The default is the
            processor's.
        instruction: What the user writes beside a recording that has a transcript.
    """

    def __init__(
        self, processor, needs_audio: bool = False, audio_tokens: str | None = None, instruction: str = TRANSCRIBE
    ):
        self.processor, self.needs_audio, self.instruction = processor, needs_audio, instruction
        self.audio_tokens = audio_tokens or processor.audio_tokens

    def messages(self, row: dict) -> list[dict]:
        """Returns the normalized and checked messages of a row. Their paths start from the folder of the source."""
        with prefix_errors(place_of(row)):
            messages, is_recording = self.read(content_of(row))
            self.check(messages, may_be_empty=is_recording)  # a recording may have no words
            source = place_of(row).rpartition(":")[0]
            source = Path(source if names_lines(source) else source.partition(":")[0])
            folder = source if source.is_dir() else source.parent
            for item in (item for message in messages for item in items_of(message)):
                item.update(self.locate(item, folder))
            return messages

    def read(self, content: dict) -> tuple[list[dict], bool]:
        """Returns the normalized messages of a row, and whether they come from a recording and its transcript."""
        messages, (audio, text) = content.get("messages"), (content.get(name) for name in RECORDING)
        is_recording = messages is None and audio is not None and isinstance(text, str)
        if is_recording:
            question = [{"type": "audio", "audio": audio}, {"type": "text", "text": self.instruction}]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
        if messages is None and audio is not None and "text" in content:
            reason = 'write "" where nothing is said, and words in the place of the numbers of classes'
            raise ValueError(f"the transcript, `text`, must be a string, got {text!r:.80}; {reason}")
        if not is_list or not messages:
            raise ValueError(
                "there is no list of `messages`, dicts of role and content, nor a recording as `audio` and its `text`"
            )
        messages = [{name: message.get(name) for name in ("role", "content")} for message in messages]
        (messages,), _ = self.processor.normalize_conversations(messages)
        return messages, is_recording

    def check(self, messages: list[dict], may_be_empty: bool):
        """
        Raises:
            ValueError: if the role of a message is unknown, if an answer is empty or missing, if a text spells a token
                that only the chat template or the processor may write, or if there is no audio although it is needed.
        """
        for message in messages:
            # Adjacent texts are joined, because the template writes them without a gap; others stand between texts.
            if message["role"] != "assistant" and message.get("content") is None:
                raise ValueError(f"a message of role {message['role']!r} has no content")
            role, text = message["role"], "".join(item.get("text", "\n") for item in items_of(message))
            if role not in ("system", "user", "assistant"):
                raise ValueError(f"a message has role {role!r}; expected system, user or assistant")
            if role == "assistant" and not may_be_empty and not text.strip():
                raise ValueError("an answer of the assistant is empty")
            for token in ("<|im_start|>", "<|im_end|>", *MEDIA_TOKENS):
                if token in text:
                    raise ValueError(f"a text contains {token}, a control token of the model; remove it from the text")
        if role != "assistant":
            raise ValueError(f"the last message is from {role!r}; expected the assistant's answer")
        if "user" not in {message["role"] for message in messages}:
            raise ValueError("there is no message of the user before the answer")
        types = {item["type"] for message in messages for item in items_of(message)}
        if self.needs_audio and "audio" not in types:
            raise ValueError("there is no audio, so the projector learns nothing from it")

    def locate(self, item: dict, folder: Path) -> dict:
        """Returns a normalized item with an absolute path, or with a picture instead of the bytes of its file."""
        source = item.get(item["type"])
        if source is None:
            keys = ", ".join(map(str, item))
            raise ValueError(f"an item of type {item['type']} has no source as `{item['type']}`; its keys are {keys}")
        if item["type"] == "image" and isinstance(source, bytes):
            with refuse_unreadable():
                return self.processor.open_item(item)
        if not names_file(item):
            return item
        if not (folder / source).is_file():
            raise ValueError(f"there is no file {folder / source}")
        return {item["type"]: str(folder / source)}

    def inputs(self, row: dict, audio_tokens: str | None = None) -> dict[str, torch.Tensor]:
        """
        Returns model inputs of one row, unpadded, and `labels`: the words of the answers and the ends of their turns,
        -100 elsewhere, also on audio and pictures in an answer.
        """
        messages = self.messages(row)
        with prefix_errors(place_of(row)), refuse_unreadable():
            inputs = self.processor.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                return_assistant_tokens_mask=True,
                audio_tokens=audio_tokens,
            )
            media = torch.tensor(self.processor.tokenizer.convert_tokens_to_ids([*MEDIA_TOKENS]))
            is_ignored = (inputs.pop("assistant_masks") == 0) | torch.isin(inputs["input_ids"], media)
            return {**inputs, "labels": inputs["input_ids"].masked_fill(is_ignored, IGNORED_LABEL)}

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Collates rows to a batch."""
        audio_tokens = self.audio_tokens
        if audio_tokens == "both":  # drawn by the rows, so that a resumed run draws as an uninterrupted one
            places = "".join(row.get("place") or "" for row in rows)
            number = zlib.crc32(places.encode()) if places else int(torch.randint(2, (1,)))
            audio_tokens = ("fixed", "trimmed")[number % 2]
        return dict(self.processor.join_rows([self.inputs(row, audio_tokens) for row in rows]))


def content_of(row: dict) -> dict:
    """Returns what a row holds, read from its line of JSON if it has one. A line that is no object holds nothing."""
    if row.get("line") is None:
        return row
    content = json.loads(row["line"].lstrip("\ufeff"))  # some editors begin UTF-8 with this mark
    return content if isinstance(content, dict) else {}


def place_of(row: dict) -> str:
    """Returns `FILE:LINE` of a row from [`load_rows`]. The paths of other rows start from the working directory."""
    return row.get("place") or "a row"


@contextmanager
def prefix_errors(place: str):
    """Puts the place of a row before every error that its content causes."""
    try:
        yield
    except BadRow:
        raise
    except (ValueError, TypeError, KeyError, IndexError, OSError, RecursionError) as error:
        raise BadRow(f"{place}: {str(error) or type(error).__name__}") from error


@contextmanager
def refuse_unreadable():
    """
    Turns whatever a decoder raises on a broken file into a ValueError: Pillow raises SyntaxError, struct.error and
    DecompressionBombError, AVIF RuntimeError. Memory that runs out is not the fault of the file.
    """
    try:
        yield
    except (ValueError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def items_of(message: dict) -> list[dict]:
    """Returns the content items of a normalized message."""
    content = message.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def answer_text(content) -> str:
    return "".join(item.get("text", "") for item in items_of({"content": content}))


def names_file(item: dict) -> bool:
    """Tells whether a normalized item names a local file."""
    source = item.get(item["type"])
    is_path = isinstance(source, str) and not re.match(r"\w+:", source) and len(source) < 1024  # base64 is longer
    return is_path and item["type"] != "text"
