"""The clips that the demo checkpoint learns from. They are synthesized once, stored, and augmented at each draw."""

import math
import random

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from audio_utils import SAMPLING_RATE
from demo.world import PHRASES, QUESTIONS, SEEN, TRAINING_VOICES, cast, pick, say
from publishing.paths import ROOT


BUILD = ROOT / "build" / "world"
WINDOW = 3  # seconds; Whisper's own 30 would cost ten times as much


class Clips:
    """Synthesized clips by text. Each draw varies the place in the window, the pace, the room and the noise."""

    def __init__(self, name: str, texts: list[str], count: int, held_out: bool, seed: int):
        path = BUILD / f"{name}.safetensors"
        speeches = cast(texts, count, random.Random(seed), held_out)
        if not path.exists():
            samples = [(clip * 32767).short() for clip in say(speeches)]
            ends = torch.tensor([len(clip) for clip in samples]).cumsum(0)
            save_file({"samples": torch.cat(samples), "ends": ends}, path)
        stored = load_file(path)
        clips = stored["samples"].float().div(32768).tensor_split(stored["ends"][:-1])
        self.by_text = {text: {} for text in texts}
        for clip, speech in zip(clips, speeches, strict=True):
            self.by_text[speech.text].setdefault(speech.engine, []).append(clip)
        self.rng = random.Random(seed)

    def windows(
        self, texts: list[str], rough: float, num_windows: int = 1, is_trimmed: bool = False
    ) -> tuple[torch.Tensor, list[int]]:
        """
        Draws a clip of each text, by any voice: float32 `[texts, samples of the windows]`. Also returns the number of
        samples of each clip.

        Args:
            rough: How much a clip is changed, from 0 (as it was synthesized) to 1.
            num_windows: Windows of each clip.
            is_trimmed: Whether a clip ends somewhere behind its words, where zeros follow, or fills its windows.
        """
        rng, size = self.rng, num_windows * SAMPLING_RATE * WINDOW
        rows, lengths = torch.zeros(len(texts), size), []
        for row, text in zip(rows, texts, strict=True):
            engines = self.by_text[text]
            clip = rng.choice(engines[pick({engine: TRAINING_VOICES["draws"][engine] for engine in engines}, rng)])
            pace = max(1 + rng.uniform(-0.3, 0.35) * rough, len(clip) / size)
            at = np.arange(0, len(clip) - 1, pace)
            clip = torch.from_numpy(np.interp(at, np.arange(len(clip)), clip.numpy())).float()[:size]
            room = size - len(clip)
            start = rng.randint(0, round(min(8000, room) * (1 - rough) + room * rough))
            row[start : start + len(clip)] = clip * rng.uniform(0.2, 1) / clip.abs().max().clamp(min=1e-3)
            lengths.append(start + len(clip))
        rows = augment_samples(rows, rough) if rough else rows
        if not is_trimmed:
            return rows, [size] * len(texts)
        lengths = [length + round((size - length) * rough * rng.random() ** 4) for length in lengths]
        for row, length in zip(rows, lengths, strict=True):
            row[length:] = 0
        return rows, lengths


def augment_samples(rows: torch.Tensor, rough: float) -> torch.Tensor:
    """Adds a room to half of the rows, a channel to all, and noise to most: float32 `[clips, samples]` in and out."""
    count, size = rows.shape
    length = 2 ** math.ceil(math.log2(size + 4000))
    spectrum = torch.fft.rfft(rows, length)
    bands = F.interpolate(torch.randn(count, 1, 8) * 4 * rough, spectrum.shape[1], mode="linear")[:, 0]  # dB
    cut = torch.where(torch.rand(count, 1) < 0.3 * rough, torch.empty(count, 1).uniform_(0.4, 0.9), 1.0)
    frequency = torch.linspace(0, 1, spectrum.shape[1])
    spectrum = spectrum * 10 ** (bands / 20) * torch.sigmoid((cut - frequency) * 60)
    seconds = torch.arange(8000) / SAMPLING_RATE
    decay = torch.exp(-6.9 * seconds / torch.empty(count, 1).uniform_(0.1, 0.5))
    wet = torch.empty(count, 1).uniform_(0, 0.08) * (torch.rand(count, 1) < 0.5 * rough)
    room = torch.randn(count, 8000) * decay * wet
    room[:, 0] = 1
    rows = torch.fft.irfft(spectrum * torch.fft.rfft(room, length), length)[:, :size]
    colour = frequency.clamp(min=0.01) ** -torch.empty(count, 1).uniform_(0, 1)
    noise = torch.fft.irfft(torch.fft.rfft(torch.randn(count, length)) * colour, length)[:, :size]
    babble = rows.roll(1, 0).roll(size // 3, 1) * (torch.rand(count, 1) < 0.15 * rough)
    level = rows.square().mean(1, keepdim=True).sqrt()
    for sound, low, high in ((noise, 40 - 34 * rough, 50), (babble, 12, 25)):
        ratio = torch.empty(count, 1).uniform_(low, high)
        rows = rows + sound * level / sound.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6) * 10 ** (-ratio / 20)
    return rows / rows.abs().amax(1, keepdim=True).clamp(min=1e-3) * torch.empty(count, 1).uniform_(0.1, 0.95)


def augment_features(features: torch.Tensor, rough: float) -> torch.Tensor:
    """Imitates other vocal tracts by a stretched mel axis, and masks as SpecAugment (https://arxiv.org/abs/1904.08779)."""
    count, bins, _ = features.shape
    stretch = 1 + torch.empty(count, 1).uniform_(-0.14, 0.16) * rough
    at = (torch.arange(bins) * stretch).clamp(max=bins - 1)
    low, part = at.long(), (at - at.long()).unsqueeze(-1)
    rows = torch.arange(count).unsqueeze(1)
    features = features[rows, low] * (1 - part) + features[rows, (low + 1).clamp(max=bins - 1)] * part
    for axis, widest in ((1, 20), (1, 20), (2, 25)):
        width = (torch.randint(widest, (count, 1)) * rough).long()
        start = torch.randint(features.shape[axis] - widest, (count, 1))
        place = torch.arange(features.shape[axis])
        mask = ((place >= start) & (place < start + width)).unsqueeze(3 - axis)
        features = features.masked_fill(mask, features.min())
    return features


def training_clips() -> Clips:
    return Clips("train", SEEN + QUESTIONS * 4, 14_000, held_out=False, seed=0)


def held_out_clips() -> Clips:
    return Clips("held-out", PHRASES + QUESTIONS, 1_000, held_out=True, seed=1)
