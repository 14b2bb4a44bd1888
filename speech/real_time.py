"""
Measures how many times as fast as real time recordings are transcribed, beside Whisper base by the pipeline of
transformers and, if it is installed, by faster-whisper; and the memory of `transcribe.py` by the length of a recording.

    python -m speech.real_time [--minutes N] [--hours N] [--readme]

The recording is that of speech.long_form, and the peers have the parts of `make speech`. `--hours 1` also transcribes
recordings of 3 minutes and of that length in processes of their own, which takes half an hour for each hour.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, pipeline

from audio_utils import SAMPLING_RATE, fetch_audio
from benchmarks.measure import where
from benchmarks.report import report, table
from evaluation.generate import load
from publishing.paths import ROOT
from speech.long_form import PEAK, join_recordings, write_mp3
from speech.recordings import BUILD
from speech.run import REPO
from transcribe import transcribe


try:
    from faster_whisper import WhisperModel
except ImportError:
    WhisperModel = None

BATCH_SIZES = 1, 4, 8
DTYPES = "float32", "bfloat16"
SHORT = 3  # minutes of the recording whose memory is compared
TRANSCRIBING = f"""
import runpy
{PEAK}
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end
print(peak())
"""


def ours(path: str) -> Iterator[tuple[str, Callable]]:
    for dtype in DTYPES:
        loaded = load(REPO, dtype)
        for size in BATCH_SIZES:
            yield f"here, {dtype}, batch {size}", partial(transcribe_by, *loaded, path, size)


def transcribe_by(processor, model, path: str, batch_size: int) -> str:
    return transcribe(model, processor, path, batch_size=batch_size).text


def theirs(path: str) -> Iterator[tuple[str, Callable]]:
    recognizer = pipeline("automatic-speech-recognition", str(BUILD / "whisper"), device="cpu", dtype=torch.float32)
    for size in BATCH_SIZES:
        name = f"Whisper base, pipeline of transformers, float32, batch {size}"
        yield name, partial(recognize, recognizer, path, size)
    if WhisperModel is not None:
        model = WhisperModel(str(make_ctranslate2(BUILD / "ctranslate2")), device="cpu", compute_type="float32")
        for beams in (1, 5):
            name = f"Whisper base, faster-whisper, float32, {beams} beam{'s' * (beams > 1)}"
            yield (
                name,
                lambda beams=beams: " ".join(
                    segment.text for segment in model.transcribe(path, language="en", beam_size=beams)[0]
                ),
            )


def recognize(recognizer, path: str, batch_size: int) -> str:
    settings = {"chunk_length_s": 30, "generate_kwargs": {"language": "en", "task": "transcribe"}}
    return recognizer(fetch_audio(path).numpy(), batch_size=batch_size, **settings)["text"]  # it reads files by ffmpeg


def make_ctranslate2(folder: Path) -> Path:
    """Returns a folder of the downloaded files of Whisper with the list of its words, which faster-whisper needs."""
    folder.mkdir(exist_ok=True)
    for source in (BUILD / "parts" / "whisper").iterdir():
        (folder / source.name).unlink(missing_ok=True)
        (folder / source.name).symlink_to(source.resolve())
    words = {index: word for word, index in AutoTokenizer.from_pretrained(BUILD / "whisper").get_vocab().items()}
    (folder / "vocabulary.json").write_text(json.dumps([words[index] for index in range(len(words))]))
    return folder


def measure_lengths(samples, hours: float) -> Iterator[tuple]:
    """Yields length, speed and peak memory of the command, for a short recording and a long one."""
    for minutes in (SHORT, 60 * hours):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recording.mp3"
            repeats = max(1, round(60 * minutes * SAMPLING_RATE / len(samples)))
            write_mp3(samples[: round(60 * minutes * SAMPLING_RATE)], path, repeats)
            command = [str(ROOT / "transcribe.py"), str(REPO), str(path), "--output-dir", folder, "--output-format"]
            command += ["json", "--dtype", "float32"]
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", TRANSCRIBING, *command], capture_output=True, text=True, check=True
            )
            seconds = time.perf_counter() - start
            length = json.loads((Path(folder) / "recording.json").read_text())["duration"]
            peak = float(done.stdout.splitlines()[-1])
            yield f"{length / 60:.1f} min", f"{length / seconds:.1f}", f"{peak:.0f} MB"


def main(minutes: float = 3.0, hours: float = 0.0) -> list[str]:
    samples = join_recordings(minutes).samples
    length, rows = len(samples) / SAMPLING_RATE, []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording.mp3"
        write_mp3(samples, path)
        for maker in (ours, theirs):
            for name, run in maker(str(path)):
                start = time.perf_counter()
                words = len(run().split())
                rows.append((name, f"{length / (time.perf_counter() - start):.1f}", words))
    parts = [table(["transcribed by", "times real time", "words"], rows), f"{where()}; {length / 60:.1f} minutes."]
    if hours:
        parts.append(table(["`transcribe.py`", "times real time", "peak memory"], measure_lengths(samples, hours)))
    return parts


if __name__ == "__main__":
    report(__file__, __doc__, main, ROOT / "speech" / "README.md")
