"""`make demo`: builds the demo checkpoint and asks it about the recordings and pictures in `demo/examples`."""

import shutil
import time
from pathlib import Path

from matplotlib.figure import Figure
from transformers.utils import logging

from audio_utils import fetch_audio, log_mel, split_windows
from demo.ask import DEMO, EXAMPLES, ask_example, read_examples
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


def main():
    logging.set_verbosity_error()
    start = time.perf_counter()
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    processor, model = load(build(checkpoint=DEMO, output=BUILD / "qwen2-audio-vl"))
    print(f"\n{'files':<58}{'question':<45}{'expected':<24}answer")
    right, examples, titles = 0, read_examples(), {}
    for example in examples:
        answer = ask_example(processor, model, example)
        right += answer == example["answer"]
        question = SKILLS[example["skill"]]["instruction"]
        files = ", ".join([*filter(None, [example["image"]]), *example["audio"]])
        print(f"{files:<58}{question:<45}{example['answer']:<24}{answer}", flush=True)
        for name in example["audio"]:
            titles.setdefault(name, []).append(f"{question} {answer}")
    for name, lines in titles.items():
        draw_clip(EXAMPLES / name, "\n".join(lines), processor.feature_extractor, BUILD / f"{Path(name).stem}.png")
    seconds = time.perf_counter() - start
    print(f"\n{right} of {len(examples)} right, in {seconds:.0f} s, by {model.num_parameters():,} parameters.")
    print(f"The log-mel spectrogram of each recording: {BUILD.relative_to(ROOT)}/*.png")
    if right < len(examples):
        raise SystemExit("An answer is wrong.")


if __name__ == "__main__":
    main()
