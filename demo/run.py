"""`make demo`: builds both demo checkpoints and asks them about the recordings and pictures in `demo/examples`."""

import shutil
import time
from pathlib import Path

from matplotlib.figure import Figure
from transformers.utils import logging

from audio_utils import fetch_audio, log_mel, split_windows
from demo.ask import CHECKPOINTS, EXAMPLES, ask_example, read_examples
from demo.world import SKILLS
from evaluation.generate import load
from publishing.build import build
from publishing.paths import ROOT


BUILD = ROOT / "build" / "demo"


def draw_clip(recording: Path, title: str, feature_extractor, path: Path, until: float | None = None):
    """Draws the log-mel spectrogram of a recording's first window, which is what the encoder gets, up to `until` s."""
    samples = fetch_audio(recording, feature_extractor.sampling_rate)
    (mel,) = log_mel(split_windows(samples, feature_extractor)[:1], feature_extractor)  # [mel bins, frames]
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(mel, origin="lower", aspect="auto", extent=(0, feature_extractor.chunk_length, 0, len(mel)))
    axes.set(title=title, xlabel="seconds", ylabel="mel bin", xlim=(0, until))
    figure.savefig(path, dpi=110)


def ask_all(processor, model, titles: dict[str, list[str]]) -> int:
    """Asks about every example, and adds what its clips answered to the titles. Returns how many answers are right."""
    print(f"{'files':<58}{'question':<45}{'expected':<24}answer")
    right = 0
    for example in read_examples():
        answer = ask_example(processor, model, example)
        right += answer == example["answer"]
        question = SKILLS[example["skill"]]["instruction"]
        files = ", ".join([*filter(None, [example["image"]]), *example["audio"]])
        print(f"{files:<58}{question:<45}{example['answer']:<24}{answer}", flush=True)
        for name in example["audio"]:
            titles.setdefault(name, []).append(f"{question} {answer}")
    return right


def main():
    logging.set_verbosity_error()
    start = time.perf_counter()
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    count, counts, titles = len(read_examples()), [], {}
    for base, checkpoint in CHECKPOINTS.items():
        output = BUILD / base.lower().replace("-", "-audio-")
        processor, model = load(build(checkpoint=checkpoint, output=output))
        print(f"\non {base}, {model.num_parameters():,} parameters")
        counts.append(ask_all(processor, model, titles))
    for name, lines in titles.items():
        title = "\n".join(dict.fromkeys(lines))
        draw_clip(EXAMPLES / name, title, processor.feature_extractor, BUILD / f"{Path(name).stem}.png")
    both = " and ".join(f"{right} of {count}" for right in counts)
    print(f"\n{both} right, in {time.perf_counter() - start:.0f} s.")
    print(f"The log-mel spectrogram of each recording: {BUILD.relative_to(ROOT)}/*.png")
    if min(counts) < count:
        raise SystemExit("An answer is wrong.")


if __name__ == "__main__":
    main()
