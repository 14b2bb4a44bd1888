"""
python -m speech.starts: does a projector in closed form help? Trains from it and from a random projector, with three
seeds each, and prints a table of loss and word error rate of clips that training does not have.
"""

import argparse
import json
from pathlib import Path

from benchmarks.report import table
from demo.ask import read_rows, write_rows
from speech.recipe import BATCH, BUILD, HELD_OUT, ROUNDS, SETTINGS, make_aligned, make_data, make_start, run_train


SEEDS, STEPS = (0, 1, 2), 150
SHORTEST, LONGEST = 1.0, 2.4  # seconds of the clips, so that a run takes minutes
KINDS = {"wordnet", "definition", "phrase", "fortune", "statement", "question", "instruction"}  # phrases, sentences
NUM_HELD_OUT = 32  # clips
STARTS = ("closed form", "random")


def write_short(rows: Path, path: Path, count: int) -> Path:
    """Writes rows of the first short clips that say a phrase or a sentence."""
    short = [row for row in read_rows(rows) if row["source"] in KINDS and SHORTEST <= row["seconds"] <= LONGEST]
    write_rows(path, [{**row, "audio": str(rows.parent / row["audio"])} for row in short[:count]])
    return path


def train(start: str, seed: int, data: Path, held_out: Path) -> tuple[str, ...]:
    """Trains from a start. Returns the held-out loss after each third of the steps, and the last word error rate."""
    output = BUILD / "starts" / f"{start.replace(' ', '-')}-{seed}"
    run_train(
        **SETTINGS,
        save_steps=1000,
        per_device_train_batch_size=BATCH,
        stage="lora",
        model=make_start(seed=seed) if start == "random" else make_aligned(make_start(), ROUNDS[0].data[0]),
        data=[data],
        eval=[held_out],
        eval_strategy="steps",
        eval_steps=STEPS // 3,
        per_device_eval_batch_size=BATCH,
        max_new_tokens=24,
        output_dir=output,
        max_steps=STEPS,
        learning_rate=ROUNDS[0].learning_rate,
        projector_learning_rate=ROUNDS[0].projector_learning_rate,
        seed=seed,
    )
    (state,) = output.glob("checkpoint-*/trainer_state.json")
    evaluated = [line for line in json.loads(state.read_text())["log_history"] if "eval_loss" in line][:3]
    return (*(f"{line['eval_loss']:.2f}" for line in evaluated), f"{evaluated[-1]['eval_wer']:.0%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("--only", nargs=2, metavar=("START", "SEED"), help="one of the runs, such as: random 0")
    only = parser.parse_args().only
    data = write_short(make_data(ROUNDS[0].data[0])[0], BUILD / "starts" / "rows.jsonl", STEPS * BATCH)
    held_out = write_short(make_data(HELD_OUT)[0], BUILD / "starts" / "held-out.jsonl", NUM_HELD_OUT)
    runs = [(start, seed) for start in STARTS for seed in SEEDS if only in (None, [start, str(seed)])]
    rows = [(start, str(seed), *train(start, seed, data, held_out)) for start, seed in runs]
    print(table(("start", "seed", *(f"loss at {STEPS * part // 3}" for part in (1, 2, 3)), "word error rate"), rows))


if __name__ == "__main__":
    main()
