"""Sound in: every way to hand over a clip, against an independent decoder, and what is refused."""

import base64
import io

import av
import numpy as np
import pytest
import soundfile
import soxr
import torch
from transformers import WhisperFeatureExtractor

from audio_utils import AudioError, fetch_audio, log_mel, split_windows, tokens_per_window
from demo.bases import ASSETS


RECORDINGS = ASSETS / "audio"


def reference(path) -> np.ndarray:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(axis=1), rate, 16000)


def assert_same_sound(ours: torch.Tensor, theirs: np.ndarray, least: float = 0.999):
    assert ours.dtype == torch.float32 and ours.ndim == 1 and abs(len(ours) - len(theirs)) <= 1
    length = min(len(ours), len(theirs))
    assert np.corrcoef(ours[:length].numpy(), theirs[:length])[0, 1] > least


@pytest.mark.parametrize("name", ["jfk.wav", "jfk.mp3", "english.wav", "audio-stereo-16-bit-44100Hz.flac"])
def test_recordings_equal_an_independent_decoder(name):
    assert_same_sound(fetch_audio(RECORDINGS / name), reference(RECORDINGS / name))


def test_length_of_known_clips():
    assert len(fetch_audio(RECORDINGS / "jfk.wav")) == 176_000  # 11.0 s
    samples = soundfile.info(RECORDINGS / "english.wav").frames
    assert abs(len(fetch_audio(RECORDINGS / "english.wav")) - samples * 160 / 441) < 1  # 44.1 kHz
    assert abs(len(fetch_audio(RECORDINGS / "sample1.webm")) / 16_000 - 7.12) < 0.01
    assert len(fetch_audio(RECORDINGS / "jfk.wav", sr=8000)) == 88_000


def test_wav_is_exact():
    expected, _ = soundfile.read(RECORDINGS / "jfk.wav", dtype="float32")
    assert torch.equal(fetch_audio(str(RECORDINGS / "jfk.wav")), torch.from_numpy(expected))


@pytest.mark.parametrize(
    "codec, container, rate, format, least",
    [
        ("pcm_u8", "wav", 22050, "u8", 0.99),
        ("pcm_s24le", "wav", 44100, "s32", 0.999),
        ("pcm_s32le", "wav", 48000, "s32", 0.999),
        ("pcm_f32le", "wav", 8000, "flt", 0.9),
        ("flac", "flac", 96000, "s32", 0.999),
        ("aac", "mp4", 44100, "fltp", 0.95),
        ("libmp3lame", "mp3", 44100, "fltp", 0.99),
        ("libopus", "ogg", 48000, "s16", 0.99),
        ("libopus", "webm", 48000, "s16", 0.99),
    ],
)
@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_formats(codec, container, rate, format, least, layout):
    original = fetch_audio(RECORDINGS / "jfk.wav")[:32_000]
    frame = av.AudioFrame.from_ndarray(original.numpy()[None], format="flt", layout="mono")
    frame.sample_rate = 16_000
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(
            format=format, layout=layout, rate=rate, frame_size=stream.codec_context.frame_size
        )
        for part in (frame, None):
            for piece in resampler.resample(part):
                output.mux(stream.encode(piece))
        output.mux(stream.encode(None))
    decoded = fetch_audio(file.getvalue())
    # A stereo copy of mono sound may be scaled, and lossy codecs delay by some samples: find the best shift.
    length = min(len(decoded), len(original)) - 2000
    assert abs(len(decoded) - len(original)) <= 2400
    shifts = range(-20, 1700) if least < 0.999 else (0,)
    best = max(
        np.corrcoef(decoded[max(s, 0) : max(s, 0) + length - 200], original[max(-s, 0) : max(-s, 0) + length - 200])[
            0, 1
        ]
        for s in shifts
    )
    assert best > least


def test_every_way_to_hand_over_a_clip(tmp_path):
    path = RECORDINGS / "english.wav"
    content = path.read_bytes()
    encoded = base64.b64encode(content).decode()
    expected = fetch_audio(path)
    samples, rate = soundfile.read(path, dtype="int16")
    ways = [
        str(path),
        path.as_uri(),
        content,
        bytearray(content),
        memoryview(content),
        io.BytesIO(content),
        encoded,
        f"data:audio/wav;base64,{encoded}",
        (samples, rate),
        (rate, samples),
        (samples, np.int64(rate)),
        {"audio": {"array": samples, "sampling_rate": rate}, "sampling_rate": 8000},
        {"array": (samples / 32768).tolist(), "sampling_rate": rate},
        (torch.from_numpy(samples), rate),
        {"array": samples, "sampling_rate": rate},
        {"array": samples, "path": "elsewhere.wav", "sampling_rate": rate},
        {"bytes": content, "path": "elsewhere.wav"},
        {"bytes": None, "path": str(path)},
        {"type": "audio", "audio": {"array": samples, "sampling_rate": rate}},
        {"type": "audio", "audio": samples, "sampling_rate": rate},
        {"audio_url": {"url": path.as_uri()}},
        {"input_audio": {"data": encoded, "format": "wav"}},
    ]
    for way in ways:
        assert torch.equal(fetch_audio(way), expected), type(way)
    with path.open("rb") as file:
        assert torch.equal(fetch_audio(file), expected)


@pytest.mark.parametrize(
    "dtype, scale",
    [(np.int16, 2**15), (np.int32, 2**31), (np.float32, 1), (np.float64, 1), (np.float16, 1), (">i2", 2**15)],
)
def test_samples_are_scaled_by_their_own_full_scale(dtype, scale):
    samples = np.array([0.0, 0.5, -0.5, -1.0, 0.25])
    assert fetch_audio((samples * scale).astype(dtype)).tolist() == samples.tolist()
    assert fetch_audio(torch.from_numpy((samples * 32768).astype(np.int16))).tolist() == samples.tolist()
    assert fetch_audio(np.array([128, 192, 0], np.uint8)).tolist() == [0.0, 0.5, -1.0]


def test_channels_are_averaged_whichever_axis_they_are_on():
    left, right = np.linspace(-0.5, 0.5, 1000), np.linspace(0.5, 0.1, 1000)
    expected = torch.tensor((left + right) / 2, dtype=torch.float32)
    for samples in (
        np.stack([left, right]),
        np.stack([left, right], axis=1),
        np.stack([left, right])[:, ::-1][:, ::-1],
    ):
        torch.testing.assert_close(fetch_audio(samples), expected)
    assert len(fetch_audio(np.zeros((1, 700), np.int16))) == len(fetch_audio(np.zeros((700, 1), np.int16))) == 700


def test_stereo_file_is_the_mean_of_its_channels():
    samples, _ = soundfile.read(RECORDINGS / "audio-stereo-16-bit-44100Hz.flac", dtype="float32")
    ours = fetch_audio(RECORDINGS / "audio-stereo-16-bit-44100Hz.flac", sr=44100)
    torch.testing.assert_close(ours, torch.from_numpy(samples.mean(axis=1)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_resampling_keeps_pitch_and_length(rate):
    time = np.arange(rate * 2) / rate
    tone = (0.5 * np.sin(2 * np.pi * 1000 * time)).astype(np.float32)
    resampled = fetch_audio((tone, rate)).numpy()
    assert len(resampled) == 32_000
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(32_000) / 16_000)
    assert np.abs(resampled - expected)[200:-200].max() < 2e-3
    assert np.argmax(np.abs(np.fft.rfft(resampled))) == 2000  # 1000 Hz in bins of 0.5 Hz


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere/clip.wav", r"nowhere/clip.wav' is neither an existing file, nor an address, nor base64"),
        ("file:///nowhere/clip.wav", "nowhere/clip.wav"),
        ("http://127.0.0.1:9/clip.wav", "cannot be read: .*refused"),
        ("data:audio/wav;base64,###", "cannot be read"),
        (b"", "sound of 0 bytes cannot be decoded"),
        (b"no sound at all" * 99, "sound of 1485 bytes cannot be decoded"),
        (np.zeros(0, np.float32), "holds no samples"),
        (np.array([0.1, np.nan]), "not finite"),
        (np.array([0.1, np.inf], np.float32), "not finite"),
        (np.array([12000.0, -3000.0]), "peak of 12000, but full scale is 1.0"),
        (np.zeros((5, 5)), r"shape \(5, 5\) .* could be \[channels, samples\] or \[samples, channels\]"),
        (np.zeros((9, 900)), "or is neither"),
        (np.zeros((2, 3, 4)), "expected .samples., "),
        (np.zeros(5, bool), "expected float, int16, int32 or uint8"),
        (np.zeros(5, np.int64), "int64 is no sound"),
        (np.array(["a"]), "is no sound"),
        ([0.1, 0.2], "The list is no sound"),
        (None, "NoneType is no sound"),
        (17, "int is no sound"),
        ({"type": "audio"}, "exactly one source"),
        ({"url": "a.wav", "path": "b.wav"}, "has url, path"),
        ((np.zeros(5, np.float32), 0), "positive whole number of Hz, not 0"),
        ((np.zeros(5, np.float32), 44100.5), "not 44100.5"),
    ],
)
def test_what_is_no_sound_is_refused_by_name(source, message):
    with pytest.raises(AudioError, match=message):
        fetch_audio(source)


def test_a_picture_has_no_sound_track():
    with pytest.raises(AudioError, match="no sound track"):
        fetch_audio(ASSETS / "images" / "chelsea.png")


def test_truncated_files_never_pass_for_others():
    content = (RECORDINGS / "audio-stereo-16-bit-44100Hz.flac").read_bytes()
    for size in (10, 100, 4000):
        with pytest.raises(AudioError):
            fetch_audio(content[:size])


def test_messages_never_hold_the_whole_source():
    with pytest.raises(AudioError) as error:
        fetch_audio("data:audio/wav;base64," + "A" * 100_000 + "#")
    assert len(str(error.value)) < 300


@pytest.fixture(scope="module", params=[80, 128])
def extractor(request):
    return WhisperFeatureExtractor(feature_size=request.param)


@pytest.mark.parametrize("samples", [1, 2, 159, 200, 201, 400, 16_000, 80_001, 479_599, 479_800, 479_999, 480_000])
def test_log_mel_equals_whisper(samples, extractor):
    clip = torch.randn(samples, generator=torch.Generator().manual_seed(samples)) * 0.1
    expected = extractor(clip.numpy(), sampling_rate=16_000, return_tensors="pt")["input_features"]
    torch.testing.assert_close(log_mel([clip], extractor), expected, atol=1e-5, rtol=0)


def test_log_mel_of_extreme_clips(extractor):
    clips = [
        torch.zeros(16_000),
        torch.ones(30_000),
        torch.full((480_000,), -0.5),
        torch.sign(torch.randn(90_000, generator=torch.Generator().manual_seed(0))),
        fetch_audio(RECORDINGS / "jfk.wav"),
        1e-6 * torch.randn(4000, generator=torch.Generator().manual_seed(1)),
    ]
    expected = extractor([clip.numpy() for clip in clips], sampling_rate=16_000, return_tensors="pt")["input_features"]
    torch.testing.assert_close(log_mel(clips, extractor), expected, atol=1e-5, rtol=0)


def test_windows_and_tokens_follow_the_extractor():
    for seconds in (1, 8, 30):
        extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=seconds)
        windows = split_windows(torch.arange(16_000 * seconds * 2 + 1.0), extractor)
        assert [len(window) for window in windows] == [16_000 * seconds, 16_000 * seconds, 1]
        assert tokens_per_window(extractor) == 50 * seconds
        assert log_mel(windows[2:], extractor).shape == (1, 128, 100 * seconds)


def test_dither_is_refused():
    with pytest.raises(ValueError, match="dither"):
        log_mel([torch.zeros(5)], WhisperFeatureExtractor(feature_size=128, dither=0.1))
