"""Reads CTranslate2's `model.bin`, and renames its arrays to the weights of transformers' Whisper."""

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

from publishing.checkpoints import rename
from publishing.paths import ROOT


# https://github.com/OpenNMT/CTranslate2/blob/master/python/ctranslate2/specs/model_spec.py
CTRANSLATE2_VERSION = 6  # the binary format's
CTRANSLATE2_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # in the order of their numbers in a file
# Patterns of CTranslate2's names and what takes their place in transformers'.
WHISPER_NAMES = json.loads((ROOT / "speech" / "whisper_names.json").read_text())


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """
    Reads the arrays of a CTranslate2 `model.bin` by their names, read-only; an alias is an entry of its own. Raises a
    ValueError if the file has another version, ends early, goes on after its end, or has an unknown dtype.
    """
    file = io.BytesIO(path.read_bytes())

    def take(size: int) -> bytes:
        start, content = file.tell(), file.read(size)
        if len(content) < size:
            needed = f"{size} bytes are needed at byte {start}, but it has {start + len(content)}"
            raise ValueError(f"{path} is cut short: {needed}. Remove it and fetch it again.")
        return content

    def number(size: int) -> int:
        return int.from_bytes(take(size), "little")

    def string() -> str:
        return take(number(2)).rstrip(b"\0").decode()

    if (version := number(4)) != CTRANSLATE2_VERSION:
        raise ValueError(f"{path} has version {version} of CTranslate2's format, expected {CTRANSLATE2_VERSION}.")
    string(), number(4)  # the name of the model's class, and its revision
    arrays = {}
    for _ in range(number(4)):
        name = string()
        shape = [number(4) for _ in range(number(1))]
        dtype = number(1)
        if dtype >= len(CTRANSLATE2_DTYPES):
            raise ValueError(f"{path}: {name} has dtype {dtype}, expected one from 0 to {len(CTRANSLATE2_DTYPES) - 1}.")
        array = np.frombuffer(take(number(4)), np.dtype(CTRANSLATE2_DTYPES[dtype]).newbyteorder("<"))
        if array.size != math.prod(shape):
            raise ValueError(f"{path}: {name} has {array.size} values, which do not make the shape {shape}.")
        arrays[name] = array.reshape(shape)
    for _ in range(number(4)):
        alias, name = string(), string()
        arrays[alias] = arrays[name]
    if rest := file.read():
        raise ValueError(f"{path} has {len(rest)} bytes after its end.")
    return arrays


def whisper_weights(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Gives CTranslate2's arrays transformers' names, and splits its stacked projections into q, k and v."""
    weights = {}
    for name, array in arrays.items():
        if array.ndim == 0:  # this is a setting, such as the number of heads
            continue
        prefix, stacked, suffix = re.fullmatch(r"(.*?)(\w+(?:\+\w+)*)(\.\w+)", rename(name, WHISPER_NAMES)).groups()
        parts = stacked.split("+")
        for part, rows in zip(parts, np.split(array, len(parts)), strict=True):
            if f"{part}{suffix}" != "k_proj.bias":  # Whisper has none; the file holds zeros
                weights[f"{prefix}{part}{suffix}"] = torch.from_numpy(rows.copy())
    return weights
