"""
How long audio takes from a file to `input_features`, beside what others take for the same, measured in turns in one
run. Prints a table and draws `benchmarks/sound.png`.

    python -m benchmarks.sound [--readme]
"""

import io
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import soundfile
import soxr
import torch
from transformers import AutoProcessor, AutoTokenizer, Qwen2AudioProcessor, WhisperFeatureExtractor
from transformers.audio_utils import load_audio

from audio_utils import fetch_audio, log_mel, resample, split_windows
from benchmarks.measure import in_turns, where
from benchmarks.report import report
from demo.bases import ASSETS, make_qwen2_vl, make_whisper
from publishing import paths
from publishing.build import build
from tests.sounds import encode


matplotlib.use("Agg")
from matplotlib import pyplot


PLOT = paths.ROOT / "benchmarks" / "sound.png"
RATE = 16_000  # Hz


class Table:
    def __init__(self):
        self.lines = ["| what | here | beside | times as fast |", "|---|---|---|---|"]

    def add(self, what: str, ours: float, theirs: float | None = None, peer: str = ""):
        beside, ratio = ("", "") if theirs is None else (f"{theirs * 1e3:.2f} ms, {peer}", f"{theirs / ours:.1f}")
        self.lines.append(f"| {what} | {ours * 1e3:.2f} ms | {beside} | {ratio} |")


def libsndfile(content: bytes) -> np.ndarray:
    samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(axis=1), rate, RATE)


def bench_decoding(table: Table, speech: np.ndarray):
    for name, layout, what in (
        ("s16.wav", "mono", "wav, 16 kHz"),
        ("s24.wav", "stereo", "wav, 24 bit, 44.1 kHz stereo"),
        ("s24.flac", "stereo", "flac, 96 kHz stereo"),
        ("clip.mp3", "stereo", "mp3, 44.1 kHz stereo"),
        ("opus.ogg", "mono", "ogg opus, 48 kHz"),
        ("aac.m4a", "stereo", "m4a, 44.1 kHz stereo"),
        ("opus.webm", "mono", "webm opus, 48 kHz"),
    ):
        content = encode(speech, name, layout)
        if name.endswith(("m4a", "webm")):  # libsndfile reads neither
            table.add(f"`fetch_audio`, 30 s of {what}", *in_turns(lambda content=content: fetch_audio(content)))
        else:
            times = in_turns(lambda content=content: fetch_audio(content), lambda content=content: libsndfile(content))
            table.add(f"`fetch_audio`, 30 s of {what}", *times, "soundfile + soxr")


def bench_resampling(table: Table, speech: np.ndarray):
    for rate in (8_000, 44_100, 48_000):
        samples = soxr.resample(speech, RATE, rate)
        tensor = torch.from_numpy(samples)
        times = in_turns(
            lambda tensor=tensor, rate=rate: resample(tensor, rate, RATE),
            lambda samples=samples, rate=rate: soxr.resample(samples, rate, RATE),
        )
        table.add(f"resample 30 s of {rate / 1000:g} kHz", *times, "soxr")


def bench_log_mel(table: Table, extractor: WhisperFeatureExtractor, speech: np.ndarray, clips: list[np.ndarray]):
    def ours(batch):
        windows = [window for clip in batch for window in split_windows(torch.from_numpy(clip), extractor)]
        return log_mel(windows, extractor)

    def theirs(batch):
        return extractor(batch, sampling_rate=RATE, return_tensors="pt")["input_features"]

    curve = []
    for what, batch in [(f"{s} s", [speech[: s * RATE]]) for s in (1, 2, 5, 10, 20, 30)] + [("32 clips", clips)]:
        times = in_turns(lambda batch=batch: ours(batch), lambda batch=batch: theirs(batch))
        difference = float((ours(batch) - theirs(batch)).abs().max())
        table.add(f"log-mel of {what} (difference {difference:.0e})", *times, "WhisperFeatureExtractor")
        curve.append((sum(map(len, batch)) / RATE, *times))
    return curve[:-1]


def bench_processor(table: Table, extractor, speech: np.ndarray, clips: list[np.ndarray]):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        repo = build(make_qwen2_vl(folder / "base"), make_whisper(folder / "whisper"), folder / "repo")
        processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(ASSETS / "qwen2-vl-7b")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]})
    qwen2_audio = Qwen2AudioProcessor(extractor, tokenizer)

    def ours(batch):
        return processor(text=["<|audio_pad|>What?"] * len(batch), audio=batch, padding=True, return_tensors="pt")

    def theirs(batch):
        batch = [load_audio(clip, RATE) if isinstance(clip, str) else clip for clip in batch]
        text = ["<|audio_bos|><|AUDIO|><|audio_eos|>What?"] * len(batch)
        return qwen2_audio(text=text, audio=batch, sampling_rate=RATE, padding=True, return_tensors="pt")

    recordings = [str(ASSETS / "audio" / name) for name in ("jfk.wav", "jfk.mp3", "english.wav")]
    for what, batch in (
        ("a clip of 1 s", [speech[:RATE]]),
        ("a clip of 5 s", [speech[: 5 * RATE]]),
        ("a clip of 30 s", [speech]),
        ("32 clips", clips),
        ("3 files (wav, mp3, 44.1 kHz wav)", recordings),
    ):
        times = in_turns(lambda batch=batch: ours(batch), lambda batch=batch: theirs(batch))
        table.add(f"whole processor, {what}", *times, "Qwen2AudioProcessor")


def bench_device(table: Table, extractor, speech: np.ndarray):
    """From samples on the host to `input_features` on the accelerator, beside the same on the CPU."""
    device = torch.accelerator.current_accelerator()
    clips = [(soxr.resample(speech, RATE, 44_100), 44_100)] * 32

    def features(device):
        log_mel([fetch_audio(clip, RATE, device) for clip in clips], extractor)
        torch.accelerator.synchronize()

    times = in_turns(lambda: features(device), lambda: features("cpu"), seconds=10)
    speed = 32 * 30 / times[0]
    what = f"32 clips of 30 s, 44.1 kHz, on {device.type}: {speed:,.0f} s of sound a second"
    table.add(what, *times, "CPU")


def draw(curve):
    lengths, ours, theirs = zip(*curve, strict=True)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.plot(lengths, [1e3 * t for t in theirs], "o--", color="0.5", label="WhisperFeatureExtractor")
    axes.plot(lengths, [1e3 * t for t in ours], "o-", color="tab:blue", label="audio_utils.log_mel")
    axes.set(xlabel="seconds of sound", ylabel="milliseconds", title="Log-mel at the cost of the sound", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(PLOT, dpi=120)


def measure(_) -> str:
    speech = np.resize(fetch_audio(ASSETS / "audio" / "jfk.wav").numpy(), 30 * RATE)
    lengths = np.random.default_rng(0).integers(RATE // 2, 30 * RATE, 32)
    clips = [speech[:length] for length in lengths]  # 0.5 to 30 s
    extractor = WhisperFeatureExtractor(feature_size=128)

    table = Table()
    # First, as the peer is up to 1.7 times as fast once large arrays have grown the allocator's pool.
    curve = bench_log_mel(table, extractor, speech, clips)
    bench_decoding(table, speech)
    bench_resampling(table, speech)
    bench_processor(table, extractor, speech, clips)
    if torch.accelerator.is_available():
        bench_device(table, extractor, speech)
    draw(curve)

    note = f"{where()}; `32 clips` are of 0.5 to 30 s, {sum(lengths) / RATE:.0f} s in all."
    return "\n".join([*table.lines, "", note])


if __name__ == "__main__":
    report(__file__, __doc__, measure)
