"""
Audio from anywhere -> samples -> log-mel. Nothing here depends on the model or the tokenizer.

The functions stand in the order in which the data flows: source -> bytes -> samples -> 16 kHz mono -> windows ->
log-mel.
"""

import base64
import binascii
import functools
import http.client
import io
import ipaddress
import math
import os
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from numbers import Real
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import av
import numpy as np
import torch
from transformers.utils import logging


try:
    from .audio_decoding import FULL_SCALE, MAX_SECONDS, AudioError, decode, decode_in_worker
except ImportError:  # not part of a package: the tools beside this file import it by its bare name
    from audio_decoding import FULL_SCALE, MAX_SECONDS, AudioError, decode, decode_in_worker

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
WINDOWS_AT_ONCE = {"cpu": 1}  # transformed together; an accelerator takes 32, whose padding costs it nothing
MAX_CHANNELS = 8  # 7.1 sound; a longer axis of a 2-D array is time
MAX_PEAK = 32.0  # full scale is 1.0; a float array beyond this holds unscaled integers
INTEGER_SCALE = {torch.uint8: FULL_SCALE["u1"], torch.int16: FULL_SCALE["i2"], torch.int32: FULL_SCALE["i4"]}
MAX_BYTES = 2**28  # of a source that is no local file
# Beside those that `ipaddress` knows: IETF protocols, and a cloud's own services.
NOT_PUBLIC = [ipaddress.ip_network(network) for network in ("192.0.0.0/24", "168.63.129.16/32")]
# All of IPv6 that is assigned to hosts. Others are multicast or local, or carry IPv4 addresses through a translator.
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
CHUNK = 2**16  # bytes read from a connection at a time
MAX_PHASES = 2**22  # of a filter that torchaudio makes for a pair of rates
TIMEOUT = 30.0  # seconds for a whole download

AUDIO_TYPES = ("audio", "audio_url", "input_audio")  # of content items
# The keys under which a content item, a `datasets` row or an OpenAI message part holds its audio.
SOURCE_KEYS = (*AUDIO_TYPES, "url", "path", "base64", "bytes", "array", "data")


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
) -> torch.Tensor:
    """
    Opens audio from anywhere.

    Args:
        ele: A path, `file://`, `http(s)://` or `data:` address, base64 text, bytes, a binary file object; samples as
            a numpy array or tensor, `[samples]`, `[channels, samples]` or `[samples, channels]`; samples with their
            rate, as a tuple (either order) or a dict of `array` and `sampling_rate`; a `datasets` dict of `bytes` and
            `path`, or its decoder object; a content item (`audio`, `audio_url`, `input_audio`, `url`, `path`,
            `base64`).
        sr (`int`, defaults to 16000): Sampling rate of the result, in Hz.
        device: Where the result lies, and where it is resampled if torchaudio imports. The default is the CPU, or
            the device of a tensor that is given.
        sampling_rate (`int`, *optional*): Rate in Hz of bare samples. Files, and samples that come with a rate, have
            their own. The default is `sr`: vLLM and transformers' `apply_chat_template` pass 16 kHz samples bare.
        max_bytes (`int`, defaults to 2**28): Of everything but local files: downloads, file objects, bytes, base64.
        max_seconds (`float`, defaults to 3600): Of audio; decoding stops there, however small the file. For rates above
            48 kHz it is proportionally less, so that it limits memory as well: 192 KB a second.
        timeout (`float`, defaults to 30): Seconds for a whole download, redirects included; with `public_only` for the
            download, the wait for a process that decodes, and the decoding. Only the look-up of a name has the system's
            own limit.
        public_only (`bool`, defaults to `False`): For servers with untrusted requests: refuses local paths, `file://`,
            and addresses that are not public, also after a redirect, and decodes files in processes of limited memory
            (64 MiB, on Linux) and time (8 s), at most six at once. On Windows they are decoded without these limits.

    Returns:
        `torch.Tensor`: float32 `[samples]` in [-1, 1], the mean of all channels. What overshoots is clipped, as by
        Whisper's own loader; only samples that are handed over as floats beyond [-1, 1] are kept as they are.

    Raises:
        AudioError: a `ValueError`, if the source is missing, unreadable, empty, ambiguous, not finite, past a limit.
    """
    deadline = time.monotonic() + timeout
    source, rate = unwrap(ele)
    is_file = not isinstance(source, (np.ndarray, torch.Tensor))
    if is_file:
        file, name = read(source, max_bytes, timeout, public_only), describe(source)
        if public_only:
            array, rate = decode_in_worker(file, name, max_seconds, deadline)
        else:
            array, rate = decode(file, name, max_seconds)
        samples, rate = torch.from_numpy(array), check_rate(rate)
    else:
        rate = check_rate(next(given for given in (rate, sampling_rate, sr) if given is not None))
        seconds = max(source.shape, default=0) / rate
        if seconds > max_seconds:  # before anything is copied
            raise AudioError(f"{describe(source)} lasts {seconds:.0f} s, past the limit of {max_seconds:g} s.")
        samples = to_mono(source)
    if not samples.numel():
        raise AudioError(f"{describe(source)} holds no samples.")
    peak = float(samples.abs().amax())
    if not math.isfinite(peak):
        raise AudioError(f"{describe(source)} holds samples that are not finite (NaN or infinity).")
    if peak > MAX_PEAK:
        raise AudioError(
            f"{describe(source)} has a peak of {peak:g}, but full scale is 1.0: integer samples stored as floats have "
            "to be divided by their own full scale first (32768 for 16 bit)."
        )
    resampled = resample(samples, rate, sr, samples.device if device is None else device)
    if not resampled.numel():
        raise AudioError(
            f"{describe(source)} is too short: {samples.numel()} samples at {rate} Hz are none at {sr} Hz."
        )
    # Lossy codecs and the resampler's filter overshoot full scale; floats beyond it are kept only if given so.
    bound = 1.0 if is_file else max(1.0, peak)
    return resampled.clamp(-bound, bound)


def process_audio_info(
    conversations, sr: int = SAMPLING_RATE, device=None, *, load_audio_from_video: bool = False, **limits
) -> list[torch.Tensor] | None:
    """
    Opens the audio of a conversation, or of a batch of them, as `qwen_vl_utils.process_vision_info` opens pictures.

    Args:
        conversations: Messages, or a list of lists of messages; content of other types is passed over.
        sr, device, limits: As in [`fetch_audio`].
        load_audio_from_video (`bool`, defaults to `False`): Whether the audio track of each video follows it.

    Returns:
        `list[torch.Tensor]`: float32 `[samples]` each, in reading order; None if there are none.
    """
    batch = [conversations] if isinstance(conversations[0], dict) else conversations
    contents = [message.get("content") for messages in batch for message in messages]
    sources = [
        source
        for content in contents
        if isinstance(content, (list, tuple))
        for _, source in iter_audio_sources(content, load_audio_from_video)
        if source is not None
    ]
    return [fetch_audio(source, sr, device, **limits) for source in sources] or None


def iter_audio_sources(content, load_audio_from_video: bool = False) -> Iterator[tuple[dict, object]]:
    """
    Yields the items of a message's content, each with its source of audio or None. With `load_audio_from_video` an
    audio item follows each video: transformers needs an empty audio item in that place; here it is optional.
    """
    is_track_slot = False
    for item in content:
        kind = item.get("type") or next((key for key in (*AUDIO_TYPES, "video", "video_url") if key in item), None)
        if kind in AUDIO_TYPES:
            source = {key: item[key] for key in (*SOURCE_KEYS, "sampling_rate") if item.get(key) is not None}
            if source or not is_track_slot:
                yield item, source or None
            is_track_slot = False
        else:
            yield item, None
            is_track_slot = load_audio_from_video and kind in ("video", "video_url")
            if is_track_slot:
                places = (item.get(key) for key in ("video", "video_url", "url", "path"))
                yield {"type": "audio"}, next((place for place in places if place is not None), item)


def unwrap(ele) -> tuple:
    """
    Takes the source out of the dicts, tuples and decoders of `datasets`, OpenAI and transformers.

    Returns:
        The source (address, bytes, file object, array or tensor) and the sampling rate that came with it, or None.
    """
    if isinstance(ele, dict):
        found = {key: ele[key] for key in SOURCE_KEYS if ele.get(key) is not None}
        if "array" in found or "bytes" in found:  # `path` is then only a label in a `datasets` row
            found.pop("path", None)
        if len(found) != 1:
            raise AudioError(
                f"An audio item needs exactly one source, under one of {', '.join(SOURCE_KEYS)}; this one has "
                f"{', '.join(found) or 'none'} (its keys are {', '.join(map(str, ele))})."
            )
        (inner,) = found.values()
        if isinstance(inner, dict) and any(isinstance(value, dict) for value in inner.values()):
            raise AudioError("An audio item holds its source directly or in one dict, not in a dict of dicts.")
        source, rate = unwrap(inner)
        if isinstance(source, list):
            try:
                source = np.asarray(source)
            except ValueError as error:
                raise AudioError(f"A list of samples must be numbers, or channels of one length: {error}") from error
        return source, ele.get("sampling_rate") if rate is None else rate  # the rate nearest to the samples
    if isinstance(ele, tuple) and len(ele) == 2:
        for samples, rate in (ele, ele[::-1]):
            if isinstance(samples, (np.ndarray, torch.Tensor)) and isinstance(rate, Real):
                return samples, rate
    if hasattr(ele, "get_all_samples"):  # `datasets`' own decoder, torchcodec's AudioDecoder
        decoded = ele.get_all_samples()
        return decoded.data, decoded.sample_rate
    return ele, None


def read(source, max_bytes: int = MAX_BYTES, timeout: float = TIMEOUT, public_only: bool = False) -> io.BufferedIOBase:
    """Turns a source that is not samples into a binary file object; see [`fetch_audio`] for the limits."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(at_most(max_bytes, source, source))
    if hasattr(source, "read"):
        return io.BytesIO(at_most(max_bytes, source.read(max_bytes + 1), source))
    if isinstance(source, Path):
        source = os.fspath(source)
    if not isinstance(source, str):
        raise AudioError(
            f"{describe(source)} is no sound: expected a path, an address, base64 text, bytes, a binary file object, "
            "a numpy array or a tensor, or a dict that holds one of these."
        )
    scheme = urlsplit(source[:4096]).scheme.lower()
    try:
        if scheme in ("http", "https"):
            return io.BytesIO(download(source, max_bytes, timeout, public_only))
        if scheme == "data":
            header, _, payload = source.partition(",")
            is_base64 = header.endswith(";base64")
            content = base64.b64decode(unquote(payload), validate=True) if is_base64 else unquote_to_bytes(payload)
            return io.BytesIO(at_most(max_bytes, content, source))
        path = unquote(urlsplit(source).path) if scheme == "file" else source
        if not public_only and len(path) < 4096 and os.path.isfile(path):
            return open(path, "rb")
    except AudioError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        raise AudioError(f"{describe(source)} cannot be read: {error}") from error
    try:
        content = base64.b64decode(source, validate=True)
    except (binascii.Error, ValueError) as error:
        reason = "neither an existing file, nor an address, nor base64"
        if public_only:
            reason = "neither an address nor base64; local files are not opened here"
        raise AudioError(f"{describe(source)} is {reason}.") from error
    return io.BytesIO(at_most(max_bytes, content, source))


def at_most(max_bytes: int, content: bytes, source) -> bytes:
    if len(content) > max_bytes:
        raise AudioError(f"{describe(source)} is larger than the limit of {max_bytes} bytes.")
    return content


def download(url: str, max_bytes: int, timeout: float, public_only: bool) -> bytes:
    """Reads an http(s) address. Its redirects are under the same limits and the same deadline."""
    deadline = time.monotonic() + timeout

    def time_left() -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    handlers = [WebRedirects, WebHandler(time_left=time_left, public_only=public_only)]
    if public_only:
        handlers.append(urllib.request.ProxyHandler({}))  # a proxy would resolve names by itself
    request, content = urllib.request.Request(url, headers={"User-Agent": "qwen2-audio-vl"}), bytearray()
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as response:
            if response.status != 200:
                raise AudioError(f"{describe(url)} was answered with HTTP status {response.status} instead of 200.")
            while chunk := response.read(CHUNK):
                content += chunk
                at_most(max_bytes, content, url)
            if response.length:
                raise AudioError(f"{describe(url)} ended {response.length} bytes early.")
    except (OSError, HTTPException) as error:  # urllib hides some timeouts in errors of its own
        if time.monotonic() >= deadline:
            raise AudioError(f"{describe(url)} took longer than the limit of {timeout:g} s.") from error
        raise
    return bytes(content)


class WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) only, where urllib would follow them to ftp as well."""

    def redirect_request(self, request, fp, code, message, headers, new_url):
        if urlsplit(new_url).scheme.lower() not in ("http", "https"):
            raise AudioError(f"{describe(request.full_url)} redirects to {describe(new_url)}, which is not on the web.")
        fp.close()  # or urllib reads all of its content, whatever its size
        return super().redirect_request(request, fp, code, message, headers, new_url)


class WebHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections that keep a deadline: `time_left` gives its seconds, and raises TimeoutError at its end."""

    def __init__(self, time_left: Callable[[], float], public_only: bool):
        super().__init__()
        self.time_left, self.public_only = time_left, public_only

    def http_open(self, request):
        return self.do_open(functools.partial(self.connection, http.client.HTTPConnection), request)

    def https_open(self, request):
        return self.do_open(functools.partial(self.connection, http.client.HTTPSConnection), request)

    def connection(self, kind: type, host: str, **kwargs) -> http.client.HTTPConnection:
        connection = kind(host, **kwargs)
        connection._create_connection = self.open_socket
        connection.response_class = self.open_response
        return connection

    def open_socket(self, address: tuple[str, int], *_) -> socket.socket:
        """
        Connects to the first address of a host that answers. With `public_only` all of them must be public, and the
        socket goes to the address that was checked, so that a second answer of the DNS cannot replace it.
        """
        host, port = address
        targets = [info[4][:2] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        for target, _ in targets if self.public_only else ():
            if not is_public(ipaddress.ip_address(target.partition("%")[0])):
                raise AudioError(f"What the host {host!r} resolves to is not a public address.")
        for num_left in range(len(targets), 0, -1):
            try:  # with a share of the time, so that an address that does not answer leaves some for the others
                sock = socket.create_connection(targets[-num_left], self.time_left() / num_left)
                break
            except OSError:
                if num_left == 1:
                    raise
        sock.settimeout(self.time_left())  # of the TLS handshake, if one follows
        return sock

    def open_response(self, sock: socket.socket, **kwargs) -> http.client.HTTPResponse:
        response = http.client.HTTPResponse(sock, **kwargs)
        response.fp = io.BufferedReader(TimedReads(sock, response.fp.detach(), self.time_left))
        return response


class TimedReads(io.RawIOBase):
    """Reads a socket with the time that is left, as a fixed timeout for each read would let a slow server go on."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, time_left: Callable[[], float]):
        self.sock, self.raw, self.time_left = sock, raw, time_left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.sock.settimeout(self.time_left())
        return self.raw.readinto(buffer)

    def close(self):
        self.raw.close()
        super().close()


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    # An IPv6 address may carry an IPv4 one, which is then the one that is reached.
    for embedded in (getattr(address, name, None) for name in ("ipv4_mapped", "sixtofour")):
        if embedded is not None:
            return is_public(embedded)
    if address.version == 6:
        return address.is_global and address in GLOBAL_UNICAST
    return address.is_global and not address.is_multicast and not any(address in network for network in NOT_PUBLIC)


def to_mono(samples: np.ndarray | torch.Tensor) -> torch.Tensor:
    """
    Scales integers to [-1, 1) and averages the channels, which are the axis of at most 8.

    Args:
        samples: `[samples]`, `[channels, samples]` or `[samples, channels]`, float, int16, int32 or uint8.

    Returns:
        `torch.Tensor`: float32 `[samples]`.
    """
    name, shape = describe(samples), samples.shape
    if len(shape) not in (1, 2):
        raise AudioError(f"{name} is no sound: expected [samples], [channels, samples] or [samples, channels].")
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
        raise AudioError(f"{name} is no sound: expected float, int16, int32 or uint8 samples.")
    samples = samples.detach()
    if samples.dtype in INTEGER_SCALE:
        zero, scale = INTEGER_SCALE[samples.dtype]
        samples = (samples.to(torch.float32) - zero) / scale  # exact but for the rounding of an int32, once
    samples = samples.to(torch.float32)
    return samples.mean(channel_axes[0]) if channel_axes else samples


def check_rate(rate) -> int:
    if not (isinstance(rate, Real) and MIN_RATE <= rate <= MAX_RATE and int(rate) == rate):
        raise AudioError(f"A sampling rate is a whole number of Hz from {MIN_RATE} to {MAX_RATE}, not {rate!r:.40}.")
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
    length = (2 * len(samples) * sr + rate) // (2 * rate)  # rounded
    # torchaudio keeps its filter once for every phase: 0.3 MB for 44,100 Hz, but 3 GB for 47,999.
    if device.type != "cpu" and rate * sr // common**2 <= MAX_PHASES:
        if torchaudio is not None:
            return torchaudio_resampler(rate, sr, device)(samples.to(device))[:length]
        logger.warning_once("torchaudio does not import: sound for the accelerator is resampled on the CPU by PyAV.")
    # Both ends get silence: libswresample mirrors them, and loses clips that are shorter than its filter. It lasts
    # 20 ms, or a little longer to be a whole number of samples at both rates.
    silence = math.ceil(common / 50)
    edge = torch.zeros(silence * rate // common)
    resampler, pieces = av.AudioResampler(format="flt", layout="mono", rate=sr), []
    for part in (edge, *samples.cpu().split(2**16), edge):
        frame = av.AudioFrame.from_ndarray(part.numpy()[None], format="flt", layout="mono")
        frame.sample_rate = rate
        pieces += resampler.resample(frame)
    resampled = np.concatenate([piece.to_ndarray()[0] for piece in (*pieces, *resampler.resample(None))])
    return torch.from_numpy(resampled)[silence * sr // common :][:length].to(device)


@functools.lru_cache(maxsize=32)
def torchaudio_resampler(rate: int, sr: int, device: torch.device) -> torch.nn.Module:
    """With libswresample's filter: 16 zero crossings to each side, a Kaiser window, at most 97% of the new band."""
    rolloff = min(rate, 0.97 * sr) / min(rate, sr)
    return torchaudio.transforms.Resample(
        rate, sr, resampling_method="sinc_interp_kaiser", lowpass_filter_width=16, rolloff=rolloff, beta=9.0
    ).to(device)


def split_windows(samples: torch.Tensor, feature_extractor) -> list[torch.Tensor]:
    """`[samples]` -> ceil(samples / window) pieces of at most one window (480,000 samples = 30 s in Whisper)."""
    return list(samples.split(feature_extractor.n_samples))


@functools.lru_cache(maxsize=8)
def spectral_basis(feature_extractor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The Hann window `[n_fft]` and the mel filters `[mel bins, n_fft / 2 + 1]`, float32 on `device`."""
    filters = torch.from_numpy(feature_extractor.mel_filters).to(device, torch.float32)
    return torch.hann_window(feature_extractor.n_fft, device=device), filters.T


def log_mel(windows: list[torch.Tensor], feature_extractor) -> torch.Tensor:
    """
    Whisper's log-mel spectrogram (https://github.com/openai/whisper, `audio.py`), equal to what
    [`WhisperFeatureExtractor`] gives for zero-padded windows but without transforming the padding.

    Args:
        windows: float32 `[samples]` each, at most `feature_extractor.n_samples` long, all on one device.
        feature_extractor ([`WhisperFeatureExtractor`]): its numbers are used, and its mel filters.

    Returns:
        `torch.Tensor`: float32 `[windows, mel bins, frames]` on the device of the windows.
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


def describe(source) -> str:
    """A source in a few words, for messages: never its whole content."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        kind = "array" if isinstance(source, np.ndarray) else "tensor"
        return f"The {kind} of shape {tuple(source.shape)} and dtype {source.dtype}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"The content of {len(source)} bytes"
    if isinstance(source, (str, Path)):
        text = str(source)
        return f"The source {text if len(text) <= 80 else text[:60] + '...' + text[-17:]!r}"
    return f"The {type(source).__name__}"
