"""
Writes the test data of the speech model, which it is never trained on: recordings of a person, clips without speech.

    python -m speech.recordings               recordings of telephone prompts, to build/speech/recordings
    python -m speech.recordings --silences    500 clips of noise and tones, to build/speech/silences

The recordings are Allison Smith's, in Debian's packages of Asterisk's sounds (CC-BY-SA-3.0). They are downloaded by
apt-get, which need not install them, and are not part of this repository.
"""

import argparse
import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from gzip import GzipFile
from pathlib import Path

import av
import numpy as np

from audio_utils import SAMPLING_RATE
from demo.ask import read_rows, write_rows
from evaluation.generate import write_sound
from publishing.paths import ROOT, sha256


BUILD = ROOT / "build" / "speech"
VERSION = "1.6.1-1"
PACKAGES = {  # sha256 of the package of this version, the same for all architectures
    "asterisk-core-sounds-en": "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    "asterisk-core-sounds-en-g722": "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
}
TEXTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"

LONGEST = 30  # seconds: one window of Whisper, which is asked beside the model
GROUPS = ("three or more words", "shorter")
# Errors in the texts; the recordings say the right words.
SPELLINGS = {"umute": "unmute", "represenatives": "representatives", "witheld": "withheld"}
SPELLINGS["Un-indentified"] = "Unidentified"

SILENCES = ("silence", "white noise", "pink noise", "tone", "hum", "chord")
SILENCE_SECONDS, SILENCE_DECIBELS = (1, 8), (-65, -12)  # length; root mean square relative to full scale


def rows_of(folder: str) -> Path:
    """Returns the rows of a folder of clips in build/speech."""
    return BUILD / folder / "rows.jsonl"


def short_prompts() -> list[dict]:
    """Reads the rows of the telephone prompts of 2 to 8 s, with the whole path of each clip."""
    source = rows_of("recordings")
    rows = [row for row in read_rows(source) if 2 < row["seconds"] < 8]
    return [{**row, "audio": str(source.parent / row["audio"])} for row in rows]


def fetch_packages(folder: Path) -> Path:
    """
    Downloads and unpacks the packages; returns the folder that holds their `usr`. Raises a RuntimeError if this is no
    Debian, if the version cannot be downloaded, or if a package has another checksum.
    """
    if missing := " and no ".join(tool for tool in ("apt-get", "dpkg-deb") if not shutil.which(tool)):
        advice = f"Run this on Debian, and copy {BUILD / 'recordings'} from there."
        raise RuntimeError(f"The recordings are in Debian's packages, and there is no {missing} here. {advice}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, expected in PACKAGES.items():
        package = folder / f"{name}_{VERSION}_all.deb"
        if not package.is_file():
            command = ["apt-get", "download", f"{name}={VERSION}"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed; try `apt-get update` first. {done.stderr.strip()}")
        if (checksum := sha256(package)) != expected:
            raise RuntimeError(f"{package} has sha256 {checksum}, expected {expected}. Remove it and try again.")
        if not (folder / (TEXTS if name == "asterisk-core-sounds-en" else SOUNDS)).exists():
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    return folder


def read_texts(text: str) -> dict[str, str]:
    """
    Reads lines "name: text" into a dict, with the spelling corrected and without "...", of which the normalizer of the
    leaderboards leaves a dot that counts as a word. Lines that begin with ";" are comments.
    """
    pairs = (line.partition(":")[::2] for line in text.splitlines() if ":" in line and not line.startswith(";"))
    words = {name: said.replace("...", " ").split() for name, said in pairs}
    return {name: " ".join(SPELLINGS.get(word, word) for word in said) for name, said in words.items()}


def reason_to_drop(name: str, text: str, seconds: float | None) -> str | None:
    """Returns why a recording is no fair test of transcription, else None. `seconds` is None if there is no file."""
    if seconds is None:
        return "has a text, but no file"
    if name.startswith(("digits/", "letters/", "phonetic/")):
        return "a digit, date, letter or sign alone: a piece that Asterisk joins to others"
    if re.search(r"[][()<>]", text):
        return "silence, a tone, or speech with a tone: the text has a description in brackets"
    if re.search(r"[*#]|\w\.\w", text):
        return "a sign that is read as a word: * may be star or asterisk, a dot within a word dot or point"
    if re.fullmatch(r"[A-Z ]+", text):
        return "an abbreviation alone, which may be spelled or read as a word"
    if seconds > LONGEST:
        return f"longer than {LONGEST} s: Whisper, which is asked beside the model, takes no more"
    return None


def decode_g722(path: Path) -> np.ndarray:
    """Decodes a file of raw G.722 to float32 `[samples]` in [-1, 1) at 16 kHz."""
    with av.open(str(path), format="g722") as file:  # the file has no header that tells the format
        pieces = [frame.to_ndarray()[0] for frame in file.decode(audio=0)]  # int16 (1, samples)
    return np.concatenate(pieces).astype(np.float32) / 2**15


def write_clips(folder: Path, clips: Iterable[tuple[str, np.ndarray, str, str]]) -> list[dict]:
    """Writes the files of clips (name, samples, text, group), then their `rows.jsonl`; returns the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, samples, text, group in clips:
        write_sound(samples, str(folder / f"{name}.flac"), "flac", "flac")
        seconds = round(len(samples) / SAMPLING_RATE, 3)
        rows.append({"audio": f"{name}.flac", "text": text, "group": group, "seconds": seconds})
    return write_rows(folder / "rows.jsonl", rows)


def write_recordings(output: Path) -> tuple[list[dict], Counter]:
    """
    Writes the recordings, and `rows.jsonl` (`audio`, `text`, `group`, `seconds`) in a fixed random order, so that the
    first rows are a sample of all. `texts.txt` has a line for each text and each of its sentences, which training
    leaves out. Returns the rows, and how many recordings were dropped for each reason. Raises what [`fetch_packages`]
    raises.
    """
    folder = fetch_packages(BUILD / "debian")
    with GzipFile(folder / TEXTS) as file:
        texts = read_texts(file.read().decode())
    clips, dropped = [], Counter()
    for name, text in sorted(texts.items()):
        path = folder / SOUNDS / f"{name}.g722"
        samples = decode_g722(path) if path.is_file() else None
        if reason := reason_to_drop(name, text, None if samples is None else len(samples) / SAMPLING_RATE):
            dropped[reason] += 1
        else:
            group = GROUPS[len(re.findall(r"\b[\w'-]+", text)) < 3]
            clips.append((name.replace("/", "-"), samples, text, group))
    random.Random(0).shuffle(clips)
    rows = write_clips(output, clips)
    sentences = {part for row in rows for part in [row["text"], *re.split(r"(?<=\w[.!?])\s+", row["text"])]}
    (output / "texts.txt").write_text("".join(f"{text}\n" for text in sorted(sentences)))
    return rows, dropped


def make_silence(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Makes a sound without speech: float32 `[size]` at 16 kHz."""
    time = np.arange(size) / SAMPLING_RATE  # seconds
    if name == "silence":
        return np.zeros(size, np.float32)
    if name in ("white noise", "pink noise"):
        sound = rng.standard_normal(size)
        if name == "pink noise":  # power falls with the frequency
            sound = np.fft.irfft(np.fft.rfft(sound) / np.sqrt(np.maximum(1, np.arange(size // 2 + 1))), size)
    else:
        if name == "hum":  # mains hum has overtones
            pitches = rng.choice([50, 60]) * np.arange(1, 9)
        else:
            pitches = rng.uniform(150, 2_500) * np.array([1] if name == "tone" else [1, 1.26, 1.5])
        sound = sum(rng.uniform(0.1, 1) * np.sin(2 * np.pi * (p * time + rng.random())) for p in pitches)
    level = 10 ** (rng.uniform(*SILENCE_DECIBELS) / 20)
    return (sound * level / np.sqrt(np.mean(sound**2))).clip(-1, 1).astype(np.float32)


def write_silences(output: Path, count: int = 500, seed: int = 7_719) -> list[dict]:
    """Writes clips of 1 to 8 s with an empty `text`, and returns their rows; the `group` is the kind of sound."""
    rng = np.random.default_rng(seed)
    kinds = [SILENCES[number % len(SILENCES)] for number in range(count)]
    sounds = (make_silence(kind, int(SAMPLING_RATE * rng.uniform(*SILENCE_SECONDS)), rng) for kind in kinds)
    names = (f"{number:03}" for number in range(count))
    return write_clips(output, zip(names, sounds, [""] * count, kinds, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silences", action="store_true", help="clips without speech instead of recordings")
    is_silent = parser.parse_args().silences
    output = BUILD / ("silences" if is_silent else "recordings")
    try:
        rows, dropped = (write_silences(output), {}) if is_silent else write_recordings(output)
    except RuntimeError as error:
        parser.exit(1, f"speech.recordings: {error}\n")
    minutes = sum(row["seconds"] for row in rows) / 60
    print(f"{output}: {len(rows)} clips, {minutes:.1f} minutes.")
    for group, number in Counter(row["group"] for row in rows).items():
        print(f"{number:5}  {group}")
    for reason, number in dropped.items():
        print(f"{number:5}  dropped: {reason}")


if __name__ == "__main__":
    main()
