"""
Times audio from a file to `input_features`, beside what others take for the same, in turns in one run.

    python -m benchmarks.sound [--readme]
"""

import io
import itertools
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from transformers import AutoProcessor, AutoTokenizer, Qwen2AudioProcessor, WhisperFeatureExtractor
from transformers.audio_utils import load_audio

from audio_utils import SAMPLING_RATE, fetch_all, fetch_audio, log_mel, resample, split_windows
from benchmarks.measure import in_turns, where
from benchmarks.report import report, table
from demo.bases import ASSETS, make_base, make_whisper
from publishing.build import build
from tests.sounds import encode


LENGTHS = (1, 2, 5, 10, 20, 30)  # seconds
FILES = (  # name in tests/sounds.py, channels, what it is
    ("s16.wav", "mono", "wav, 16 kHz"),
    ("s24.wav", "stereo", "wav, 24 bit, 44.1 kHz stereo"),
    ("s24.flac", "stereo", "flac, 96 kHz stereo"),
    ("clip.mp3", "stereo", "mp3, 44.1 kHz stereo"),
    ("opus.ogg", "mono", "ogg opus, 48 kHz"),
    ("aac.m4a", "stereo", "m4a, 44.1 kHz stereo"),
    ("opus.webm", "mono", "webm opus, 48 kHz"),
)


def make_speech() -> np.ndarray:
    """Returns 30 s of speech at 16 kHz: `[samples]`, float32."""
    return np.resize(fetch_audio(ASSETS / "audio" / "jfk.wav").numpy(), 30 * SAMPLING_RATE)


def read_by_soundfile(content: bytes) -> np.ndarray:
    """Does by soundfile and soxr what `fetch_audio` does: a file becomes mono samples at 16 kHz."""
    samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(axis=1), rate, SAMPLING_RATE)


def list_log_mel(extractor: WhisperFeatureExtractor, speech: np.ndarray, clips: list[np.ndarray]) -> Iterator[tuple]:
    """Yields what is measured, the peer, and the functions to time; the next three functions do the same."""

    def ours(batch):
        windows = [window for clip in batch for window in split_windows(torch.from_numpy(clip), extractor)]
        return log_mel(windows, extractor)

    def theirs(batch):
        return extractor(batch, sampling_rate=SAMPLING_RATE, return_tensors="pt")["input_features"]

    for what, batch in {**{f"{s} s": [speech[: s * SAMPLING_RATE]] for s in LENGTHS}, "32 clips": clips}.items():
        what += f" (difference {float((ours(batch) - theirs(batch)).abs().max()):.0e})"
        yield f"log-mel of {what}", "WhisperFeatureExtractor", partial(ours, batch), partial(theirs, batch)


def list_decoding(speech: np.ndarray) -> Iterator[tuple]:
    for name, layout, what in FILES:
        content = encode(speech, name, layout)
        peer = [] if name.endswith(("m4a", "webm")) else [partial(read_by_soundfile, content)]  # it reads neither
        yield f"`fetch_audio`, 30 s of {what}", "soundfile + soxr", partial(fetch_audio, content), *peer
    for name in ("clip.mp3", "s24.flac"):
        files = [encode(speech, name, "stereo")] * 32
        one_by_one = partial(fetch_one_by_one, files)
        yield (
            f"32 files of 30 s of {Path(name).suffix[1:]} at once",
            "one after another",
            partial(fetch_all, files),
            one_by_one,
        )


def fetch_one_by_one(files: list[bytes]) -> list[torch.Tensor]:
    return [fetch_audio(file) for file in files]


def list_resampling(speech: np.ndarray) -> Iterator[tuple]:
    for rate in (8_000, 44_100, 48_000):
        samples = soxr.resample(speech, SAMPLING_RATE, rate)
        ours = partial(resample, torch.from_numpy(samples), rate, SAMPLING_RATE)
        theirs = partial(soxr.resample, samples, rate, SAMPLING_RATE)
        yield f"resample 30 s of {rate / 1000:g} kHz", "soxr", ours, theirs


def list_processors(extractor, speech: np.ndarray, clips: list[np.ndarray]) -> Iterator[tuple]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repo = build(make_base(folder / "base"), make_whisper(folder / "whisper"), folder / "repo")
        processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "qwen2-vl-7b")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]})
    qwen2_audio = Qwen2AudioProcessor(extractor, tokenizer)

    def ours(batch):
        return processor(text=["<|audio_pad|>What?"] * len(batch), audio=batch, padding=True, return_tensors="pt")

    def theirs(batch):
        batch = [load_audio(clip, SAMPLING_RATE) if isinstance(clip, str) else clip for clip in batch]
        text = ["<|audio_bos|><|AUDIO|><|audio_eos|>What?"] * len(batch)
        return qwen2_audio(text=text, audio=batch, sampling_rate=SAMPLING_RATE, padding=True, return_tensors="pt")

    recordings = [str(ASSETS / "audio" / name) for name in ("jfk.wav", "jfk.mp3", "english.wav")]
    batches = {f"a clip of {seconds} s": [speech[: seconds * SAMPLING_RATE]] for seconds in (1, 5, 30)}
    batches |= {"32 clips": clips, "3 files (wav, mp3, 44.1 kHz wav)": recordings}
    for what, batch in batches.items():
        yield f"whole processor, {what}", "Qwen2AudioProcessor", partial(ours, batch), partial(theirs, batch)


def main() -> list[str]:
    speech, extractor = make_speech(), WhisperFeatureExtractor(feature_size=128)
    lengths = np.random.default_rng(0).integers(SAMPLING_RATE // 2, 30 * SAMPLING_RATE, 32)
    clips = [speech[:length] for length in lengths]  # 0.5 to 30 s
    rows = []
    for what, peer, *functions in itertools.chain(
        # Log-mel comes first, because its peer is up to 1.7 times as fast once large arrays were allocated.
        list_log_mel(extractor, speech, clips),
        list_decoding(speech),
        list_resampling(speech),
        list_processors(extractor, speech, clips),
    ):
        ours, *theirs = [1e3 * seconds for seconds in in_turns(*functions)]
        beside = [f"{theirs[0]:.2f} ms, {peer}", f"{theirs[0] / ours:.1f}"] if theirs else ["", ""]
        rows.append((what, f"{ours:.2f} ms", *beside))
    note = f"{where()}; `32 clips` are of 0.5 to 30 s, {sum(lengths) / SAMPLING_RATE:.0f} s in all."
    return [table(("what", "here", "beside", "times as fast"), rows), note]


if __name__ == "__main__":
    report(__file__, __doc__, main)
