"""Reads CTranslate2's `model.bin`, and renames its arrays to the weights of transformers' Whisper."""

import math
import re
from pathlib import Path

import numpy as np
import torch

from publishing.checkpoints import rename


# https://github.com/OpenNMT/CTranslate2/blob/master/python/ctranslate2/specs/model_spec.py
CTRANSLATE2_VERSION = 6  # the binary format's
CTRANSLATE2_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # in the order of their numbers in a file
WHISPER_NAMES = (  # from CTranslate2's names to transformers'
    (r"^decoder/projection/", "proj_out/"),
    (r"^(?!proj_out)", "model/"),
    (r"/layer_(?=\d)", "/layers/"),
    (r"/embeddings/", "/embed_tokens/"),
    (r"/position_encodings/encodings$", "/embed_positions/weight"),
    (r"/ffn/layer_norm/", "/final_layer_norm/"),
    (r"/ffn/linear_0/", "/fc1/"),
    (r"/ffn/linear_1/", "/fc2/"),
    (r"/self_attention/layer_norm/", "/self_attn_layer_norm/"),
    (r"/attention/layer_norm/", "/encoder_attn_layer_norm/"),
    (r"/self_attention/linear_0/", "/self_attn/q_proj+k_proj+v_proj/"),
    (r"/self_attention/linear_1/", "/self_attn/out_proj/"),
    (r"/attention/linear_0/", "/encoder_attn/q_proj/"),
    (r"/attention/linear_1/", "/encoder_attn/k_proj+v_proj/"),
    (r"/attention/linear_2/", "/encoder_attn/out_proj/"),
    (r"/gamma$", "/weight"),
    (r"/beta$", "/bias"),
    (r"/", "."),
)


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """
    Reads the arrays of a CTranslate2 `model.bin` by their names, read-only; an alias is an entry of its own.

    Raises:
        ValueError: if the file has another version, ends early, goes on after its end, or has an unknown dtype.
    """
    data, position = path.read_bytes(), 0

    def take(size: int) -> bytes:
        nonlocal position
        if position + size > len(data):
            raise ValueError(
                f"{path} is cut short: {size} bytes are needed at byte {position}, but it has {len(data)}. "
                "Remove it and fetch it again."
            )
        position += size
        return data[position - size : position]

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
    if position != len(data):
        raise ValueError(f"{path} has {len(data) - position} bytes after its end.")
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
