"""Rows of chat messages, or of recordings and transcripts, -> batches to train on."""

import io
import json
import re
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image


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
        self,
        processor,
        needs_audio: bool = False,
        audio_tokens: str | None = None,
        instruction: str = TRANSCRIBE,
    ):
        self.processor, self.needs_audio, self.instruction = processor, needs_audio, instruction
        self.audio_tokens = audio_tokens or processor.audio_tokens

    def messages(self, row: dict) -> list[dict]:
        """The messages of a row, checked without opening what they name; local files are found beside the source."""
        with prefix_errors(place_of(row)):
            content = content_of(row)
            audio, text = (content.get(name) for name in RECORDING)
            is_recording = content.get("messages") is None and audio is not None and isinstance(text, str)
            found = self.transcription(audio, text) if is_recording else content.get("messages")
            if not isinstance(found, list) or not found:
                raise ValueError("there is no list of `messages`, nor a recording as `audio` and its `text`")
            folder = Path(place_of(row).rpartition(":")[0]).parent
            messages = [self.message(message, folder, is_recording) for message in found]
            if messages[-1]["role"] != "assistant":
                raise ValueError(f"the last message is from {messages[-1]['role']!r}; expected the assistant's answer")
            text = self.processor.apply_chat_template(messages, tokenize=False)  # refuses unknown content
            for message in messages:
                refuse_control_tokens(message["content"])
            if self.needs_audio and self.processor.audio_token not in text:
                raise ValueError("there is no audio, so the projector learns nothing from it")
            return messages

    def transcription(self, audio, text: str) -> list[dict]:
        asked = [{"type": "audio", "audio": audio}, {"type": "text", "text": self.instruction}]
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]

    def message(self, message: dict, folder: Path, may_be_empty: bool = False) -> dict:
        role, content = (message.get(name) if isinstance(message, dict) else None for name in ("role", "content"))
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"a message has role {role!r}; expected system, user or assistant")
        if role == "assistant" and not may_be_empty and not answer_text(content).strip():  # but nothing may be said
            raise ValueError("an answer of the assistant is empty")
        if isinstance(content, list):
            content = [self.item(item, folder) for item in content]
        return {"role": role, "content": content}

    def item(self, item, folder: Path):
        if not isinstance(item, dict):
            return item  # which the processor refuses
        # Arrow fills the keys that an item does not have with None.
        return {name: locate(name, part, folder) for name, part in item.items() if part is not None}

    def inputs(self, row: dict, audio_tokens: str | None = None) -> dict[str, torch.Tensor]:
        """
        Model inputs of one row, unpadded, and `labels`: the words of the answers and the ends of their turns, -100
        elsewhere, also on audio and pictures in an answer.
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
        if audio_tokens == "both":  # by the rows, so that a run that goes on draws as one that was never interrupted
            places = "".join(row.get("place") or "" for row in rows)
            drawn = zlib.crc32(places.encode()) if places else int(torch.randint(2, (1,)))
            audio_tokens = ("fixed", "trimmed")[drawn % 2]
        return dict(self.processor.join_rows([self.inputs(row, audio_tokens) for row in rows]))


def content_of(row: dict) -> dict:
    """What a row holds, read from its line of JSON if it has one; nothing if that is no object."""
    if row.get("line") is None:
        return row
    found = json.loads(row["line"].lstrip("\ufeff"))  # of an editor that marks UTF-8
    return found if isinstance(found, dict) else {}


def place_of(row: dict) -> str:
    """`FILE:LINE` of a row that [`load_rows`] read. The paths of other rows start from the working directory."""
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


def answer_text(content) -> str:
    if isinstance(content, str):
        return content
    return "".join(item.get("text") or "" for item in content or [] if isinstance(item, dict))


def refuse_control_tokens(content):
    """
    Raises:
        ValueError: if the text of a message spells a token that only the chat template or the processor may write.
    """
    # Adjacent texts are joined, because the template writes them without a gap; other items stand between texts.
    text = content if isinstance(content, str) else "".join(item.get("text", "\n") for item in content or [])
    for token in ("<|im_start|>", "<|im_end|>", *MEDIA_TOKENS):
        if token in text:
            raise ValueError(f"a text contains {token}, a control token of the model; remove it from the text")


def locate(name: str, source, folder: Path):
    """Makes relative paths absolute, and pictures that `datasets` holds as bytes pictures."""
    if name == "image" and isinstance(source, dict) and source.get("bytes"):
        with refuse_unreadable():
            return Image.open(io.BytesIO(source["bytes"]))
    if not names_file(name, source):
        return source
    if not (folder / source).is_file():
        raise ValueError(f"there is no file {folder / source}")
    return str(folder / source)


def names_file(name: str, source) -> bool:
    """Whether a part of a content item is the path of a local file."""
    is_path = isinstance(source, str) and not re.match(r"\w+:", source) and len(source) < 1024  # base64 is longer
    return is_path and name in ("image", "video", "audio", "url", "path")
