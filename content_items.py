"""Messages of any client -> messages with content items of known types -> the clips among them. Nothing is opened."""

import dataclasses
import re
from collections.abc import Mapping


try:
    from .audio_decoding import AudioError
except ImportError:  # not part of a package: the tools beside this file import it by its bare name
    from audio_decoding import AudioError

# The types of content items, which are also keys of their sources, and the modality of each.
MODALITIES = {"text": "text", "image": "image", "image_url": "image", "video": "video", "video_url": "video"}
MODALITIES |= {"audio": "audio", "audio_url": "audio", "input_audio": "audio"}
# Other keys under which an item, a `datasets` row or a part of an OpenAI message may hold its source.
SOURCE_KEYS = ("url", "path", "base64", "bytes", "array", "data")
CONTENT_KEYS = {*MODALITIES, *SOURCE_KEYS}


def normalize_conversations(conversation) -> tuple[list[list[dict]], bool]:
    """
    Checks the structure of a conversation, or of a list of conversations, without opening anything.

    Returns:
        A list of copied conversations, with every content item as [`normalize_item`] returns it, and whether
        `conversation` was a list of conversations.

    Raises:
        ValueError: naming the place of the first fault, such as `messages[2]["content"][1]`.
    """
    is_batch = isinstance(conversation, (list, tuple)) and isinstance(next(iter(conversation), None), (list, tuple))
    normalized = []
    for row, messages in enumerate(conversation if is_batch else [conversation]):
        place = f"conversations[{row}]" if is_batch else "messages"
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"{place} must be a list of messages, got {describe_value(messages)}.")
        normalized.append([normalize_message(message, f"{place}[{i}]") for i, message in enumerate(messages)])
    return normalized, is_batch


def normalize_message(message, place: str) -> dict:
    message = read_object(message)
    if not isinstance(message, Mapping):
        raise ValueError(f"{place} must be a dict of role and content, got {describe_value(message)}.")
    message = {name: value for name, value in message.items() if value is not None}  # as newer releases do
    if message.get("tool_calls") or message.get("function_call"):
        raise ValueError(f"{place} calls a tool, but this model calls none; leave the message out.")
    if not isinstance(message.get("role"), str):
        raise ValueError(f'{place}["role"] must be a string, got {describe_value(message.get("role"))}.')
    content, place = message.get("content"), f'{place}["content"]'
    if isinstance(content, (list, tuple)):
        message["content"] = [normalize_item(item, f"{place}[{i}]") for i, item in enumerate(content)]
    elif isinstance(content, str):
        normalize_item({"text": content}, place)
    elif content is not None:
        raise ValueError(f"{place} must be a string or a list of items, got {describe_value(content)}.")
    return message


def read_object(value):
    """Returns the fields of a pydantic model, such as a message of the OpenAI client, or of a dataclass, or `value`."""
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value


def describe_value(value) -> str:
    is_empty = isinstance(value, (list, tuple, dict, str)) and not value
    return f"an empty {type(value).__name__}" if is_empty else f"a {type(value).__name__}"


def normalize_item(item, place: str) -> dict:
    """
    Returns a content item in one form: `type` is text, image, video or audio, and its text or source, if it has one,
    is under that name, without a dict around it. Audio may have a `sampling_rate`. Other keys are kept, because a
    user's own chat template may read them.
    """
    item, description, item_type = read_object(item), f"Python type {type(item).__name__}", None
    if isinstance(item, Mapping):
        item = {name: value for name, value in item.items() if value is not None}  # Arrow fills missing keys with None
        item_type = item.get("type", next((name for name in MODALITIES if name in item), None))
        description = f"type {item_type!r} and keys {list(item)}"
    modality = MODALITIES.get(item_type) if isinstance(item_type, str) else None
    if modality is None:
        expected = f"expected a dict of type {', '.join(MODALITIES)}"
        raise ValueError(f"{place}: Content of {description} is not supported: {expected}.")
    # A text beside a source is only a label, but a source beside a text or another source must not be dropped.
    if dropped := [name for name in item if MODALITIES.get(name, modality) not in (modality, "text")]:
        raise ValueError(
            f"{place}: An item of type {item_type} must hold nothing else, but this one has {', '.join(dropped)} as "
            "well; give each its own item."
        )
    others = {name: value for name, value in item.items() if name not in CONTENT_KEYS}
    if modality != "text":
        try:
            source, rate = find_source(item, modality)
        except AudioError as error:
            raise ValueError(f"{place}: {error}") from error
        fields = {**others, "type": modality, modality: source, "sampling_rate": rate}
        return {name: value for name, value in fields.items() if value is not None}
    if not isinstance(item.get("text"), str):
        raise ValueError(f"{place}: A text item needs a string under 'text'; this one has keys {list(item)}.")
    if re.search("[\ud800-\udfff]", item["text"]):
        raise ValueError(f"{place}: A text must be Unicode; this one has half of a surrogate pair.")
    return {**others, "type": "text", "text": item["text"]}


def find_source(item: dict, modality: str, is_needed: bool = False) -> tuple:
    """
    Returns the source of an item and its sampling rate, from the item or from one dict in it. Both may be None.

    Raises:
        AudioError: if there are several sources, or none although one is needed.
    """
    known = (*(name for name in MODALITIES if MODALITIES[name] == modality), *SOURCE_KEYS)
    keys = [key for key in known if item.get(key) is not None]
    if "array" in keys or "bytes" in keys:  # `path` is then only a label in a `datasets` row
        keys = [key for key in keys if key != "path"]
    if len(keys) > 1 or (is_needed and not keys):
        raise AudioError(
            f"An item of type {modality} needs exactly one source, under one of {', '.join(known)}; this one has "
            f"{', '.join(keys) or 'none'} (its keys are {', '.join(map(str, item))})."
        )
    source, rate = item[keys[0]] if keys else None, item.get("sampling_rate")
    if isinstance(source, dict):
        if any(isinstance(value, dict) for value in source.values()):
            raise AudioError(f"An item of type {modality} must hold its source itself or in one dict, not in two.")
        source, own_rate = find_source(source, modality, is_needed=True)
        rate = rate if own_rate is None else own_rate  # the one nearest to the samples
    return source, rate


def join_texts(items: list[dict]) -> list[dict]:
    """
    Returns normalized content items with adjacent texts joined to one. The chat template writes them without a gap, so
    one text may begin a control token and the next one may end it: sanitizing must see the whole text.
    """
    joined = []
    for item in items:
        if joined and item["type"] == joined[-1]["type"] == "text":
            item = {"type": "text", "text": joined.pop()["text"] + item["text"]}
        joined.append(item)
    return joined


def take_audio(messages: list[dict], load_audio_from_video: bool = False) -> tuple[list[dict], list[dict]]:
    """
    Splits normalized messages into copies for transformers, with items as [`name_address`] returns them, and the audio
    items with their sources, in reading order. With `load_audio_from_video` the audio track of each video follows it.
    """
    emptied, clips = [], []
    for message in messages:
        if isinstance(message.get("content"), list):
            items = add_tracks(message["content"]) if load_audio_from_video else message["content"]
            clips += [item for item in items if item["type"] == "audio" and "audio" in item]
            message = {**message, "content": [*map(name_address, items)]}
        emptied.append(message)
    return emptied, clips


def name_address(item: dict) -> dict:
    """Returns a normalized item without audio, and with the address of a picture or video under `url`."""
    item, modality = dict(item), item["type"]
    if modality == "audio":
        item.pop("audio", None)
        item.pop("sampling_rate", None)
    elif modality != "text" and isinstance(item.get(modality), str):
        item["url"] = item.pop(modality)
    return item


def add_tracks(items: list[dict]) -> list[dict]:
    """Adds the audio track of each video after it. It replaces an empty audio item, which transformers needs there."""
    with_tracks, is_slot = [], False
    for item in items:
        if not is_slot or item["type"] != "audio" or "audio" in item:
            with_tracks.append(item)
        is_slot = item["type"] == "video"
        if is_slot:
            with_tracks.append({"type": "audio", "audio": item.get("video")})
    return with_tracks
