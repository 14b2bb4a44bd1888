"""`make demo`: builds the demo checkpoint and asks it about the recordings and pictures in `demo/examples`."""

import json
import shutil
import time
from pathlib import Path

from transformers.utils import logging

import app
import upload
from audio_utils import fetch_audio, log_mel
from demo.evaluate import DEMO, ask, load
from demo.world import SKILLS, content


BUILD = DEMO.parent / "build" / "demo"
EXAMPLES = DEMO / "examples"


def read_examples() -> list[dict]:
    """Of every example `skill`, `audio` (names of files), what is `said`, `image` (a file or None) and `answer`."""
    return json.loads((EXAMPLES / "examples.json").read_text())


def write_transcripts(path: Path) -> list[dict]:
    """Writes, and returns, a row to train on for every recording: a request to transcribe it, and what is said."""
    rows = []
    for example in read_examples():
        for name, said in zip(example["audio"], example["said"], strict=True):
            asked = content("transcribe", [str(EXAMPLES / name)], None)
            rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def content_of(example: dict) -> list[dict]:
    """The content of a user's message that asks what the example asks, by paths."""
    picture = example["image"] and str(EXAMPLES / example["image"])
    return content(example["skill"], [str(EXAMPLES / name) for name in example["audio"]], picture)


def ask_example(processor, model, example: dict) -> str:
    return ask(processor, model, [content_of(example)])[0]


def draw_sound(name: str, title: str, feature_extractor, path: Path):
    """The log-mel spectrogram that the encoder is given, under what was asked and answered."""
    samples = fetch_audio(EXAMPLES / name, feature_extractor.sampling_rate)
    features = log_mel([samples[: feature_extractor.n_samples]], feature_extractor)
    app.draw_sound(features, len(samples), feature_extractor, title=title).savefig(path, dpi=110)


def main():
    logging.set_verbosity_error()
    start = time.perf_counter()
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    repo = upload.build(checkpoint=DEMO, output=BUILD / "qwen2-audio-vl")
    processor, model = load(repo)
    print(f"\n{'files':<58}{'question':<45}{'expected':<24}answer")
    right, examples, drawn = 0, read_examples(), {}
    for example in examples:
        given = ask_example(processor, model, example)
        right += given == example["answer"]
        question = SKILLS[example["skill"]]["instruction"]
        files = ", ".join([*filter(None, [example["image"]]), *example["audio"]])
        print(f"{files:<58}{question:<45}{example['answer']:<24}{given}", flush=True)
        for name in example["audio"]:
            drawn.setdefault(name, []).append(f"{question} {given}")
    for name, titles in drawn.items():
        path = BUILD / f"{Path(name).stem}.png"
        draw_sound(name, "\n".join(titles), processor.feature_extractor, path)
    seconds = time.perf_counter() - start
    print(f"\n{right} of {len(examples)} right, in {seconds:.0f} s, by {model.num_parameters():,} parameters.")
    print(f"What it heard, one picture for each recording: {BUILD.relative_to(DEMO.parent)}/*.png")
    if right < len(examples):
        raise SystemExit("An answer is wrong.")


if __name__ == "__main__":
    main()
