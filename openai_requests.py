"""A request to OpenAI's two routes, JSON or a form -> checked fields, or an error that names the one at fault."""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

from transformers import GenerationConfig

from configuration_qwen2_audio_vl import ask_for_words
from content_items import normalize_conversations


GREEDY = 1e-6  # temperatures below it are greedy: 0 is the usual way to ask for that, and close to 0 logits overflow
NEW_TOKENS = 1024  # transformers serve's own default
ROLES = ("system", "user", "assistant")
GRANULARITIES = "timestamp_granularities[]"
FORM_FIELDS = ("file", "model", "language", "prompt", "response_format", "temperature", "stream", GRANULARITIES)
RESPONSE_FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
TIMED_FORMATS = ("srt", "vtt", "verbose_json")


class RequestError(ValueError):
    """A request cannot be answered. The message is one sentence for its sender, `param` the field that is at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def check_model(asked: str | None, served: str):
    """Raises a [`RequestError`] if a request names another model than the one that is served."""
    if asked and asked != served:
        message = f"This server has the model {served}; the request names {asked:.200}."
        raise RequestError(message, "model", 404, "model_not_found")


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # Python counts a bool as an int


def whole_from(low: int) -> tuple[str, Callable]:
    return f"a whole number from {low}", lambda value: type(value) is int and low <= value < 2**63


def one_of(*values) -> tuple[str, Callable]:
    return " or ".join(map(json.dumps, values)), lambda value: (type(value), value) in [(type(v), v) for v in values]


def is_bias(value) -> bool:
    return isinstance(value, dict) and all(
        key.isascii() and key.isdigit() and is_number(bias) and -100 <= bias <= 100 for key, bias in value.items()
    )


def is_settings(value) -> bool:
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return isinstance(settings := json.loads(value), dict) and settings.keys() <= vars(GenerationConfig()).keys()
    return False


TEXT = "a text", lambda value: isinstance(value, str)
OBJECT = "an object", lambda value: isinstance(value, dict)
# What each field of a chat must be. transformers serve acts on these.
HONOURED = {
    "messages": ("a list of messages", lambda value: isinstance(value, list)),
    "model": TEXT,
    "stream": one_of(True, False),
    "max_tokens": whole_from(1),
    "max_completion_tokens": whole_from(1),
    "temperature": ("a number from 0 to 2", lambda value: is_number(value) and 0 <= value <= 2),
    "top_p": ("a number above 0 and up to 1", lambda value: is_number(value) and 0 < value <= 1),
    "frequency_penalty": ("a number above -1 and up to 2", lambda value: is_number(value) and -1 < value <= 2),
    "seed": whole_from(0),
    "logit_bias": ("an object of numbers of tokens and numbers from -100 to 100", is_bias),
    "generation_config": ("a text, the JSON of a generation_config.json", is_settings),
    "chat_template_kwargs": OBJECT,
}
# It ignores these, so they are taken only where that makes no difference to the answer.
WITHOUT_EFFECT = {
    "n": one_of(1),
    "logprobs": one_of(False),
    "top_logprobs": one_of(0),
    "presence_penalty": ("0", lambda value: is_number(value) and value == 0),
    "response_format": one_of({"type": "text"}),
    "modalities": one_of(["text"]),
    "tools": one_of([]),
    "tool_choice": one_of("none", "auto"),
    "parallel_tool_calls": one_of(True, False),
    "stream_options": OBJECT,
    "reasoning_effort": one_of("none"),
    "service_tier": one_of("auto", "default"),
    "store": one_of(False),
    "metadata": OBJECT,
    "user": TEXT,
}
CHAT_FIELDS = HONOURED | WITHOUT_EFFECT


def read_chat(body: dict, served: str, defaults: dict) -> dict:
    """
    Returns the fields of a chat for transformers serve, with normalized content items. A temperature above 0 or a
    `top_p` below 1 draws the answer, as in OpenAI's API, also where `defaults`, the settings of the model's
    generation_config.json, are greedy.

    Raises:
        RequestError: on a field, or a value of one, that would have no effect.
    """
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        if name not in CHAT_FIELDS:
            known = ", ".join(HONOURED)
            raise RequestError(f"The field {name:.40} is not supported; there are {known}.", name)
        expected, is_right = CHAT_FIELDS[name]
        if not is_right(value):
            raise RequestError(f"{name} must be {expected}, got {json.dumps(value):.60}.", name)
    if not body.get("messages"):
        raise RequestError("The request has no messages; send a list of at least one.", "messages")
    if {"max_tokens", "max_completion_tokens"} <= body.keys():
        raise RequestError("The request has max_tokens and max_completion_tokens; give one of them.", "max_tokens")
    check_model(body.get("model"), served)
    settings = json.loads(body.get("generation_config", "{}"))
    body = {name: value for name, value in body.items() if name in HONOURED and name != "generation_config"}
    body |= {"model": served, "messages": read_messages(body["messages"])}
    if body.get("temperature", 1) < GREEDY:
        body["temperature"] = 0
        body.pop("top_p", None)
    elif "temperature" in body or body.get("top_p", 1) < 1:
        if settings.get("do_sample") is False:
            raise RequestError("temperature and top_p do nothing beside do_sample false; leave it out.", "temperature")
        # Limits that the model's own settings have would leave little or nothing of what is asked for.
        settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **settings, "do_sample": True}
    if settings:
        limit = max(NEW_TOKENS, defaults.get("max_new_tokens", 0))
        body["generation_config"] = json.dumps({**defaults, "max_new_tokens": limit, **settings})
    if "logit_bias" in body:  # `generate` refuses whole numbers
        body["logit_bias"] = {token: float(bias) for token, bias in body["logit_bias"].items()}
    return body


def read_messages(messages: list) -> list[dict]:
    """Returns a chat with normalized content items. Raises a [`RequestError`] that names the place of a fault."""
    try:
        conversations, is_batch = normalize_conversations(messages)
    except ValueError as error:
        raise RequestError(str(error), "messages") from error
    if is_batch:
        raise RequestError("messages must be one conversation, not a list of them.", "messages")
    (conversation,) = conversations
    for message in conversation:
        if message["role"] == "developer":  # OpenAI's newer name
            message["role"] = "system"
        if message["role"] not in ROLES:
            known = ", ".join(ROLES)
            raise RequestError(f"The role of a message must be one of {known}; got {message['role']:.40}.", "messages")
        content = message.get("content", [])
        message["content"] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if conversation[-1]["role"] != "user":
        raise RequestError(f"The last message must be the user's, not the {conversation[-1]['role']}'s.", "messages")
    return conversation


@dataclass
class Asked:
    """What a request for a transcript asks for, besides its file."""

    model: str | None = None
    language: str | None = None
    prompt: str | None = None
    response_format: str = "json"
    stream: bool = False
    granularities: tuple[str, ...] = ()


def read_fields(form) -> Asked:
    """Reads the fields of a form. Raises a [`RequestError`] that says what is wrong with them."""
    if unknown := sorted(set(form) - set(FORM_FIELDS)):
        raise RequestError(
            f"There is no field {', '.join(unknown):.80}; there are {', '.join(FORM_FIELDS)}.", unknown[0]
        )
    if doubled := [name for name in FORM_FIELDS if name != GRANULARITIES and len(form.getlist(name)) > 1]:
        count = len(form.getlist(doubled[0]))
        raise RequestError(f"The field {doubled[0]} is given {count} times; give it once.", doubled[0])
    if "file" not in form:
        raise RequestError("The request has no file; send a recording as the field file of a multipart form.", "file")
    if isinstance(form["file"], str):
        raise RequestError("The field file must be a file with a name, not a text.", "file")
    texts = {name: form[name] for name in FORM_FIELDS[1:-1] if name in form}
    if files := [name for name, value in texts.items() if not isinstance(value, str)]:
        raise RequestError(f"The field {files[0]} must be a text, not a file.", files[0])
    if (stream := texts.pop("stream", "false").lower()) not in ("true", "false"):
        raise RequestError(f"stream must be true or false, got {stream:.40}.", "stream")
    with contextlib.suppress(ValueError):
        if float(temperature := texts.pop("temperature", "0")) == 0:
            temperature = None
    if temperature is not None:
        message = f"temperature must be 0, as transcripts are greedy, got {temperature:.40}."
        raise RequestError(message, "temperature")
    granularities = tuple(str(value) for value in form.getlist(GRANULARITIES))
    asked = Asked(**{name: text for name, text in texts.items() if text}, stream=stream == "true")
    asked.granularities = granularities
    if asked.response_format not in RESPONSE_FORMATS:
        message = f"response_format must be one of {', '.join(RESPONSE_FORMATS)}; got {asked.response_format:.40}."
        raise RequestError(message, "response_format")
    if wrong := [value for value in granularities if value not in ("segment", "word")]:
        raise RequestError(f"{GRANULARITIES} must be segment or word, got {wrong[0]:.40}.", GRANULARITIES)
    if granularities and asked.response_format not in TIMED_FORMATS:
        message = f"{GRANULARITIES} needs a response_format of {', '.join(TIMED_FORMATS)}."
        raise RequestError(message, GRANULARITIES)
    if asked.stream and asked.response_format != "json":
        raise RequestError(f"stream needs the response_format json, got {asked.response_format}.", "stream")
    try:
        ask_for_words(asked.language)
    except ValueError as error:
        raise RequestError(str(error), "language") from error
    return asked
