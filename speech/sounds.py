"""Makes sounds without speech: silence, noise, hum, tones, beeps and music."""

import numpy as np

from audio_utils import SAMPLING_RATE


KEYS = (697, 770, 852, 941, 1209, 1336, 1477)  # Hz; a beep joins one of the first four to one of the last three
SCALE = (0, 2, 4, 5, 7, 9, 11)  # semitones of a major scale
SOUNDS = ("silence", "white", "pink", "hum", "tone", "beeps", "music")


def make_sound(name: str, rng: np.random.Generator) -> np.ndarray:
    """Makes one of `SOUNDS`: float32 `[samples]` at 16 kHz, 1 to 8 s long, with a peak of at most 0.9."""
    size = round(rng.uniform(1, 8) * SAMPLING_RATE)
    if name == "silence":
        return (rng.choice([0, 1]) * rng.uniform(1e-4, 3e-3) * rng.standard_normal(size)).astype(np.float32)
    samples = {"white": noise, "pink": noise, "hum": hum, "tone": tone, "beeps": beeps, "music": music}[name](size, rng)
    if name == "pink":
        spectrum = np.fft.rfft(samples)
        samples = np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)).clip(20)), size)
    samples = samples + rng.uniform(0, 0.02) * np.abs(samples).max() * rng.standard_normal(size)
    return (samples / np.abs(samples).max() * rng.uniform(0.02, 0.9)).astype(np.float32)


def noise(size: int, rng: np.random.Generator) -> np.ndarray:
    slow = np.interp(np.arange(size), np.linspace(0, size, 6), rng.uniform(0.3, 1, 6))
    return rng.standard_normal(size) * slow


def sine(hertz: float, size: int) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(size) / SAMPLING_RATE)


def hum(size: int, rng: np.random.Generator) -> np.ndarray:
    mains = rng.choice([50, 60])
    return sum(rng.uniform(0, 1) / number * sine(mains * number, size) for number in range(1, 9))


def tone(size: int, rng: np.random.Generator) -> np.ndarray:
    hertz = 10 ** rng.uniform(2, 3.5)
    return sine(hertz, size) * (rng.random() < 0.5 or sine(rng.uniform(0.3, 3), size) > 0)


def beeps(size: int, rng: np.random.Generator) -> np.ndarray:
    samples, start = np.zeros(size), 0
    while start < size:
        length, pause = (round(rng.uniform(0.05, 0.4) * SAMPLING_RATE) for _ in range(2))
        part = samples[start : start + length]
        part += sine(rng.choice(KEYS[:4]), len(part)) + sine(rng.choice(KEYS[4:]), len(part))
        start += length + pause
    return samples


def music(size: int, rng: np.random.Generator) -> np.ndarray:
    """Makes chords of decaying notes with overtones, in one key."""
    samples, start = np.zeros(size), 0
    key = 110 * 2 ** (rng.uniform(0, 12) / 12)  # Hz
    beat, decay = round(rng.uniform(0.15, 0.6) * SAMPLING_RATE), rng.uniform(1, 8)
    while start < size:
        for step in rng.choice(21, rng.integers(1, 4), replace=False):
            hertz = key * 2 ** ((SCALE[step % 7] + 12 * (step // 7)) / 12)
            length = min(size - start, 4 * beat)
            fade = np.exp(-decay * np.arange(length) / SAMPLING_RATE) * np.minimum(1, np.arange(length) / 80)
            samples[start : start + length] += fade * sum(sine(hertz * n, length) / n**2 for n in (1, 2, 3))
        start += beat
    return samples
