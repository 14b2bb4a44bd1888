"""
How many clips does a word error rate take? Asks the checkpoints of the rounds of speech.recipe for telephone prompts:

    python -m speech.curve    writes docs/curve.png, and prints a table

Started again, it goes on.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from peft import PeftModel
from transformers.utils import logging

from evaluation.scoring import percent, score
from publishing import paths
from speech.recipe import BUILD, ROUNDS, WHOLE, make_start
from speech.recordings import read_rows
from speech.run import load, transcribe


ASKED = 60  # prompts, evenly from all
AIM = 0.20
FITTED = 7  # of the last points


def find_checkpoints() -> dict[int, Path]:
    """The adapters that the rounds left, by the number of clips that were trained on."""
    found, before = {}, 0
    for round_ in ROUNDS:
        paths = (BUILD / f"run-{round_.name}").glob("checkpoint-*/adapter_model.safetensors")
        steps = {int(path.parent.name.rpartition("-")[2]): path.parent for path in paths}
        found |= {before + round_.batch * step: steps[step] for step in sorted(steps)}
        before += round_.batch * max(steps, default=0)
    return found


def ask(adapter: Path, rows: list[dict], batch: int = 8) -> list[dict]:
    """Expected and given texts of prompts."""
    processor, model = load(make_start(encoder=WHOLE))
    model = PeftModel.from_pretrained(model, adapter).eval()
    recordings = [BUILD / "recordings" / row["audio"] for row in rows]
    batches = (recordings[start : start + batch] for start in range(0, len(recordings), batch))
    given = [text for paths in batches for text in transcribe(processor, model, paths)]
    return [{"text": row["text"], "pred_text": text} for row, text in zip(rows, given, strict=True)]


def fit(points: dict[int, float]) -> tuple[float, float]:
    """`scale` and `power` of `rate = scale * clips ** power`, by least squares of the logarithms."""
    power, offset = np.polyfit(np.log([*points]), np.log([*points.values()]), 1)
    return math.exp(offset), float(power)


def draw(found: dict[int, dict], scale: float, power: float, reached: float, path: Path):
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.fill_between([*found], *([100 * rate[end] for rate in found.values()] for end in ("low", "high")), alpha=0.2)
    axes.plot(
        [*found], [100 * rate["value"] for rate in found.values()], marker=".", label="measured, with 95% interval"
    )
    ends = [[*found][-FITTED:][0], reached]
    axes.plot(ends, [100 * scale * clips**power for clips in ends], "--", label=f"of the last {FITTED}, continued")
    axes.axhline(100 * AIM, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="clips", ylabel=f"word error rate of {ASKED} telephone prompts, %")
    clips, rates = (3_000, 5_000, 10_000, 20_000, 40_000, 80_000), (20, 30, 50, 70, 100)
    for axis, ticks in ((axes.xaxis, clips), (axes.yaxis, rates)):
        axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.set_verbosity_error()
    rows = read_rows(BUILD / "recordings")
    rows = rows[:: len(rows) // ASKED][:ASKED]
    kept = BUILD / "curve.json"  # what was answered, by the adapter
    answers = json.loads(kept.read_text()) if kept.is_file() else {}
    found = {}
    for clips, adapter in find_checkpoints().items():
        name = str(adapter.relative_to(BUILD))
        if name not in answers:
            answers[name] = ask(adapter, rows)
            kept.write_text(json.dumps(answers))
        found[clips] = score(answers[name])["wer"]
        print(f"| {clips:,} | {percent(found[clips])} |", flush=True)
    scale, power = fit({clips: rate["value"] for clips, rate in [*found.items()][-FITTED:]})
    if power >= 0:
        raise SystemExit(f"The rate does not fall over the last {FITTED} checkpoints.")
    reached = (AIM / scale) ** (1 / power)
    print(f"{AIM:.0%} after {reached:,.0f} clips, if it goes on as in the last {FITTED}")
    draw(found, scale, power, reached, paths.ROOT / "docs" / "curve.png")


if __name__ == "__main__":
    main()
