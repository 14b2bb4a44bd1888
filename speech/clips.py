"""
Clips of synthetic speech with their texts, to train on: sentences -> synthesizers -> speakers, rooms, channels, noise.

    python -m speech.clips --count N --seed S --output DIR [--mix NAME] [--held-out] [--exclude FILE]

writes `DIR/clips/NNNNNN.flac` (16 kHz, mono, 0.3 to 10 s, or to 20 s with `--mix lengthy`) and `DIR/rows.jsonl`, one
object a line:

    {"audio": "clips/000123.flac", "text": "He left.", "seconds": 1.3, "engine": "piper", "voice": "joe",
     "source": "wordnet"}

Clips with the text "" hold sounds in which nothing is said. Run again after an interruption it goes on; with a larger
count it adds to what is there. Texts and voices follow from the seed; piper's voice varies from run to run. Needs
Debian's espeak-ng, flite, festival, festvox-kallpc16k, festvox-kdlpc16k, festvox-us-slt-hts, wordnet-base, fortunes and
scowl, and `demo/requirements.txt`. No recording of a person is used.
"""

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch.nn import functional as F

from audio_utils import fetch_audio
from demo.clips import augment_samples
from demo.world import (
    ACCENTS,
    HELD_OUT_ACCENT,
    HELD_OUT_VARIANTS,
    HELD_OUT_VOICES,
    VOICES,
    Speech,
    change_speaker,
    espeak_variants,
    write_speech,
)
from speech.sentences import MIXES, RARE, Text, deal, read_excluded
from speech.sounds import RATE, SOUNDS, make_sound


# How often each synthesizer speaks, in training and held out; the voices of the two differ.
ENGINES = {"piper": 32, "flite": 26, "pico": 18, "festival": 14, "espeak-ng": 10}
HELD_OUT_ENGINES = {"flite": 50, "festival": 30, "espeak-ng": 20}
NOTHING = 0.04  # part of the clips in which nothing is said
OTHER_SPEAKER = 0.35  # part of the clips whose speaker Praat changes
PADDED = 0.3  # part of the clips with silence or room noise before and behind the words
SHORTEST = 0.3  # seconds
FASTEST = 32  # characters a second; a clip that is faster has lost words
CHUNK = 500  # clips of one job
GROUP = 8  # clips that are augmented together, padded to the longest


def cast(text: str, rng: random.Random, variants: list[str], held_out: bool) -> Speech:
    """Chooses the voice of a text, its pace and pitch, and perhaps another speaker's formants."""
    engines = HELD_OUT_ENGINES if held_out else ENGINES
    engine = rng.choices(list(engines), engines.values())[0]
    if engine == "espeak-ng":
        voice = f"{HELD_OUT_ACCENT if held_out else rng.choice(ACCENTS)}+{rng.choice(variants)}"
    else:
        voice = rng.choice((HELD_OUT_VOICES if held_out else VOICES)[engine])
    speech = Speech(text, engine, voice, round(rng.uniform(0.85, 1.2), 2), rng.randint(15, 85))
    if engine != "espeak-ng" and not held_out and rng.random() < OTHER_SPEAKER:
        speech = speech._replace(formants=round(rng.uniform(0.84, 1.2), 2), hertz=rng.randint(75, 260))
    return speech


def is_whole(clip: torch.Tensor, text: str, longest: float) -> bool:
    """Whether samples are neither silent nor too short to say a text, nor longer than so many seconds."""
    seconds = len(clip) / RATE
    return max(SHORTEST, len(text) / FASTEST) <= seconds <= longest and clip.abs().max() > 0.01


def synthesize(speeches: list[Speech], longest: float) -> list[torch.Tensor | None]:
    """float32 `[samples]` at 16 kHz for each; None where a synthesizer failed or a clip has more seconds."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.wav" for number in range(len(speeches))]
        write_speech(speeches, paths)
        clips = [fetch_audio(path) if path.is_file() else torch.zeros(0) for path in paths]
    made = []
    for clip, speech in zip(clips, speeches, strict=True):
        clip = change_speaker(clip, speech) if len(clip) > SHORTEST * RATE else torch.zeros(1)
        made.append(clip if is_whole(clip, speech.text, longest) else None)
    return made


def pad(clip: torch.Tensor, rng: random.Random, longest: float) -> torch.Tensor:
    """With up to a second of silence before and behind, of so many seconds at most."""
    left = int(longest * RATE) - len(clip)
    before = min(left, round(rng.random() * RATE))
    return F.pad(clip, (before, min(left - before, round(rng.random() * RATE))))


def augment(clips: list[torch.Tensor], rng: random.Random) -> list[torch.Tensor]:
    """Puts clips into rooms, channels and noise, a quarter of them into none; the peak of each is 0.1 to 0.95."""
    order = sorted(range(len(clips)), key=lambda number: len(clips[number]))
    groups = [order[start : start + GROUP] for start in range(0, len(order), GROUP)]
    changed = list(clips)
    for group in groups:
        rough = 0 if rng.random() < 0.25 else rng.uniform(0.2, 0.9)
        lengths = [len(clips[number]) for number in group]
        rows = torch.stack([F.pad(clips[number], (0, max(lengths) - len(clips[number]))) for number in group])
        if rough:
            rows = augment_samples(rows, rough)
        else:
            rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=1e-3)
            rows *= torch.tensor([rng.uniform(0.1, 0.95) for _ in group]).unsqueeze(1)
        for number, row, length in zip(group, rows, lengths, strict=True):
            changed[number] = row[:length]
    return changed


def make_clips(
    texts: list[Text], seed: str, held_out: bool = False, longest: float = RARE.seconds
) -> list[tuple[np.ndarray, dict] | None]:
    """
    A clip for each text, and its row without `audio`. Held out is every voice, and something is said in each clip.

    Args:
        longest: Seconds of the longest clip.

    Returns:
        (float32 `[samples]` at 16 kHz, row) for each text, or None where no clip could be made.
    """
    rng = random.Random(seed)
    noises = np.random.default_rng(list(seed.encode()))
    torch.manual_seed(rng.getrandbits(32))
    variants = [name for name in espeak_variants() if (name in HELD_OUT_VARIANTS) == held_out]
    made, speeches, numbers = [None] * len(texts), [], []
    for number, (text, _) in enumerate(texts):
        if not held_out and rng.random() < NOTHING:
            kind = rng.choice(SOUNDS)
            row = {"text": "", "engine": "none", "voice": kind, "source": "nothing said"}
            made[number] = (make_sound(kind, noises), row)
        else:
            speeches.append(cast(text, rng, variants, held_out))
            numbers.append(number)
    clips = synthesize(speeches, longest)
    spoken = [index for index, clip in enumerate(clips) if clip is not None]
    padded = [pad(clips[index], rng, longest) if rng.random() < PADDED else clips[index] for index in spoken]
    for index, clip in zip(spoken, augment(padded, rng), strict=True):
        text, source = texts[numbers[index]]
        row = {"text": text, "engine": speeches[index].engine, "voice": speeches[index].voice, "source": source}
        made[numbers[index]] = (clip.numpy(), row)
    return made


def write_chunk(folder: Path, number: int, texts: list[Text], seed: int, held_out: bool, longest: float) -> int:
    """Writes the clips of a chunk, then its rows; returns how many there are."""
    torch.set_num_threads(1)
    rows = []
    for offset, clip in enumerate(make_clips(texts, f"{seed} {number}", held_out, longest)):
        if clip is None:
            continue
        samples, row = clip
        audio = f"clips/{number * CHUNK + offset:06}.flac"
        soundfile.write(folder / audio, samples, RATE, subtype="PCM_16")
        rows.append({"audio": audio, "text": row.pop("text"), "seconds": round(len(samples) / RATE, 2), **row})
    path = rows_of(folder, number, len(texts))
    path.with_suffix(".part").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    path.with_suffix(".part").replace(path)
    return len(rows)


def rows_of(folder: Path, number: int, size: int) -> Path:
    """The rows of a chunk that was made of so many texts; the last chunk may grow with the next run."""
    return folder / "chunks" / f"{number:04}-{size}.jsonl"


def write_clips(
    folder: Path,
    count: int,
    seed: int,
    held_out: bool,
    exclude: Path | None,
    workers: int,
    mix: str = "rare",
    report: Callable[[str], object] | None = None,
):
    """
    Writes clips and rows.jsonl into a folder, in chunks; `report` is called with a line after each. `mix` names one of
    `speech.sentences.MIXES`.

    Raises:
        ValueError: if the folder holds clips of another seed or of other texts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"seed": seed, "held_out": held_out, "exclude": str(exclude and exclude.name), "mix": mix}
    found = folder / "settings.json"
    if found.is_file() and json.loads(found.read_text()) != settings:
        raise ValueError(
            f"{folder} holds clips of {found.read_text()}; they cannot be mixed with {json.dumps(settings)}. "
            "Give another folder."
        )
    found.write_text(json.dumps(settings))
    for name in ("clips", "chunks"):
        (folder / name).mkdir(exist_ok=True)
    texts = deal(count, seed, held_out, read_excluded(exclude) if exclude else (), MIXES[mix])
    chunks = [texts[start : start + CHUNK] for start in range(0, count, CHUNK)]
    todo = [number for number in range(len(chunks)) if not rows_of(folder, number, len(chunks[number])).exists()]
    start, written = time.monotonic(), 0
    # Not forked: threads of torch do not survive that.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(write_chunk, folder, number, chunks[number], seed, held_out, MIXES[mix].seconds)
            for number in todo
        ]
        for number, job in zip(todo, jobs, strict=True):
            written += job.result()
            if report:
                rate = written / (time.monotonic() - start)
                report(f"chunk {number + 1} of {len(chunks)}: {written} clips, {rate:.1f} a second")
    rows = "".join(rows_of(folder, number, len(texts)).read_text("utf-8") for number, texts in enumerate(chunks))
    (folder / "rows.jsonl").write_text(rows, "utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, required=True, help="clips; those that are too long are then left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder of the clips")
    parser.add_argument("--mix", choices=MIXES, default="rare", help="rare words, plain texts, or longer ones")
    parser.add_argument("--held-out", action="store_true", help="texts and voices that training never has")
    parser.add_argument("--exclude", type=Path, help="file of texts that are never said, one a line")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    write_clips(args.output, args.count, args.seed, args.held_out, args.exclude, args.workers, args.mix, print)


if __name__ == "__main__":
    main()
