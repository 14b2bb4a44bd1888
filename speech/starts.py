"""
python -m speech.starts: does a projector in closed form help? Trains from it and from a random projector, with three
seeds each, and prints loss and word error rate of clips that training does not have.
"""

import argparse
import json
from pathlib import Path

from benchmarks.report import table
from demo.ask import read_rows, write_rows
from speech.recipe import ALIGNER, BUILD, HELD_OUT, ROUNDS, SETTINGS, make_aligned, make_data, make_start, run_train


SEEDS, STEPS = (0, 1, 2), 150
SHORTEST, LONGEST = 1.0, 2.4  # seconds of the clips, so that a run takes minutes
SOURCES = {"wordnet", "definition", "phrase", "fortune", "statement", "question", "instruction"}  # phrases, sentences
NUM_HELD_OUT = 32  # clips
STARTS = ("closed form", "random")


def write_short(rows: Path, path: Path, count: int) -> Path:
    """Writes rows of the first short clips that say a phrase or a sentence."""
    short = [row for row in read_rows(rows) if row["source"] in SOURCES and SHORTEST <= row["seconds"] <= LONGEST]
    write_rows(path, [{**row, "audio": str(rows.parent / row["audio"])} for row in short[:count]])
    return path


def train_from(start: str, seed: int, data: Path, held_out: Path) -> list[str]:
    """Returns the held-out loss after each third of the steps, and the last word error rate."""
    first, output = ROUNDS[0], BUILD / "starts" / f"{start.replace(' ', '-')}-{seed}"
    model = make_start(ALIGNER, seed if start == "random" else 0)
    run_train(
        **SETTINGS,
        stage="lora",
        model=make_aligned(model, first.data[0]) if start == "closed form" else model,
        data=[data],
        eval=[held_out],
        eval_strategy="steps",
        eval_steps=STEPS // 3,
        max_new_tokens=24,
        output_dir=output,
        per_device_train_batch_size=first.batch,
        per_device_eval_batch_size=first.batch,
        max_steps=STEPS,
        save_steps=1000,
        seed=seed,
        learning_rate=first.learning_rate,
        projector_learning_rate=first.projector_learning_rate,
    )
    (state,) = output.glob("checkpoint-*/trainer_state.json")
    lines = [line for line in json.loads(state.read_text())["log_history"] if "eval_loss" in line][:3]
    return [*(f"{line['eval_loss']:.2f}" for line in lines), f"{lines[-1]['eval_wer']:.0%}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip())
    parser.add_argument("--only", nargs=2, metavar=("START", "SEED"), help="one of the runs, such as: random 0")
    only = parser.parse_args().only
    data, held_out = (BUILD / "starts" / f"{name}.jsonl" for name in ("rows", "held-out"))
    write_short(*make_data(ROUNDS[0].data), data, STEPS * ROUNDS[0].batch)
    write_short(*make_data([HELD_OUT]), held_out, NUM_HELD_OUT)
    runs = [(start, seed) for start in STARTS for seed in SEEDS if only in (None, [start, str(seed)])]
    rows = [(start, seed, *train_from(start, seed, data, held_out)) for start, seed in runs]
    head = ("start", "seed", *(f"loss at step {STEPS * third // 3}" for third in (1, 2, 3)), "word error rate")
    print(table(head, rows))


if __name__ == "__main__":
    main()
