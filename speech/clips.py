"""
Makes clips of synthetic speech with their texts, to train on: sentences -> synthesizers -> speakers, rooms, noise.

A folder of clips has `clips/NNNNNN.flac` (16 kHz, mono, 0.3 to 10 s, or to 20 s with longer texts) and `rows.jsonl`,
one object a line:

    {"audio": "clips/000123.flac", "text": "He left.", "seconds": 1.3, "engine": "piper", "voice": "joe",
     "source": "wordnet"}

The text "" marks clips without speech. Texts and voices follow from the seed; the audio of piper and of changed
speakers varies from run to run. It needs Debian's espeak-ng, flite, festival, festvox-kallpc16k, festvox-kdlpc16k,
festvox-us-slt-hts, wordnet-base, fortunes and scowl, and `demo/requirements.txt`. It uses no recording of a person.
"""

import json
import multiprocessing
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from audio_utils import SAMPLING_RATE
from demo.ask import read_rows, write_rows
from demo.clips import augment_samples
from demo.world import HELD_OUT_VOICES, TRAINING_VOICES, Speech, espeak_variants, pick, say
from evaluation.generate import write_sound
from speech.sentences import MIXES, Text, deal, read_excluded
from speech.sounds import SOUNDS, make_sound


# How often each synthesizer speaks in training, and held out, where the voices are others.
ENGINES = {"piper": 32, "flite": 26, "pico": 18, "festival": 14, "espeak-ng": 10}
HELD_OUT_ENGINES = {"flite": 50, "festival": 30, "espeak-ng": 20}
NOTHING = 0.04  # part of the clips without speech
OTHER_SPEAKER = 0.35  # part of the clips whose speaker Praat changes
PADDED = 0.3  # part of the clips with silence or room noise before and behind the words
SHORTEST = 0.3  # seconds
FASTEST = 32  # characters a second; a clip that is faster has lost words
CHUNK = 500  # clips of one job
GROUP = 8  # clips that are augmented together, padded to the longest


def cast(text: str, rng: random.Random, variants: list[str], held_out: bool) -> Speech:
    """Chooses the voice of a text, its pace and pitch, and perhaps another speaker's formants."""
    engine = pick(HELD_OUT_ENGINES if held_out else ENGINES, rng)
    if engine == "espeak-ng":
        accent = HELD_OUT_VOICES["accent"] if held_out else rng.choice(TRAINING_VOICES["accents"])
        voice = f"{accent}+{rng.choice(variants)}"
    else:
        voice = rng.choice((HELD_OUT_VOICES if held_out else TRAINING_VOICES)["voices"][engine])
    speech = Speech(text, engine, voice, round(rng.uniform(0.85, 1.2), 2), rng.randint(15, 85))
    is_changed = engine != "espeak-ng" and not held_out and rng.random() < OTHER_SPEAKER
    return speech.by_other_speaker(rng) if is_changed else speech


def is_whole(clip: torch.Tensor, text: str, longest: float) -> bool:
    """Whether a clip is not silent, long enough for its text, and at most `longest` seconds long."""
    seconds = len(clip) / SAMPLING_RATE
    return seconds > SHORTEST and len(text) / FASTEST <= seconds <= longest and clip.abs().max() > 0.01


def pad(clip: torch.Tensor, rng: random.Random, longest: float) -> torch.Tensor:
    """Adds up to a second of silence before and behind, to at most `longest` seconds."""
    left = int(longest * SAMPLING_RATE) - len(clip)
    before = min(left, round(rng.random() * SAMPLING_RATE))
    return F.pad(clip, (before, min(left - before, round(rng.random() * SAMPLING_RATE))))


def augment(clips: list[torch.Tensor], rng: random.Random) -> list[torch.Tensor]:
    """Adds rooms, channels and noise to three quarters of the groups of clips; the peak of each is 0.1 to 0.95."""
    order = sorted(range(len(clips)), key=lambda number: len(clips[number]))
    changed = list(clips)
    for group in (order[start : start + GROUP] for start in range(0, len(order), GROUP)):
        rough = 0 if rng.random() < 0.25 else rng.uniform(0.2, 0.9)
        length = len(clips[group[-1]])
        rows = torch.stack([F.pad(clips[number], (0, length - len(clips[number]))) for number in group])
        if rough:
            rows = augment_samples(rows, rough)
        else:
            rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=1e-3)
            rows *= torch.tensor([rng.uniform(0.1, 0.95) for _ in group]).unsqueeze(1)
        for number, row in zip(group, rows, strict=True):
            changed[number] = row[: len(clips[number])]
    return changed


def make_clips(
    texts: list[Text], seed: str, held_out: bool = False, longest: float = 10.0
) -> list[tuple[np.ndarray, dict] | None]:
    """
    Makes a clip of at most `longest` seconds for each text: float32 `[samples]` at 16 kHz and its row without `audio`,
    or None where no clip could be made. Held-out clips have other voices, and all have speech.
    """
    rng = random.Random(seed)
    noises = np.random.default_rng(list(seed.encode()))
    torch.manual_seed(rng.getrandbits(32))
    variants = espeak_variants(held_out)
    clips, speeches = [None] * len(texts), {}
    for number, (text, _) in enumerate(texts):
        if not held_out and rng.random() < NOTHING:
            sound = rng.choice(SOUNDS)
            row = {"text": "", "engine": "none", "voice": sound, "source": "nothing said"}
            clips[number] = (make_sound(sound, noises), row)
        else:
            speeches[number] = cast(text, rng, variants, held_out)
    synthesized = zip(speeches, say(list(speeches.values()), allow_missing=True), strict=True)
    spoken = {number: clip for number, clip in synthesized if is_whole(clip, speeches[number].text, longest)}
    padded = [pad(clip, rng, longest) if rng.random() < PADDED else clip for clip in spoken.values()]
    for number, clip in zip(spoken, augment(padded, rng), strict=True):
        text, source = texts[number]
        row = {"text": text, "engine": speeches[number].engine, "voice": speeches[number].voice, "source": source}
        clips[number] = (clip.numpy(), row)
    return clips


def write_chunk(folder: Path, number: int, texts: list[Text], seed: int, held_out: bool, longest: float) -> int:
    """Writes the clips of a chunk, then its rows; returns how many there are."""
    torch.set_num_threads(1)
    rows = []
    for offset, clip in enumerate(make_clips(texts, f"{seed} {number}", held_out, longest)):
        if clip is not None:
            samples, row = clip
            audio = f"clips/{number * CHUNK + offset:06}.flac"
            write_sound(samples, str(folder / audio), "flac", "flac")
            seconds = round(len(samples) / SAMPLING_RATE, 2)
            rows.append({"audio": audio, "text": row.pop("text"), "seconds": seconds, **row})
    return len(write_rows(rows_of(folder, number, len(texts)), rows))


def rows_of(folder: Path, number: int, size: int) -> Path:
    """The rows of a chunk of `size` texts; the last chunk may be larger in the next run."""
    return folder / "chunks" / f"{number:04}-{size}.jsonl"


def write_clips(
    folder: Path, count: int, seed: int, held_out: bool = False, exclude: Path | None = None, mix: str = "rare"
):
    """
    Writes clips and rows.jsonl into a folder, in chunks, and prints a line after each. Run again after an interruption
    it goes on; with a larger count it adds to what is there. `exclude` is a file of texts that are never said, see
    [`read_excluded`], and `mix` a name from `MIXES`. Raises a ValueError if the folder holds clips of another seed or
    of other texts.
    """
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    settings = {"seed": seed, "held_out": held_out, "exclude": str(exclude and exclude.name), "mix": mix}
    path = folder / "settings.json"
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise ValueError(f"{folder} holds clips of {path.read_text()}, not of {settings}. Give another folder.")
    path.write_text(json.dumps(settings))
    texts = deal(count, seed, held_out, read_excluded(exclude) if exclude else (), mix)
    chunks = {number: texts[number * CHUNK : (number + 1) * CHUNK] for number in range(-(-count // CHUNK))}
    start, written = time.monotonic(), 0
    # Processes are spawned, because threads of torch do not survive a fork.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        jobs = {
            number: pool.submit(write_chunk, folder, number, chunk, seed, held_out, MIXES[mix].seconds)
            for number, chunk in chunks.items()
            if not rows_of(folder, number, len(chunk)).exists()
        }
        for number, job in jobs.items():
            written += job.result()
            rate = written / (time.monotonic() - start)
            print(f"chunk {number + 1} of {len(chunks)}: {written} clips, {rate:.1f} a second", flush=True)
    rows = [row for number, chunk in chunks.items() for row in read_rows(rows_of(folder, number, len(chunk)))]
    write_rows(folder / "rows.jsonl", rows)
