"""The recordings in every container and codec, for tests of what fetch_audio has to open, and for the fuzzer."""

import io
import math
from fractions import Fraction

import av
import numpy as np

from demo.bases import ASSETS


RECORDINGS = ASSETS / "audio"

# FFmpeg's names of codec and container, sampling rate in Hz, sample format
ENCODINGS = {
    "u8.wav": ("pcm_u8", "wav", 22_050, "u8"),
    "s16.wav": ("pcm_s16le", "wav", 16_000, "s16"),
    "s24.wav": ("pcm_s24le", "wav", 44_100, "s32"),
    "s32.wav": ("pcm_s32le", "wav", 48_000, "s32"),
    "f32.wav": ("pcm_f32le", "wav", 32_000, "flt"),
    "f64.wav": ("pcm_f64le", "wav", 44_100, "dbl"),
    "alaw.wav": ("pcm_alaw", "wav", 16_000, "s16"),
    "adpcm.wav": ("adpcm_ms", "wav", 22_050, "s16"),
    "s16.aiff": ("pcm_s16be", "aiff", 44_100, "s16"),
    "s16.caf": ("pcm_s16le", "caf", 44_100, "s16"),
    "s24.flac": ("flac", "flac", 96_000, "s32"),
    "clip.mp3": ("libmp3lame", "mp3", 44_100, "fltp"),
    "opus.ogg": ("libopus", "ogg", 48_000, "s16"),
    "opus.webm": ("libopus", "webm", 48_000, "s16"),
    "aac.m4a": ("aac", "ipod", 44_100, "fltp"),
    "alac.m4a": ("alac", "ipod", 44_100, "s16p"),
    "clip.aac": ("aac", "adts", 22_050, "fltp"),
    "aac.ts": ("aac", "mpegts", 48_000, "fltp"),
    "mp3.avi": ("libmp3lame", "avi", 44_100, "fltp"),
    "clip.wma": ("wmav2", "asf", 44_100, "fltp"),
    "clip.amr": ("libopencore_amrnb", "amr", 8_000, "s16"),
}

BIT_RATES = {"libopencore_amrnb": 12_200, "wmav2": 128_000}  # of codecs that have no default


def encode(
    samples: np.ndarray,
    name: str,
    layout: str = "mono",
    video: bool = False,
    gap: tuple[float, float] = (0, 0),
    **options: str,
) -> bytes:
    """
    Float32 `[samples]` at 16 kHz as a file of one of `ENCODINGS`, perhaps with pictures that grow brighter. `gap` has
    the second at which the timestamps leave a gap, and its seconds.
    """
    codec, container, rate, format = ENCODINGS[name]
    frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
    frame.sample_rate = 16_000
    if gap[1]:
        frame.pts, frame.time_base = 0, Fraction(1, 16_000)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4" if video and container != "webm" else container, options=options) as output:
        if video:
            pictures = output.add_stream("vp8" if container == "webm" else "mpeg4", rate=8)
            pictures.width = pictures.height = 56
        stream = output.add_stream(codec, rate=rate, layout=layout)
        if codec in BIT_RATES:
            stream.bit_rate = BIT_RATES[codec]
        size = stream.codec_context.frame_size
        resampler = av.AudioResampler(format=format, layout=layout, rate=rate, frame_size=size)
        pieces = [piece for part in (frame, None) for piece in resampler.resample(part)]
        for piece in (*pieces, None):
            for packet in stream.encode(piece):
                if gap[1] and packet.pts * packet.time_base >= gap[0]:
                    packet.pts += round(gap[1] / packet.time_base)
                    packet.dts += round(gap[1] / packet.time_base)
                output.mux(packet)
        if video:
            for number in range(8 * math.ceil(len(samples) / 16_000)):
                pixels = np.full((56, 56, 3), min(10 * number, 255), np.uint8)
                output.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            output.mux(pictures.encode(None))
    return file.getvalue()
