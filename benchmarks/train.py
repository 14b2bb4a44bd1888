"""
Measures what the stages of training cost, with the demo checkpoint on this machine.

    python -m benchmarks.train [--readme]
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import where
from benchmarks.parts import built_demo
from benchmarks.report import report, table
from demo.ask import write_transcripts


STEPS, BATCH = 12, 4
SETTINGS = {
    "projector": ["--stage", "projector"],
    "projector, `--encoder-cache`": ["--stage", "projector", "--encoder-cache", "{folder}/cache"],
    "projector, `--gradient-checkpointing`": ["--stage", "projector", "--gradient-checkpointing"],
    "projector, `--audio-tokens trimmed`": ["--stage", "projector", "--audio-tokens", "trimmed"],
    "lora": ["--stage", "lora"],
}


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


def main() -> list[str]:
    rows = []
    with built_demo() as repo:
        data = repo.parent / "rows.jsonl"
        write_transcripts(data)
        for number, (name, options) in enumerate(SETTINGS.items()):
            rate, memory = train(repo, data, repo.parent / f"run-{number}", options)
            rows.append((name, f"{rate:.0f}", f"{memory:.1f} GiB"))
    measured = table(("demo checkpoint, measured", "clips per second", "peak memory"), rows)
    return [measured, f"{where()}; {STEPS} steps of {BATCH} clips of 3 s, in one process."]


if __name__ == "__main__":
    report(__file__, __doc__, main)
