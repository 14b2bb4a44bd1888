"""A request to OpenAI's two routes, JSON or a form -> checked fields, or an error that names the one at fault."""

import contextlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from audio_download import FETCH_LIMITS
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
    is_whole = type(value) is int and abs(value) < 2**63  # Python counts a bool as an int
    return is_whole or (type(value) is float and math.isfinite(value))


def whole_from(low: int) -> tuple[str, Callable]:
    return f"a whole number from {low}", lambda value: type(value) is int and low <= value < 2**63


def share_of_one(value) -> bool:
    return is_number(value) and 0 < value <= 1


def one_of(*values) -> tuple[str, Callable]:
    return " or ".join(map(json.dumps, values)), lambda value: (type(value), value) in [(type(v), v) for v in values]


def is_bias(value) -> bool:
    return isinstance(value, dict) and all(
        re.fullmatch("[0-9]{1,9}", key) and is_number(bias) and -100 <= bias <= 100 for key, bias in value.items()
    )


def is_settings(value) -> bool:
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return isinstance(json.loads(value), dict)
    return False


def is_tokens(value) -> bool:
    tokens = value if isinstance(value, list) else [value]
    return bool(tokens) and all(type(token) is int and 0 <= token < 2**31 for token in tokens)


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
    "top_p": ("a number above 0 and up to 1", share_of_one),
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
    "safety_identifier": TEXT,
    "prompt_cache_key": TEXT,
}
CHAT_FIELDS = HONOURED | WITHOUT_EFFECT
# What each of the settings of `generate` must be. Others end in errors of `generate`, or change nothing here.
TOKENS = "the number of a token, or a list of them", is_tokens
ABOVE_0 = "a number above 0", lambda value: is_number(value) and value > 0
SETTINGS = {
    "do_sample": one_of(True, False),
    "temperature": ABOVE_0,
    "top_k": whole_from(0),
    "top_p": CHAT_FIELDS["top_p"],
    "min_p": ("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1),
    "typical_p": ("a number above 0 and up to 1", share_of_one),
    "max_new_tokens": whole_from(1),
    "min_new_tokens": whole_from(0),
    "num_beams": whole_from(1),
    "repetition_penalty": ABOVE_0,
    "length_penalty": ("a number", is_number),
    "no_repeat_ngram_size": whole_from(0),
    "eos_token_id": TOKENS,
    "pad_token_id": whole_from(0),
    "bos_token_id": whole_from(0),
    "transformers_version": TEXT,
    "_from_model_config": one_of(True, False),
}
LIMITS_OF_SAMPLING = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
# The server gives these to `apply_chat_template` itself. What may be opened is for the server to say as well.
TEMPLATE_KEYWORDS = {"self", "conversation", "add_generation_prompt", "tools", "return_tensors", "return_dict"}
TEMPLATE_KEYWORDS |= {"tokenize", "load_audio_from_video", "sampling_rate", "processor_kwargs"}


def check_value(name: str, value, kinds: dict, param: str):
    """Raises a [`RequestError`] if there is no such name, or if its value is not what `kinds` says."""
    if name not in kinds:
        known = ", ".join(name for name in kinds if name not in WITHOUT_EFFECT)
        raise RequestError(f"The field {name:.40} is not supported; there are {known}.", param)
    expected, is_right = kinds[name]
    if not is_right(value):
        raise RequestError(f"{name} must be {expected}, got {json.dumps(value):.60}.", param)


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
        check_value(name, value, CHAT_FIELDS, name)
    if taken := sorted(body.get("chat_template_kwargs", {}).keys() & {*TEMPLATE_KEYWORDS, *FETCH_LIMITS}):
        raise RequestError(f"chat_template_kwargs must not have {taken[0]}.", "chat_template_kwargs")
    if not body.get("messages"):
        raise RequestError("The request has no messages; send a list of at least one.", "messages")
    if {"max_tokens", "max_completion_tokens"} <= body.keys():
        raise RequestError("The request has max_tokens and max_completion_tokens; give one of them.", "max_tokens")
    check_model(body.get("model"), served)
    settings = json.loads(body.get("generation_config", "{}"))
    settings = {name: value for name, value in settings.items() if value is not None}
    for name, value in settings.items():
        check_value(name, value, SETTINGS, "generation_config")
    if body.get("stream") and settings.get("num_beams", 1) > 1:
        raise RequestError("An answer of several beams cannot be streamed.", "generation_config")
    body = {name: value for name, value in body.items() if name in HONOURED and name != "generation_config"}
    body |= {"model": served, "messages": read_messages(body["messages"])}
    if body.get("temperature", 1) < GREEDY:
        body["temperature"] = 0
        body.pop("top_p", None)
    elif "temperature" in body or body.get("top_p", 1) < 1:
        if settings.get("do_sample") is False:
            raise RequestError("temperature and top_p do nothing beside do_sample false; leave it out.", "temperature")
        # Limits that the model's own settings have would leave little or nothing of what is asked for.
        defaults = {name: value for name, value in defaults.items() if name not in LIMITS_OF_SAMPLING}
        settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **settings, "do_sample": True}
    if "seed" in body:  # upstream would set it at once, and not when the answer is drawn
        settings["seed"] = body.pop("seed")
    if settings:
        limit = max(NEW_TOKENS, defaults.get("max_new_tokens", 0))
        body["generation_config"] = json.dumps({**defaults, "max_new_tokens": limit, **settings})
    if bias := body.pop("logit_bias", None):  # `generate` refuses whole numbers
        body["logit_bias"] = {token: float(value) for token, value in bias.items()}
    return body


def check_bias(chat: dict, vocabulary: int):
    """Raises a [`RequestError`] on a bias of a token that is past the vocabulary."""
    if past := [token for token in chat.get("logit_bias", {}) if int(token) >= vocabulary]:
        raise RequestError(f"logit_bias has token {past[0]}, but the model has {vocabulary} tokens.", "logit_bias")


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
