"""Content items -> samples at 16 kHz, mono -> windows -> log-mel, and pictures, without the model and the tokenizer."""

import contextlib
import functools
import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from numbers import Real

import av
import numpy as np
import torch
from PIL import Image
from transformers.utils import logging


try:
    from .audio_decoding import AT_ONCE, FULL_SCALE, MAX_SECONDS, AudioError, decode, decode_in_batch, decode_in_worker
    from .audio_download import MAX_BYTES, READ_LIMITS, TIMEOUT, describe, read
    from .content_items import find_source, normalize_conversations, take_audio
except ImportError:  # not part of a package: the tools beside this file import it by its bare name
    from audio_decoding import AT_ONCE, FULL_SCALE, MAX_SECONDS, AudioError, decode, decode_in_batch, decode_in_worker
    from audio_download import MAX_BYTES, READ_LIMITS, TIMEOUT, describe, read
    from content_items import find_source, normalize_conversations, take_audio

try:
    import torchaudio
except Exception:
    # Built for another torch or CUDA version it raises more than ImportError, and PyAV resamples as well.
    torchaudio = None

logger = logging.get_logger(__name__)

SAMPLING_RATE = 16_000  # Hz, Whisper's
MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz; beyond these a file's header is broken
SILENCE = (math.log10(1e-10) + 4.0) / 4.0  # log-mel of no power
BLOCK = 1000  # frames transformed at a time, so that the intermediate tensors stay in a core's cache
WINDOWS_AT_ONCE = {"cpu": 1}  # windows transformed together; an accelerator takes 32, because padding is cheap there
LEAST_BATCH = 8  # files for which it is worth to start processes
MAX_CHANNELS = 8  # 7.1 sound; a longer axis of a 2-D array is time
MAX_PEAK = 32.0  # full scale is 1.0; a float array beyond this holds unscaled integers
INTEGER_SCALE = {torch.uint8: FULL_SCALE["u1"], torch.int16: FULL_SCALE["i2"], torch.int32: FULL_SCALE["i4"]}
MAX_PHASES = 2**22  # torchaudio makes no larger filter for a pair of rates


def fetch_audio(
    ele,
    sr: int = SAMPLING_RATE,
    device: str | torch.device | None = None,
    *,
    sampling_rate: int | None = None,
    max_bytes: int = MAX_BYTES,
    max_seconds: float = MAX_SECONDS,
    timeout: float = TIMEOUT,
    public_only: bool = False,
    in_batch: bool = False,
) -> torch.Tensor:
    """
    Opens audio from anywhere.

    Args:
        ele: A path, `file://`, `http(s)://` or `data:` address, base64 text, bytes, a binary file object; samples as
            a numpy array or tensor, `[samples]`, `[channels, samples]` or `[samples, channels]`; samples with their
            rate, as a tuple (either order) or a dict of `array` and `sampling_rate`; a `datasets` dict of `bytes` and
            `path`, or its decoder object; a content item.
        sr (`int`, defaults to 16000): Sampling rate of the result, in Hz.
        device: Where the result lies, and where it is resampled if torchaudio imports. The default is the CPU, or
            the device of the tensor `ele`.
        sampling_rate (`int`, *optional*): Rate in Hz of samples that come without one. The default is `sr`: vLLM and
            transformers' `apply_chat_template` pass 16 kHz samples without their rate.
        max_bytes (`int`, defaults to 2**28): Limit of all sources except local files and samples.
        max_seconds (`float`, defaults to 3600): Limit of the audio; decoding stops there, however small the file. It
            is proportionally less for rates above 48 kHz, so that it limits memory as well: 192 KB a second.
        timeout (`float`, defaults to 30): Seconds for a whole download, redirects included; with `public_only` for
            download, wait and decoding together. The look-up of a name has the system's own limit.
        public_only (`bool`, defaults to `False`): For servers with untrusted requests: refuses local paths, `file://`,
            and addresses that are not public, also after a redirect, and decodes files in processes of limited memory
            (64 MiB, on Linux) and time (8 s, or a hundredth of `max_seconds` if that is more), at most six at once. On
            Windows they are decoded without these limits.
        in_batch (`bool`, defaults to `False`): For calls from several threads: decodes files with short frames, such as
            MP3, in processes, at most eight at once. In threads these would wait for Python's lock.

    Returns:
        float32 `[samples]` in [-1, 1], the mean of all channels. What overshoots is clipped, as by Whisper's own
        loader; only samples that are handed over as floats beyond [-1, 1] are kept as they are.

    Raises:
        AudioError: a `ValueError`, if the source is missing, unreadable, empty, ambiguous, not finite, past a limit.
    """
    deadline = time.monotonic() + timeout
    source, rate = unwrap(ele)
    name, is_file = describe(source), not isinstance(source, (np.ndarray, torch.Tensor))
    if is_file:
        file = read(source, max_bytes, timeout, public_only)
        if public_only:
            array, rate = decode_in_worker(file, name, max_seconds, deadline)
        elif in_batch:
            array, rate = decode_in_batch(file, name, max_seconds)
        else:
            array, rate = decode(file, name, max_seconds)
        samples, rate = torch.from_numpy(array), check_rate(rate)
    else:
        rate = check_rate(next(known_rate for known_rate in (rate, sampling_rate, sr) if known_rate is not None))
        seconds = max(source.shape, default=0) / rate
        if seconds > max_seconds:  # before anything is copied
            raise AudioError(f"{name} lasts {seconds:.0f} s, past the limit of {max_seconds:g} s.")
        samples = to_mono(source)
    peak = check_peak(samples, name)
    resampled = resample(samples, rate, sr, samples.device if device is None else device)
    if not resampled.numel():
        raise AudioError(f"{name} is too short: {samples.numel()} samples at {rate} Hz are none at {sr} Hz.")
    # Lossy codecs and the resampler's filter overshoot full scale; only floats that were beyond it before stay so.
    bound = 1.0 if is_file else max(1.0, peak)
    return resampled.clamp(-bound, bound)


def check_peak(samples: torch.Tensor, name: str) -> float:
    """Returns the largest absolute value. Raises AudioError if there are no samples, or if full scale cannot be 1.0."""
    if not samples.numel():
        raise AudioError(f"{name} holds no samples.")
    least, largest = samples.aminmax()  # without a copy, which would be an hour's largest piece of memory
    peak = float(max(-least, largest))
    if not math.isfinite(peak):
        raise AudioError(f"{name} holds samples that are not finite (NaN or infinity).")
    if peak > MAX_PEAK:
        raise AudioError(
            f"{name} has a peak of {peak:g}, but full scale is 1.0: integer samples stored as floats have to be "
            "divided by their own full scale first (32768 for 16 bit)."
        )
    return peak


def open_item(
    item: dict, sampling_rate: int = SAMPLING_RATE, *, formats: tuple[str, ...] | None = None, **limits
) -> dict:
    """
    Opens a content item that `content_items.normalize_conversations` returned.

    Args:
        formats: Pillow's names of the formats that a picture may have. The default is all.
        limits: As in [`fetch_audio`]; those of a file hold for a picture as well.

    Returns:
        The item with float32 `[samples]` at the sampling rate under `audio`, or with a PIL image, of
        which only the header was read, under `image`. Other items are returned as they are.

    Raises:
        ValueError: if the source is missing, unreadable or past a limit.
    """
    if item["type"] == "audio":
        return {"type": "audio", "audio": fetch_audio(item, sampling_rate, **limits)}
    source = item.get("image")
    if item["type"] != "image" or isinstance(source, Image.Image):
        return item
    if not isinstance(source, (str, bytes)):
        description = "nothing" if source is None else f"a {type(source).__name__}"
        raise ValueError(f"A picture must be an address, base64 or bytes, got {description}.")
    file = read(source, **{name: limits[name] for name in READ_LIMITS if name in limits})
    try:
        return {"type": "image", "image": Image.open(file, formats=formats)}
    except Exception as error:  # Pillow's parsers raise many types on broken files
        if formats is None:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        raise ValueError(f"A picture must be one of {', '.join(formats)}; this content is not.") from error


def process_audio_info(
    conversations, sr: int = SAMPLING_RATE, device=None, *, load_audio_from_video: bool = False, **limits
) -> list[torch.Tensor] | None:
    """
    Opens the audio of a conversation, or of a list of them, as `qwen_vl_utils.process_vision_info` opens pictures.

    Args:
        conversations: As in [`normalize_conversations`].
        sr, device, limits: As in [`fetch_audio`].
        load_audio_from_video (`bool`, defaults to `False`): Whether the audio track of each video follows it.

    Returns:
        float32 `[samples]` of each clip, in reading order; None if there are none.
    """
    normalized, _ = normalize_conversations(conversations)
    clips = [clip for messages in normalized for clip in take_audio(messages, load_audio_from_video)[1]]
    return fetch_all(clips, sr, device, **limits) or None


def fetch_all(clips: list, sr: int = SAMPLING_RATE, device=None, **limits) -> list[torch.Tensor]:
    """
    Opens clips as [`fetch_audio`] does, files in parallel threads, many files in processes as well. Raises what the
    first clip raises that cannot be opened.
    """
    num_threads = min(AT_ONCE, os.cpu_count() or 1)
    in_batch = num_threads > 1 and sum(map(is_plain, clips)) >= LEAST_BATCH
    open_one = functools.partial(fetch_audio, sr=sr, device=device, in_batch=in_batch, **limits)
    pool = ThreadPoolExecutor(num_threads)
    try:
        # Two items may share an object with a state, such as an open file, so these are read one after another.
        opened = [None] * len(clips)
        with contextlib.suppress(RuntimeError):  # after the end of the main thread no others can start
            opened = [pool.submit(open_one, clip) if is_plain(clip) and len(clips) > 1 else None for clip in clips]
        return [future.result() if future else open_one(clip) for future, clip in zip(opened, clips, strict=True)]
    finally:
        pool.shutdown(cancel_futures=True)


def is_plain(ele) -> bool:
    """Whether a clip is text, bytes or a path, or a dict of such values."""
    if isinstance(ele, dict):
        return all(map(is_plain, ele.values()))
    return ele is None or isinstance(ele, (str, bytes, os.PathLike, Real))


def unwrap(ele) -> tuple:
    """
    Takes the source (address, bytes, file object, array or tensor) and the sampling rate that comes with it, or None,
    out of the dicts, tuples and decoders of `datasets`, OpenAI and transformers.
    """
    if isinstance(ele, dict):
        inner, rate = find_source(ele, "audio", is_needed=True)
        source, own_rate = unwrap(inner)
        if isinstance(source, list):
            try:
                source = np.asarray(source)
            except ValueError as error:
                raise AudioError(f"A list of samples must be numbers, or channels of one length: {error}") from error
        return source, rate if own_rate is None else own_rate
    if isinstance(ele, tuple) and len(ele) == 2:
        for samples, rate in (ele, ele[::-1]):
            if isinstance(samples, (np.ndarray, torch.Tensor)) and isinstance(rate, Real):
                return samples, rate
    if hasattr(ele, "get_all_samples"):  # `datasets`' own decoder, torchcodec's AudioDecoder
        decoded = ele.get_all_samples()
        return decoded.data, decoded.sample_rate
    return ele, None


def to_mono(samples: np.ndarray | torch.Tensor) -> torch.Tensor:
    """
    `[samples]`, `[channels, samples]` or `[samples, channels]`, of float, int16, int32 or uint8 -> float32 `[samples]`.
    Integers are scaled to [-1, 1), and the channels, which are the axis of at most 8, averaged.
    """
    name, shape = describe(samples), samples.shape
    if len(shape) not in (1, 2):
        raise AudioError(f"{name} is not audio: expected [samples], [channels, samples] or [samples, channels].")
    channel_axes = [axis for axis in (0, 1) if len(shape) == 2 and shape[axis] == 1]
    channel_axes = channel_axes or [axis for axis in (0, 1) if len(shape) == 2 and shape[axis] <= MAX_CHANNELS]
    if len(shape) == 2 and len(channel_axes) != 1 and shape != (1, 1):
        raise AudioError(
            f"{name} could be [channels, samples] or [samples, channels], or is neither: exactly one axis has to "
            f"be the channels, at most {MAX_CHANNELS}. Give mono samples instead."
        )
    if np.ma.is_masked(samples):
        raise AudioError(f"{name} has masked samples; fill them first, such as with `samples.filled(0)`.")
    if isinstance(samples, np.ndarray) and samples.dtype.kind in "fiu":
        # A copy in native byte order: torch reads neither foreign bytes nor negative strides nor long doubles.
        dtype = np.float64 if samples.dtype == np.longdouble else samples.dtype.newbyteorder("=")
        samples = torch.from_numpy(np.array(samples, dtype=dtype, order="C"))
    if not (isinstance(samples, torch.Tensor) and (samples.is_floating_point() or samples.dtype in INTEGER_SCALE)):
        raise AudioError(f"{name} is not audio: expected float, int16, int32 or uint8 samples.")
    samples = samples.detach()
    if samples.dtype in INTEGER_SCALE:
        zero, scale = INTEGER_SCALE[samples.dtype]
        samples = (samples.to(torch.float32) - zero) / scale  # exact except that an int32 is rounded once
    samples = samples.to(torch.float32)
    return samples.mean(channel_axes[0]) if channel_axes else samples


def check_rate(rate) -> int:
    if not (isinstance(rate, Real) and MIN_RATE <= rate <= MAX_RATE and int(rate) == rate):
        raise AudioError(
            f"A sampling rate must be a whole number of Hz from {MIN_RATE} to {MAX_RATE}, got {rate!r:.40}."
        )
    return int(rate)


def resample(samples: torch.Tensor, rate: int, sr: int, device: str | torch.device = "cpu") -> torch.Tensor:
    """
    Resamples float32 `[samples]` from `rate` to `sr` Hz, and moves them to `device`: with torchaudio if that is an
    accelerator, else with FFmpeg's libswresample on the CPU. Both convolve with the same filter.
    """
    device = torch.device(device)
    if rate == sr:
        return samples.to(device)
    common = math.gcd(rate, sr)
    # torchaudio keeps its filter once for every phase: 0.3 MB for 44,100 Hz, but 3 GB for 47,999.
    if device.type != "cpu" and rate * sr // common**2 <= MAX_PHASES:
        if torchaudio is not None:
            length = (2 * len(samples) * sr + rate) // (2 * rate)  # rounded
            return torchaudio_resampler(rate, sr, device)(samples.to(device))[:length]
        logger.warning_once("torchaudio does not import: PyAV resamples the audio for the accelerator on the CPU.")
    return torch.cat(list(resample_pieces(samples.cpu().split(2**16), rate, sr))).to(device)


def resample_pieces(pieces: Iterable[torch.Tensor], rate: int, sr: int) -> Iterator[torch.Tensor]:
    """
    Resamples a clip that comes in pieces, float32 `[samples]` each, with FFmpeg's libswresample. What is yielded is,
    joined, what the whole clip gives.
    """
    if rate == sr:
        yield from pieces
        return
    # Both ends get silence: libswresample mirrors them, and loses clips that are shorter than its filter. It lasts
    # 20 ms, or a little longer to be a whole number of samples at both rates.
    common = math.gcd(rate, sr)
    silence = math.ceil(common / 50)
    edge = torch.zeros(silence * rate // common)
    resampler = av.AudioResampler(format="flt", layout="mono", rate=sr)
    num_samples, position = 0, -silence * sr // common  # received; place in the clip of the next resampled one
    for part in itertools.chain([edge], pieces, [edge, None]):
        frame = None
        if part is not None:
            frame = av.AudioFrame.from_ndarray(part.numpy()[None], format="flt", layout="mono")
            frame.sample_rate = rate
            num_samples += 0 if part is edge else len(part)
        length = (2 * num_samples * sr + rate) // (2 * rate)  # rounded
        for resampled in resampler.resample(frame):
            samples = torch.from_numpy(resampled.to_ndarray()[0])
            # libswresample returns samples late, so only those of the silence lie outside of the clip.
            yield samples[max(0, -position) : max(0, length - position)]
            position += len(samples)


@functools.lru_cache(maxsize=32)
def torchaudio_resampler(rate: int, sr: int, device: torch.device) -> torch.nn.Module:
    """
    Returns a resampler with libswresample's filter: 16 zero crossings to each side, a Kaiser window, at most 97% of the
    new band.
    """
    rolloff = min(rate, 0.97 * sr) / min(rate, sr)
    return torchaudio.transforms.Resample(
        rate, sr, resampling_method="sinc_interp_kaiser", lowpass_filter_width=16, rolloff=rolloff, beta=9.0
    ).to(device)


def split_windows(samples: torch.Tensor, feature_extractor) -> list[torch.Tensor]:
    """`[samples]` -> ceil(samples / window) pieces of at most one window (480,000 samples = 30 s in Whisper)."""
    return list(samples.split(feature_extractor.n_samples))


@functools.lru_cache(maxsize=8)
def spectral_basis(feature_extractor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the Hann window `[n_fft]` and the mel filters `[mel bins, n_fft / 2 + 1]`, float32 on `device`."""
    filters = torch.from_numpy(feature_extractor.mel_filters).to(device, torch.float32)
    return torch.hann_window(feature_extractor.n_fft, device=device), filters.T


def log_mel(windows: list[torch.Tensor], feature_extractor) -> torch.Tensor:
    """
    Whisper's log-mel spectrogram (https://github.com/openai/whisper, `audio.py`), equal to what
    [`WhisperFeatureExtractor`] gives for zero-padded windows but without transforming the padding.

    Args:
        windows: float32 `[samples]` each, at most `feature_extractor.n_samples` long, all on one device.
        feature_extractor ([`WhisperFeatureExtractor`]): The source of all sizes and of the mel filters.

    Returns:
        float32 `[windows, mel bins, frames]` on the device of the windows.
    """
    if feature_extractor.dither:
        raise ValueError(f"The feature extractor adds noise (dither={feature_extractor.dither}); set dither to 0.")
    n_fft, hop, max_frames = feature_extractor.n_fft, feature_extractor.hop_length, feature_extractor.nb_max_frames
    half, device = n_fft // 2, windows[0].device
    hann, filters = spectral_basis(feature_extractor, device)  # [n_fft], [bins, n_fft / 2 + 1]
    features = torch.empty(len(windows), len(filters), max_frames, device=device)
    at_once = WINDOWS_AT_ONCE.get(device.type, 32)
    # B: windows transformed together, F: frames that reach their samples, f: frames of a block.
    for first in range(0, len(windows), at_once):
        batch, feature = windows[first : first + at_once], features[first : first + at_once]  # feature: [B, bins, max]
        # A frame is centred on its sample, with the audio mirrored at both ends; frames after the last are silence.
        num_frames = min(max_frames, math.ceil((max(map(len, batch)) + half) / hop))
        length = half + min(feature_extractor.n_samples, num_frames * hop + n_fft) + half
        samples = torch.zeros(len(batch), length, device=device)  # [B, half + samples + half]
        for row, window in zip(samples, batch, strict=True):
            row[half : half + len(window)] = window
        samples[:, :half] = samples[:, half + 1 : n_fft + 1].flip(1)
        samples[:, -half:] = samples[:, -n_fft - 1 : -half - 1].flip(1)
        blocks = samples.unfold(1, n_fft, hop)[:, :num_frames].split(BLOCK, dim=1)  # [B, f, n_fft] each
        mel = feature[:, :, :num_frames]  # [B, bins, F], filled block by block
        for block, block_mel in zip(blocks, mel.split(BLOCK, dim=2), strict=True):
            spectrum = torch.fft.rfft(block * hann)  # [B, f, n_fft / 2 + 1], complex
            power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)  # [B, f, n_fft / 2 + 1]
            log_power = (filters @ power.mT).clamp_(min=1e-10).log10_()  # [B, bins, f]
            torch.add(log_power.div_(4.0), 1.0, out=block_mel)  # (x + 4) / 4
        floor = mel.amax((1, 2), keepdim=True) - 2.0  # [B, 1, 1]: 80 dB below the loudest
        torch.maximum(mel, floor, out=mel)
        feature[:, :, num_frames:] = floor.clamp_(min=SILENCE)
    return features
