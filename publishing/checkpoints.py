"""Checkpoints: the headers of safetensors files, where each tensor of a model comes from, and a writer that streams."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from publishing.paths import is_inside, write_json


EMBEDDINGS = "model.language_model.embed_tokens.weight"
PROJECTOR = "model.audio_projector.weight"
MARKERS = "audio_markers.weight"
PROJECTOR_FILE = "audio_projector.safetensors"  # what training writes, and `build --projector` reads
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # the key is safetensors' name
MAX_SHARD_SIZE = "5GB"
CHUNK = 2**22  # bytes in memory at a time
WRITE = 2**16  # bytes written at a time: Linux takes longer for the same bytes in larger pieces

# Published checkpoints have the tensor names of older transformers. The rules leave current names unchanged.
BASE_NAMES = ((r"^visual\.", "model.visual."), (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "model.language_model."))
ENCODER_NAMES = ((r"^(?:model\.)?encoder\.", "model.audio_encoder."),)  # of Whisper only the encoder is used
# The rules for trained checkpoints of this model's first layout.
ADAPTER_NAMES = (*BASE_NAMES, (r"^audio_(?=encoder\.|projector\.)", "model.audio_"))


class StoredTensor(NamedTuple):
    """Where a tensor lies in a safetensors file."""

    path: Path
    name: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    start: int  # byte in the file
    size: int  # bytes


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Lists the tensors of a checkpoint. A ValueError names a file that is missing, damaged, or not in the folder."""
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    tensors = []
    for name in sorted(names):
        path = folder / name
        if Path(name).name != name or not is_inside(path, folder):
            raise ValueError(f"{index} names {name!r}; expected the name of a file beside it.")
        if not path.is_file():
            raise ValueError(f"{folder} holds no {name}; expected model.safetensors, or shards with their index.")
        try:
            with safe_open(path, "pt"):  # refuses offsets that overlap, leave gaps or do not fit shapes and file
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file, or is cut short: {error}") from error
        with path.open("rb") as file:  # https://github.com/huggingface/safetensors#format
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for tensor, entry in header.items():
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            tensors.append(StoredTensor(path, tensor, entry["dtype"], shape, 8 + size + start, end - start))
    return tensors


def rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def read_rules(path: Path) -> dict:
    """
    Reads how a model was trained from a processor config or a projector file: arguments of the processor. Missing audio
    tokens are "fixed"; `trained_audio_tokens` is None for an untrained model. `piece_seconds` and `trained_tasks` are
    left out where they are not known.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            stored = file.metadata() or {}
        trained, seconds = stored.get("audio_tokens", "fixed"), stored.get("piece_seconds")
        tasks = json.loads(stored.get("trained_tasks", "null"))
        rules = {"audio_tokens": "fixed" if trained == "both" else trained, "trained_audio_tokens": trained}
    else:  # other and missing files hold nothing
        stored = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" and path.is_file() else {}
        rules = {name: stored.get(name, "fixed") for name in ("audio_tokens", "trained_audio_tokens")}
        seconds, tasks = stored.get("piece_seconds"), stored.get("trained_tasks")
    rules |= {"piece_seconds": float(seconds)} if seconds else {}
    return rules | ({"trained_tasks": tasks} if tasks else {})


def save_projector(path: Path, projector: torch.Tensor, processor, markers: torch.Tensor | None = None):
    """Writes what [`read_projector`] and [`read_rules`] read; `markers` are the embeddings of bos and eos."""
    tensors = {PROJECTOR.removeprefix("model."): projector} | ({} if markers is None else {MARKERS: markers})
    metadata = {"audio_tokens": processor.trained_audio_tokens, "piece_seconds": processor.piece_seconds}
    metadata |= {"trained_tasks": json.dumps(processor.trained_tasks) if processor.trained_tasks else None}
    save_file(tensors, path, {name: str(value) for name, value in metadata.items() if value is not None})


def read_projector(path: Path) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    Reads the projector `(hidden size, d_model)` from a safetensors or `.pt` file, and the embeddings `(hidden size,)`
    of bos and eos, or none. A ValueError names other contents. Nothing in a `.pt` is executed.
    """
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        tensors = {rename(name, ADAPTER_NAMES): tensor for name, tensor in tensors.items()}
    except Exception as error:
        raise ValueError(f"{path} is not a file of tensors by name: {error}") from error
    if PROJECTOR not in tensors or set(tensors) - {PROJECTOR, MARKERS}:
        need = f"expected audio_projector.weight, and perhaps {MARKERS}"
        raise ValueError(f"{path} holds {', '.join(tensors) or 'nothing'}; {need}.")
    return tensors[PROJECTOR], list(tensors.get(MARKERS, ()))


def plan_tensors(base: Path, encoder: Path, adapter: Path | None, config) -> dict[str, StoredTensor]:
    """Maps each tensor of the result to its source. Those of a trained checkpoint take precedence over the bases'."""
    plan = {}
    for folder, rules in ((base, BASE_NAMES), (encoder, ENCODER_NAMES), (adapter, ADAPTER_NAMES)):
        for tensor in stored_tensors(folder) if folder else ():
            name = rename(tensor.name, rules)
            if folder == encoder and not name.startswith("model.audio_encoder."):
                continue  # Whisper's decoder
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            plan[name] = tensor
    return plan


def find_problems(plan: dict[str, StoredTensor | torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Compares the plan with the model, before a byte is written."""
    problems = [f"missing: {name}" for name in expected if name not in plan]
    for name, tensor in plan.items():
        if name not in expected:
            problems.append(f"unexpected: {name} (stored as {tensor.name or name})")
        elif tuple(tensor.shape) != tuple(expected[name].shape):
            problems.append(f"misshapen: {name} is {tuple(tensor.shape)}, the model's is {tuple(expected[name].shape)}")
        elif isinstance(tensor, StoredTensor) and tensor.dtype not in DTYPES:
            problems.append(f"of dtype {tensor.dtype}: {name}; expected one of {', '.join(DTYPES)}")
    return sorted(problems)


def read_bytes(tensor: StoredTensor | torch.Tensor, dtype: torch.dtype, rows: slice = slice(None)) -> Iterator[bytes]:
    """Yields the bytes of a tensor, or of some of its rows, converted to `dtype`, a chunk at a time."""
    if isinstance(tensor, torch.Tensor):
        yield tensor[rows].to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
        return
    first, last, _ = rows.indices(tensor.shape[0])
    row_size = tensor.size // tensor.shape[0]
    with tensor.path.open("rb") as file:
        file.seek(tensor.start + first * row_size)
        left = (last - first) * row_size
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise ValueError(f"{tensor.path} ended within {tensor.name}.")
            left -= len(chunk)
            if DTYPES[tensor.dtype] != dtype:
                converted = torch.frombuffer(bytearray(chunk), dtype=DTYPES[tensor.dtype]).to(dtype)
                chunk = converted.view(torch.uint8).numpy().tobytes()
            yield chunk


def replace_rows(chunks: Iterator[bytes], rows: dict[int, bytes]) -> Iterator[bytes]:
    """Yields the bytes of a matrix with some of its rows replaced."""
    position = 0
    for chunk in chunks:
        for number, row in rows.items():
            offset = number * len(row) - position
            start, end = max(offset, 0), min(offset + len(row), len(chunk))
            if start < end:
                chunk = chunk[:start] + row[start - offset : end - offset] + chunk[end:]
        yield chunk
        position += len(chunk)


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], contents: dict[str, Iterator[bytes]]) -> str:
    """
    Writes a safetensors file from a stream; the library's own writer holds all of it in memory. `tensors` has shapes
    and dtypes by name (meta tensors suffice), `contents` the bytes of each. Returns the file's SHA-256.
    """
    safetensors_names = {dtype: name for name, dtype in DTYPES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        entry = {"dtype": safetensors_names[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**entry, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    chunks = itertools.chain([len(text).to_bytes(8, "little"), text], *(contents[name] for name in tensors))
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(digest.update, b"")
        for chunk in chunks:
            hashed.result()
            hashed = pool.submit(digest.update, chunk)  # while this one is written and the next one is read
            for start in range(0, len(chunk), WRITE):
                file.write(memoryview(chunk)[start : start + WRITE])
        hashed.result()
        if file.tell() != 8 + len(text) + offset:
            raise ValueError(f"{path.name} should have {8 + len(text) + offset} bytes, but {file.tell()} were read.")
    return digest.hexdigest()


def write_weights(
    folder: Path, tensors: dict[str, torch.Tensor], plan: dict[str, StoredTensor | torch.Tensor], marker_rows: dict
) -> dict[str, str]:
    """
    Writes `model.safetensors`, or shards of at most `MAX_SHARD_SIZE` with their index. `tensors` has the shapes and
    dtypes of the model by name (meta tensors suffice), `plan` where the content of each comes from, `marker_rows` the
    bytes of rows of the embeddings, by number, that replace those of the plan. Returns the SHA-256 of each safetensors
    file by its name.
    """
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=MAX_SHARD_SIZE)
    checksums = {}
    for file, names in tqdm(split.filename_to_tensors.items(), desc="weights", unit="file"):
        contents = {name: read_bytes(plan[name], tensors[name].dtype) for name in names}
        if EMBEDDINGS in contents:
            contents[EMBEDDINGS] = replace_rows(contents[EMBEDDINGS], marker_rows)
        checksums[file] = write_safetensors(folder / file, {name: tensors[name] for name in names}, contents)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return checksums
