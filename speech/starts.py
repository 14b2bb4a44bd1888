"""
Does a projector in closed form earn its lines? Loss and word error rate by step, from it and from random projectors, in
three runs each. `python -m speech.starts` writes docs/starts.png.
"""

import argparse
import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from publishing import paths
from speech.recipe import BATCH, BUILD, HELD_OUT, ROUNDS, SETTINGS, make_aligned, make_data, make_start, run_train


SEEDS, STEPS = (0, 1, 2), 150
SHORTEST, LONGEST = 1.0, 2.4  # seconds of the clips, so that a run takes minutes
KINDS = {"wordnet", "definition", "phrase", "fortune", "statement", "question", "instruction"}  # phrases, sentences
ASKED = 32  # held-out clips for loss and word error rate
SMOOTH = 10  # steps
STARTS = ("random", "closed form")


def write_short(rows: Path, path: Path, count: int) -> Path:
    """The first short clips of some rows that say a phrase or a sentence."""
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    found = [row for row in found if row["source"] in KINDS and SHORTEST <= row["seconds"] <= LONGEST][:count]
    found = [{**row, "audio": str(rows.parent / row["audio"])} for row in found]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def run(name: str, seed: int, data: Path, held_out: Path) -> list[dict]:
    """The log of a run."""
    output = BUILD / "starts" / f"{name.replace(' ', '-')}-{seed}"
    run_train(
        **SETTINGS,
        save_steps=1000,
        per_device_train_batch_size=BATCH,
        stage="lora",
        model=make_start(seed) if name == "random" else make_aligned(make_start(), ROUNDS[0].data[0]),
        data=data,
        eval=held_out,
        eval_strategy="steps",
        eval_steps=STEPS // 3,
        per_device_eval_batch_size=BATCH,
        max_new_tokens=24,
        output_dir=output,
        max_steps=STEPS,
        learning_rate=ROUNDS[0].learning_rate,
        projector_learning_rate=ROUNDS[0].projector_learning_rate,
        logging_steps=1,
        seed=seed,
    )
    (state,) = output.glob("checkpoint-*/trainer_state.json")
    return json.loads(state.read_text())["log_history"]


def smooth(history: list[dict]) -> list[float]:
    """Means of the losses of the last ten steps, by step."""
    losses = [line["loss"] for line in history if "loss" in line]
    return [statistics.mean(losses[max(0, end - SMOOTH) : end]) for end in range(1, len(losses) + 1)]


def draw(found: dict[str, list[list[dict]]], path: Path):
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    loss, errors = figure.subplots(1, 2)
    for colour, (name, histories) in zip(("tab:orange", "tab:blue"), found.items(), strict=True):
        for number, history in enumerate(histories):
            label = {"label": name} if number == 0 else {}
            loss.plot(smooth(history), color=colour, **label)
            rates = [(line["step"], 100 * line["eval_wer"]) for line in history if "eval_wer" in line]
            errors.plot(*zip(*rates, strict=True), color=colour, marker=".", **label)
    loss.set(xlabel="step", ylabel=f"loss, mean of {SMOOTH} steps", ylim=(3.5, 6.5))
    errors.set(xlabel="step", ylabel="word error rate, %")
    for axes in (loss, errors):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--only", nargs=2, metavar=("START", "SEED"), help="one of the runs, such as: random 0")
    only = parser.parse_args().only
    (BUILD / "starts").mkdir(parents=True, exist_ok=True)
    rows = make_data(ROUNDS[0].data[0], HELD_OUT)[0]
    data = write_short(rows, BUILD / "starts" / "rows.jsonl", STEPS * BATCH)
    held_out = write_short(BUILD / "held-out" / "rows.jsonl", BUILD / "starts" / "held-out.jsonl", ASKED)
    found = {
        name: [run(name, seed, data, held_out) for seed in SEEDS if only in (None, [name, str(seed)])]
        for name in STARTS
    }
    if only is None:
        for name, histories in found.items():
            losses = ", ".join(f"{smooth(history)[-1]:.2f}" for history in histories)
            rates = [[line["eval_wer"] for line in history if "eval_wer" in line][-1] for history in histories]
            print(f"{name}: loss {losses}; word error rate {', '.join(f'{rate:.0%}' for rate in rates)}")
        draw(found, paths.ROOT / "docs" / "starts.png")


if __name__ == "__main__":
    main()
