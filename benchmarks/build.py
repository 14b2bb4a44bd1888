"""
Measures `upload.py build` and `upload.py gguf` at real size: peak memory, and time beside `cp` of the same bytes on the
same disk. The base checkpoints have the real names and sizes, and noise for content.

    python -m benchmarks.build [--folder DIR_WITH_40_GB_FREE] [--readme]

The default of `--folder` is the temporary folder.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, Qwen2VLForConditionalGeneration, WhisperForConditionalGeneration

from benchmarks.measure import where
from benchmarks.report import report, table
from demo.bases import ASSETS
from publishing.checkpoints import BASE_NAMES, rename, write_safetensors
from publishing.paths import ROOT


# Without the highest bit of the exponent: below 2 in each dtype, because float16 must hold some of it.
NOISE = (np.frombuffer(os.urandom(2**22), np.uint16) & 0xBFFF).tobytes()


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shard_of: dict[str, str], dtype: torch.dtype):
    """Writes safetensors files of noise; only the shapes of `tensors` are used."""
    for shard in {shard_of[name] for name in tensors}:
        part = {name: tensor.to(dtype) for name, tensor in tensors.items() if shard_of[name] == shard}
        contents = {}
        for name, tensor in part.items():
            times, rest = divmod(tensor.nbytes, len(NOISE))
            contents[name] = [*[NOISE] * times, NOISE[:rest]]
        write_safetensors(folder / shard, part, contents)


def make_base(folder: Path, size: str) -> Path:
    shutil.copytree(ASSETS / "qwen2-vl-7b", folder)
    shutil.copyfile(ASSETS / f"qwen2-vl-{size}" / "config.json", folder / "config.json")
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        tensors = Qwen2VLForConditionalGeneration(config).state_dict()
    shard_of = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    published = {rename(name, BASE_NAMES): name for name in shard_of}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
        (folder / "model.safetensors.index.json").unlink()
        shard_of = dict.fromkeys(shard_of, "model.safetensors")
    write_shards(folder, {published[name]: tensor for name, tensor in tensors.items()}, shard_of, torch.bfloat16)
    return folder


def make_encoder(folder: Path) -> Path:
    shutil.copytree(ASSETS / "whisper-large-v3-turbo", folder)
    with torch.device("meta"):
        tensors = WhisperForConditionalGeneration(AutoConfig.from_pretrained(folder)).state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("model.encoder.")}
    write_shards(folder, tensors, dict.fromkeys(tensors, "model.safetensors"), torch.float16)
    return folder


def run_command(command: list) -> tuple[float, float]:
    """Returns the seconds until what the command writes is on the disk, and the GiB of its peak memory."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    os.sync()
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def measure(size: str, folder: Path) -> list[tuple[str, ...]]:
    """Returns two rows of cells: `build`, and `gguf` of what it built."""
    base, encoder, built = make_base(folder / "base", size), make_encoder(folder / "encoder"), folder / "built"
    program, bases = [sys.executable, ROOT / "upload.py"], ["--base", base, "--audio-encoder", encoder]
    steps = {
        "build": ([*program, "build", *bases, "--output", built], [base, encoder]),
        "gguf": ([*program, "gguf", built, "--output", folder / "files", "--type", "bf16"], [built]),
    }
    rows = []
    for name, (command, sources) in steps.items():
        num_bytes = sum(file.stat().st_size for source in sources for file in source.glob("*.safetensors"))
        (folder / "copy").mkdir()
        copying, _ = run_command(["cp", "--recursive", "--sparse=never", *sources, folder / "copy"])
        shutil.rmtree(folder / "copy")
        seconds, peak = run_command(command)
        for path in sources:
            shutil.rmtree(path)
        times = f"{seconds:.0f} s", f"{copying:.0f} s", f"{seconds / copying:.2f}"
        rows.append((size, f"`upload.py {name}`", f"{num_bytes / 1e9:.1f} GB", *times, f"{peak:.2f} GiB"))
    return rows


def main(folder: str = "") -> list[str]:
    rows = []
    for size in ("2b", "7b"):
        with tempfile.TemporaryDirectory(dir=folder or None) as name:
            rows += measure(size, Path(name))
    return [
        table(("Qwen2-VL", "command", "bytes read", "takes", "`cp`", "times as long", "peak memory"), rows),
        where(),
    ]


if __name__ == "__main__":
    report(__file__, __doc__, main)
