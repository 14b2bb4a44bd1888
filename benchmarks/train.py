"""
What the stages of `train.py` cost: measured with the demo checkpoint on this machine, and counted for full size.

    python -m benchmarks.train [--readme]
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from benchmarks.measure import where
from benchmarks.parts import full_config
from benchmarks.report import report
from demo.ask import DEMO, write_transcripts
from publishing.build import build
from training.train import LANGUAGE_MODEL


STEPS, BATCH = 12, 4
SETTINGS = {
    "projector": ["--stage", "projector"],
    "projector, `--encoder_cache`": ["--stage", "projector", "--encoder_cache", "{folder}/cache"],
    "projector, `--gradient_checkpointing`": ["--stage", "projector", "--gradient_checkpointing"],
    "projector, `--audio_tokens trimmed`": ["--stage", "projector", "--audio_tokens", "trimmed"],
    "lora": ["--stage", "lora"],
}
TOKENS = 1_600  # a clip of 30 s in one row, with its text
ANSWER = 100  # of them, which alone get logits


def run(folder: Path, number: int, options: list[str]) -> tuple[float, float]:
    """Rows per second, and the peak memory of the process in GiB."""
    output = folder / f"run-{number}"
    command = [sys.executable, "-m", "training", "--model", str(folder / "model"), "--use_cpu"]
    command += ["--output_dir", str(output), "--data", str(folder / "rows.jsonl"), "--max_steps", str(STEPS)]
    command += ["--per_device_train_batch_size", str(BATCH), "--report_to", "none"]
    command += [option.format(folder=folder) for option in options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise ValueError(f"{' '.join(command)} ended with {status}")
    return json.loads((output / "summary.json").read_text())["rows per second"], usage.ru_maxrss / 2**20


def count_full_size() -> list[str]:
    """Memory and operations at full size, by the arithmetic of docs/training.md."""
    config = full_config()
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    text = config.text_config
    layers, encoder = (
        sum(parameter.numel() for parameter in part.parameters())
        for part in (model.model.language_model.layers, model.model.audio_encoder)
    )
    head = model.lm_head.weight.numel()
    frozen = sum(parameter.numel() for parameter in model.parameters())
    projector = model.model.audio_projector.weight.numel()
    with torch.device("meta"):
        peft = get_peft_model(model, LoraConfig(r=16, target_modules=LANGUAGE_MODEL))
    lora = sum(parameter.numel() for parameter in peft.parameters() if parameter.requires_grad)

    # Inputs of the layers in 16 bits; logits and their gradients in 16 and 32 bits.
    activations = text.num_hidden_layers * TOKENS * text.hidden_size * 2 + ANSWER * text.vocab_size * 12
    rows = []
    for stage, learning in (("projector", projector), ("lora", projector + lora)):
        memory = frozen * 2 + learning * 16 + activations
        operations = 6 * layers * TOKENS + 6 * head * ANSWER + 2 * encoder * config.audio_config.max_source_positions
        operations += 6 * (learning - projector) * TOKENS
        rows.append(
            f"| {stage} | {learning / 1e6:.1f} million | {memory / 1e9:.0f} GB | {operations / 1e12:.0f} TFLOP |"
        )
    return rows


def measure(_) -> str:
    lines = ["| full size, counted | learns | memory | operations for a clip of 30 s |", "|---|---|---|---|"]
    lines += [*count_full_size(), "", "| demo checkpoint, measured | clips per second | peak memory |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build(checkpoint=DEMO, output=folder / "model")
        write_transcripts(folder / "rows.jsonl")
        for number, (name, words) in enumerate(SETTINGS.items()):
            rate, memory = run(folder, number, words)
            lines.append(f"| {name} | {rate:.0f} | {memory:.1f} GiB |")
    note = f"{where()}; {STEPS} steps of {BATCH} clips of 3 s, in one process."
    return "\n".join([*lines, "", note])


if __name__ == "__main__":
    report(__file__, __doc__, measure)
