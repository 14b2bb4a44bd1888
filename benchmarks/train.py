"""
Measures what the stages of training cost, with the demo checkpoint on this machine, and counts it for full size.

    python -m benchmarks.train [--readme]
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.measure import where
from benchmarks.parts import count_parameters, full_config, make_model
from benchmarks.report import report, table
from demo.ask import built_demo, write_transcripts
from training.train import LANGUAGE_MODEL


STEPS, BATCH = 12, 4
SETTINGS = {
    "projector": ["--stage", "projector"],
    "projector, `--encoder-cache`": ["--stage", "projector", "--encoder-cache", "{folder}/cache"],
    "projector, `--gradient-checkpointing`": ["--stage", "projector", "--gradient-checkpointing"],
    "projector, `--audio-tokens trimmed`": ["--stage", "projector", "--audio-tokens", "trimmed"],
    "lora": ["--stage", "lora"],
}
TOKENS = 1_600  # a clip of 30 s in one row, with its text
ANSWER = 100  # tokens of the answer, which alone get logits


def train(repo: Path, data: Path, output: Path, options: list[str]) -> tuple[float, float]:
    """Returns the rows per second, and the peak memory of the process in GiB."""
    command = [sys.executable, "-m", "training", "--model", str(repo), "--data", str(data), "--output-dir", str(output)]
    command += ["--use-cpu", "--max-steps", str(STEPS), "--per-device-train-batch-size", str(BATCH)]
    command += ["--report-to", "none", *(option.format(folder=repo.parent) for option in options)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise ValueError(f"{' '.join(command)} ended with {status}")
    return json.loads((output / "summary.json").read_text())["rows per second"], usage.ru_maxrss / 2**20


def count_full_size() -> str:
    """Counts memory and operations at full size by the arithmetic of docs/training.md."""
    config = full_config()
    model = make_model(config, torch.bfloat16, "meta")
    text, inner, frozen = config.text_config, model.model, count_parameters(model)
    modules = inner.language_model.layers, inner.audio_encoder, inner.audio_projector, model.lm_head
    layers, encoder, projector, head = map(count_parameters, modules)
    with torch.device("meta"):
        lora, _ = get_peft_model(model, LoraConfig(r=16, target_modules=LANGUAGE_MODEL)).get_nb_trainable_parameters()
    # Inputs of the layers take 16 bits; logits and their gradients take 16 and 32 bits.
    activations = text.num_hidden_layers * TOKENS * text.hidden_size * 2 + ANSWER * text.vocab_size * 12
    rows = []
    for stage, added in (("projector", 0), ("lora", lora)):
        memory = frozen * 2 + (projector + added) * 16 + activations
        operations = 6 * (layers + added) * TOKENS + 6 * head * ANSWER
        operations += 2 * encoder * config.audio_config.max_source_positions
        learns = f"{(projector + added) / 1e6:.1f} million"
        rows.append((stage, learns, f"{memory / 1e9:.0f} GB", f"{operations / 1e12:.0f} TFLOP"))
    return table(("full size, counted", "learns", "memory", "operations for a clip of 30 s"), rows)


def main() -> list[str]:
    rows = []
    with built_demo() as repo:
        data = repo.parent / "rows.jsonl"
        write_transcripts(data)
        for number, (name, options) in enumerate(SETTINGS.items()):
            rate, memory = train(repo, data, repo.parent / f"run-{number}", options)
            rows.append((name, f"{rate:.0f}", f"{memory:.1f} GiB"))
    measured = table(("demo checkpoint, measured", "clips per second", "peak memory"), rows)
    return [count_full_size(), measured, f"{where()}; {STEPS} steps of {BATCH} clips of 3 s, in one process."]


if __name__ == "__main__":
    report(__file__, __doc__, main)
