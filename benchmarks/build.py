"""
What `upload.py build` costs at real size: peak memory, and time beside `cp` of the same bytes on the same disk. The
base checkpoints have the real names and sizes and noise for content; with `--sparse` they are files of holes, which
take no space but which `cp` does not even read.

    python -m benchmarks.build --folder DIR_WITH_40_GB_FREE [--readme]
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoConfig, Qwen2VLForConditionalGeneration, WhisperForConditionalGeneration

from benchmarks.measure import where
from benchmarks.report import report
from demo.bases import ASSETS
from publishing.checkpoints import BASE_NAMES, rename
from publishing.paths import ROOT


NOISE = os.urandom(2**22)


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shard_of: dict[str, str], dtype: str, sparse: bool):
    """Safetensors files of 16 bit tensors."""
    shards = defaultdict(dict)
    for name, tensor in tensors.items():
        shard, size = shards[shard_of[name]], 2 * tensor.numel()
        start = max((entry["data_offsets"][1] for entry in shard.values()), default=0)
        shard[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, start + size]}
    for file, header in shards.items():
        text = json.dumps(header).encode()
        size = max(entry["data_offsets"][1] for entry in header.values())
        with (folder / file).open("wb") as output:
            output.write(len(text).to_bytes(8, "little") + text)
            if sparse:
                output.truncate(8 + len(text) + size)
            else:
                for start in range(0, size, len(NOISE)):
                    output.write(NOISE[: size - start])


def make_base(folder: Path, size: str, sparse: bool) -> Path:
    shutil.copytree(ASSETS / "qwen2-vl-7b", folder)
    shutil.copyfile(ASSETS / f"qwen2-vl-{size}" / "config.json", folder / "config.json")
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        tensors = Qwen2VLForConditionalGeneration(config).state_dict()
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    published = {rename(name, BASE_NAMES): name for name in index}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
        (folder / "model.safetensors.index.json").unlink()
        index = dict.fromkeys(map(published.get, tensors), "model.safetensors")
    write_shards(folder, {published[name]: tensor for name, tensor in tensors.items()}, index, "BF16", sparse)
    return folder


def make_encoder(folder: Path, sparse: bool) -> Path:
    shutil.copytree(ASSETS / "whisper-large-v3-turbo", folder)
    with torch.device("meta"):
        tensors = WhisperForConditionalGeneration(AutoConfig.from_pretrained(folder)).state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("model.encoder.")}
    write_shards(folder, tensors, dict.fromkeys(tensors, "model.safetensors"), "F16", sparse)
    return folder


def timed(command: list, folder: Path) -> float:
    """Seconds until the bytes are on the disk, which is emptied again."""
    os.sync()
    start = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds


def bench(size: str, folder: Path, sparse: bool) -> str:
    base, encoder = make_base(folder / "base", size, sparse), make_encoder(folder / "encoder", sparse)
    total = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    command = [sys.executable, ROOT / "upload.py", "build", "--base", base, "--audio-encoder", encoder]
    build = timed([*command, "--output", folder / "built"], folder / "built")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    (folder / "copy").mkdir()
    copy = timed(["cp", "--recursive", "--sparse=never", base, encoder, folder / "copy"], folder / "copy")
    return f"| {size} | {total / 1e9:.1f} GB | {build:.0f} s | {copy:.0f} s | {build / copy:.2f} | {peak:.2f} GiB |"


def measure(options) -> str:
    rows = [
        "| Qwen2-VL | bytes | `upload.py build` | `cp` | times as long | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for size in ("2b", "7b"):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows.append(bench(size, Path(folder), options.sparse))
    return "\n".join([*rows, "", where()])


if __name__ == "__main__":
    options = {
        "--folder": {"help": "on the disk to measure (default: the temporary folder)"},
        "--sparse": {"action": "store_true", "help": "base files of holes"},
    }
    report(__file__, __doc__, measure, options)
