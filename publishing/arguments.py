"""Checks what a command line is given, before the slow libraries are imported."""

import re
from pathlib import Path


HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")  # the Hub's client checks an id again, by more rules


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
