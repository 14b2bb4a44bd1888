"""Options of command lines, and their checks, which run before the slow libraries are imported."""

import re
from dataclasses import field, fields
from pathlib import Path


HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")  # the Hub's client has more rules, and checks again


def setting(default, help: str, **more):
    """Returns a dataclass field that is also a command-line option. `more` are arguments of `add_argument`."""
    return field(default=default, metadata={"help": help, **more})


def dashed(name: str) -> str:
    """Returns the option that fills a field."""
    return f"--{name.replace('_', '-')}"


def check_choices(settings):
    """Raises a ValueError if a [`setting`] of a dataclass has `choices`, and its value is none of them."""
    for option in fields(settings):
        choices, value = option.metadata.get("choices"), getattr(settings, option.name)
        for choice in value if isinstance(value, tuple) else [value]:
            if choices and choice not in (None, *choices):
                expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise ValueError(f"{dashed(option.name)} must be {expected}, got {choice!r}.")


def columns_of(audio_column: str | None, text_column: str | None) -> tuple[str, str] | None:
    """Returns the `columns` of [`load_rows`] from two options. Raises a ValueError if only one is given."""
    if (audio_column is None) != (text_column is None):
        raise ValueError("--audio-column and --text-column must be given together, or neither of them.")
    return None if audio_column is None else (audio_column, text_column)


def require_source(source: str | Path):
    """Raises a ValueError if the name is neither that of a folder nor a possible Hub id or ID@REVISION."""
    repo = str(source).partition("@")[0]
    if not Path(source).is_dir() and not HUB_ID.fullmatch(repo):
        raise ValueError(f"There is no folder {repo}, and it is no Hub id either.")


def check_build(base, audio_encoder, output, checkpoint, adapter):
    """Raises a ValueError if a source is missing, too many or not there, or if the output is not a new folder."""
    if output is None:
        raise ValueError("--output is missing: name the folder to make.")
    is_from_bases = checkpoint is None and base is not None and audio_encoder is not None
    is_from_checkpoint = checkpoint is not None and not any((base, audio_encoder, adapter))
    if not (is_from_bases or is_from_checkpoint):
        raise ValueError("Give either --base and --audio-encoder, or --checkpoint.")
    for source in filter(None, (base, audio_encoder, checkpoint, adapter)):
        require_source(source)
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{output} is not empty; name a new folder for --output.")
