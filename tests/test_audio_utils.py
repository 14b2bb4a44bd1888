"""Sound in: every way to hand over a clip, against an independent decoder, and what is refused."""

import base64
import contextlib
import http.server
import io
import ipaddress
import os
import queue
import re
import resource
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import urllib.parse
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
import soundfile
import soxr
import torch
import trustme
from bombs import BOMBS
from fuzz import resident
from sounds import ENCODINGS, RECORDINGS, encode
from transformers import WhisperFeatureExtractor

import audio_decoding
import audio_utils
from audio_utils import AudioError, fetch_audio, log_mel, split_windows
from configuration_qwen2_audio_vl import tokens_per_window
from demo.bases import ASSETS


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


def best_match(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, int]:
    """The correlation of two clips where they fit best, and by how many samples the first one is late there."""
    size = 2 * max(len(ours), len(theirs))
    correlation = np.fft.irfft(np.fft.rfft(ours, size) * np.fft.rfft(theirs, size).conj())
    shift = int(np.argmax(correlation))
    shift -= size if shift > size // 2 else 0
    ours, theirs = ours[max(shift, 0) :], theirs[max(-shift, 0) :]
    length = min(len(ours), len(theirs))
    return np.corrcoef(ours[:length], theirs[:length])[0, 1], shift


@pytest.mark.parametrize("layout", ["mono", "stereo"])
@pytest.mark.parametrize("name", ENCODINGS)
def test_formats(name, layout):
    """Against the sound before it was encoded, and where libsndfile can read the file against that."""
    if name == "clip.amr" and layout == "stereo":
        pytest.skip("AMR is mono")
    original = fetch_audio(RECORDINGS / "jfk.wav")[:48_000].numpy()
    content = encode(original, name, layout)
    ours = fetch_audio(content).numpy()
    is_lossy = name.partition(".")[0] in ("u8", "alaw", "adpcm", "clip", "opus", "aac", "mp3")
    correlation, delay = best_match(ours, original)
    assert correlation > (0.9 if name == "clip.amr" else 0.98 if is_lossy else 0.9999)
    # Codecs work in blocks of up to 2048 samples, and not every container says where the sound in them begins and ends.
    assert abs(delay) <= (1500 if is_lossy else 0) and abs(len(ours) - len(original)) <= (2048 if is_lossy else 1)
    try:
        theirs, rate = soundfile.read(io.BytesIO(content), always_2d=True)
    except soundfile.LibsndfileError:
        assert name.partition(".")[2] in ("webm", "m4a", "aac", "ts", "avi", "wma", "amr")
    else:
        correlation, delay = best_match(ours, soxr.resample(theirs.mean(axis=1), rate, 16_000))
        assert correlation > 0.9999 and abs(delay) <= 1


def test_the_sound_track_of_a_video():
    original = fetch_audio(RECORDINGS / "jfk.wav")[:48_000].numpy()
    assert best_match(fetch_audio(encode(original, "aac.m4a", video=True)).numpy(), original)[0] > 0.98


@pytest.mark.parametrize(
    "name, layout", [("aac.m4a", "5.1"), ("aac.m4a", "7.1"), ("s24.flac", "7.1"), ("s16.wav", "7.1")]
)
def test_surround_sound(name, layout):
    """PyAV itself crashes on eight planes of samples (with a segmentation fault)."""
    original = fetch_audio(RECORDINGS / "jfk.wav")[:48_000].numpy()
    ours = fetch_audio(encode(original, name, layout)).numpy()
    assert best_match(ours, original)[0] > 0.98


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


def test_rows_of_datasets(tmp_path):
    """Bytes and paths as `datasets` stores them, from memory and streamed from a file as from the Hub."""
    names = ["jfk.mp3", "english.wav", "sample1.webm"]
    rows = [{"audio": {"bytes": (RECORDINGS / name).read_bytes(), "path": name}} for name in names]
    rows.append({"audio": {"bytes": rows[0]["audio"]["bytes"], "path": None}})
    rows.append({"audio": {"bytes": None, "path": str(RECORDINGS / "jfk.wav")}})
    data = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))
    data.to_parquet(tmp_path / "data.parquet")
    streamed = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "data.parquet"), split="train", streaming=True, cache_dir=str(tmp_path)
    )
    expected = [fetch_audio(RECORDINGS / name) for name in (*names, names[0], "jfk.wav")]
    for source in (data, streamed.cast_column("audio", datasets.Audio(decode=False))):
        for row, samples in zip(source, expected, strict=True):
            assert torch.equal(fetch_audio(row["audio"]), samples) and torch.equal(fetch_audio(row), samples)


def test_decoders_of_datasets_and_torchcodec(tmp_path):
    """In a process where torchcodec finds FFmpeg: the one that PyAV's wheel carries, under the names it looks for."""
    libraries = Path(av.__file__).parents[1] / "av.libs"
    if not libraries.is_dir():
        pytest.skip("PyAV's wheel keeps FFmpeg in av.libs on Linux only")
    for library in libraries.iterdir():
        (tmp_path / re.sub(r"-[0-9a-f]+(\.so\.\d+).*", r"\1", library.name)).symlink_to(library)
    code = f"""
        import sys
        sys.path.insert(0, {str(ASSETS.parent)!r})
        import datasets, torch
        from torchcodec.decoders import AudioDecoder
        from audio_utils import fetch_audio
        for name in ("jfk.wav", "english.wav", "audio-stereo-16-bit-44100Hz.flac", "sample1.webm"):
            path = f"{RECORDINGS}/{{name}}"
            rows = datasets.Dataset.from_dict({{"audio": [path]}})
            decoder = rows.cast_column("audio", datasets.Audio())[0]["audio"]
            slower = rows.cast_column("audio", datasets.Audio(sampling_rate=8000))[0]["audio"]
            expected = fetch_audio(path)
            assert isinstance(decoder, AudioDecoder)
            torch.testing.assert_close(fetch_audio(decoder), expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(fetch_audio({{"audio": AudioDecoder(path)}}), expected, atol=1e-4, rtol=0)
            assert abs(len(fetch_audio(slower)) - len(expected)) < 160  # 10 ms, which torchcodec drops of Vorbis
    """
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:{libraries}"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True, timeout=300)


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


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("samples", [None, 1, 7, 1000])
def test_both_resamplers_agree(rate, samples):
    """What an accelerator would do, run on the CPU: equal for all but the last digits, at the edges as well."""
    accelerated = audio_utils.torchaudio_resampler(rate, 16_000, torch.device("cpu"))
    for name in ("jfk.wav", "audio-stereo-16-bit-44100Hz.flac"):
        sound = fetch_audio(RECORDINGS / name, sr=rate)[rate // 2 :][:samples]
        expected = audio_utils.resample(sound, rate, 16_000)
        assert len(expected) == round(len(sound) * 16_000 / rate)
        torch.testing.assert_close(accelerated(sound)[: len(expected)], expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize("rate", [1001, 47_999, 767_999])
def test_rates_of_no_common_divisor(rate):
    tone = torch.sin(2 * torch.pi * 100 * torch.arange(rate) / rate)
    expected = torch.sin(2 * torch.pi * 100 * torch.arange(16_000) / 16_000)
    torch.testing.assert_close(fetch_audio((tone, rate))[500:-500], expected[500:-500], atol=1e-3, rtol=0)


def test_what_overshoots_is_clipped_unless_it_was_given():
    square = torch.sign(torch.sin(2 * torch.pi * 440 * torch.arange(44_100) / 44_100 + 0.1))
    file = io.BytesIO()
    soundfile.write(file, square.numpy() * 1.5, 44_100, format="wav", subtype="FLOAT")
    assert fetch_audio((square, 44_100)).abs().max() == 1.0
    assert fetch_audio(file.getvalue()).abs().max() == 1.0
    assert torch.equal(fetch_audio(square * 1.5), square * 1.5)


def test_the_result_is_never_the_callers_own_memory():
    samples = torch.full((100,), 0.5)
    fetch_audio(samples).zero_()
    assert bool((samples == 0.5).all())


def test_without_torchaudio_a_line_says_where_sound_is_resampled(monkeypatch, caplog):
    monkeypatch.setattr(audio_utils, "torchaudio", None)
    monkeypatch.setattr(audio_utils.logger, "propagate", True)
    audio_utils.logger.warning_once.cache_clear()
    for _ in range(2):
        assert fetch_audio(RECORDINGS / "english.wav", device="meta").device.type == "meta"
    assert [record.message for record in caplog.records] == [
        "torchaudio does not import: sound for the accelerator is resampled on the CPU by PyAV."
    ]


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere/clip.wav", r"nowhere/clip.wav' is neither an existing file, nor an address, nor base64"),
        ("file:///nowhere/clip.wav", "nowhere/clip.wav"),
        ("http://127.0.0.1:9/clip.wav", "cannot be read: .*refused"),
        ("data:audio/wav;base64,###", "cannot be read"),
        (b"", "content of 0 bytes cannot be decoded"),
        (b"no sound at all" * 99, "content of 1485 bytes cannot be decoded"),
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
        ((np.zeros(5, np.float32), 0), "whole number of Hz from 1000 to 768000, not 0"),
        ((np.zeros(5, np.float32), 44100.5), "not 44100.5"),
        ((np.zeros(2, np.float32), 768_000), "too short: 2 samples at 768000 Hz are none at 16000 Hz"),
    ],
)
def test_what_is_no_sound_is_refused_by_name(source, message):
    with pytest.raises(AudioError, match=message):
        fetch_audio(source)


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((0, 0)),
        np.zeros(()),
        np.float32(0.5),
        np.zeros((1, 1, 1, 1, 1)),
        np.zeros(3, complex),
        np.zeros(3, object),
        np.zeros(3, [("left", "f4"), ("right", "f4")]),
        np.zeros(3, "datetime64[s]"),
        np.broadcast_to(np.zeros((1, 1)), (2**20, 2**20)),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(3, dtype=torch.bool),
        torch.zeros(2, 3).to_sparse(),
        torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
        torch.zeros((0, 3)),
        {"array": [[0.1, 0.2], [0.3]], "sampling_rate": 16_000},
        {"array": ["a", None], "sampling_rate": 16_000},
        {"array": np.zeros(9, np.float32), "sampling_rate": "high"},
        {"array": np.zeros(9, np.float32), "sampling_rate": [16_000]},
        {"array": np.zeros(9, np.float32), "sampling_rate": float("nan")},
        {"audio": {"audio": {"audio": {"url": "x"}}}},
        (np.zeros(9, np.float32), 16_000, 1),
    ],
    ids=str,
)
def test_absurd_samples_are_refused(source):
    with pytest.raises(AudioError):
        fetch_audio(source)


def test_a_picture_is_refused():
    with pytest.raises(AudioError, match="chelsea.png"):
        fetch_audio(ASSETS / "images" / "chelsea.png")


def test_a_video_without_sound_is_refused():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        output.mux(stream.encode(None))
    with pytest.raises(AudioError, match="no sound track"):
        fetch_audio(file.getvalue())


def test_playlists_open_nothing(tmp_path):
    """FFmpeg's playlist formats would read other files and addresses in the name of the one that was given."""
    clip = RECORDINGS / "jfk.mp3"
    for name, content in (
        ("list.m3u8", f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{clip.as_uri()}\n#EXT-X-ENDLIST\n"),
        ("list.txt", f"ffconcat version 1.0\nfile '{clip}'\n"),
        ("list.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n"),
    ):
        (tmp_path / name).write_text(content)
        for source in (tmp_path / name, content.encode()):
            with pytest.raises(AudioError, match="cannot be decoded"):
                fetch_audio(source)


def silence(codec: str, container: str, rate: int, seconds: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        for _ in range(seconds * 50):
            piece = av.AudioFrame.from_ndarray(np.zeros((1, rate // 50), np.int16), format="s16", layout="mono")
            piece.sample_rate = rate
            output.mux(stream.encode(piece))
        output.mux(stream.encode(None))
    return file.getvalue()


def test_long_silence_in_a_small_file_is_not_decoded_to_its_end():
    hour = silence("flac", "flac", 8000, seconds=3700)
    assert len(hour) < 2**20
    with pytest.raises(AudioError, match="lasts longer than the limit of 3600 s"):
        fetch_audio(hour)
    with pytest.raises(AudioError, match="lasts 11 s, past the limit of 10 s"):
        fetch_audio(np.zeros(176_000, np.float32), max_seconds=10)
    high = io.BytesIO()
    soundfile.write(high, np.zeros(192_000 * 2), 192_000, format="wav")
    with pytest.raises(AudioError, match="limit of 4 s, which is for 48000 Hz; it has 192000"):
        fetch_audio(high.getvalue(), max_seconds=4)


def test_bombs_cost_little_memory(tmp_path, web):
    """Each in a process of its own, which says how much its peak grew: 10 s at 48 kHz are 2 MB."""
    (tmp_path / "bomb.flac").write_bytes(silence("flac", "flac", 48_000, seconds=300))
    (tmp_path / "bomb.opus").write_bytes(silence("libopus", "ogg", 48_000, seconds=300))
    with (tmp_path / "bomb.wav").open("wb") as file:  # 2**31 samples that the disk does not hold
        soundfile.write(file, np.zeros(8, np.int16), 48_000, format="wav", subtype="PCM_U8")
        file.truncate(2**31 + 44)
        file.seek(40)
        file.write((2**31).to_bytes(4, "little"))
    code = """
        import resource, sys
        sys.path.insert(0, sys.argv[1])
        from audio_utils import AudioError, fetch_audio
        fetch_audio(f"{sys.argv[1]}/assets/audio/english.wav")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            fetch_audio(sys.argv[2], max_seconds=10, max_bytes=10**7)
        except AudioError as error:
            print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, error)
    """
    sources = [str(path) for path in sorted(tmp_path.glob("bomb.*"))] + [f"{web}endless"]
    arguments = [sys.executable, "-c", textwrap.dedent(code), str(ASSETS.parent)]
    runs = [subprocess.Popen([*arguments, source], stdout=subprocess.PIPE, text=True) for source in sources]
    for source, run in zip(sources, runs, strict=True):
        megabytes, _, message = run.communicate(timeout=100)[0].partition(" ")
        assert "limit of 10 s" in message or "limit of 10000000 bytes" in message
        assert int(megabytes) < 40, source


@pytest.mark.parametrize("name", BOMBS)
def test_untrusted_bombs_are_limited_in_memory_and_time(name, monkeypatch):
    """Whatever a file says: it is decoded or refused within the limits, and the next good file is decoded."""
    monkeypatch.setattr(audio_decoding, "WORKER_SECONDS", 2)  # 8 by default
    worker = audio_decoding.DecodingWorker()
    monkeypatch.setattr(audio_decoding, "WORKERS", queue.LifoQueue())
    audio_decoding.WORKERS.put(worker)
    good = RECORDINGS / "jfk.mp3"
    assert torch.equal(fetch_audio(good.read_bytes(), public_only=True), fetch_audio(good))
    usual, first = resident(worker), worker.process.pid
    bomb = BOMBS[name](fetch_audio(good)[:16_000].numpy())
    assert len(bomb) < 2**22
    start = time.monotonic()
    try:
        assert len(fetch_audio(bomb, max_seconds=600, public_only=True)) == 16_000
    except AudioError as error:
        assert re.search("limit of 600 s|limit of 2 s to decode|Cannot allocate memory", str(error))
    assert time.monotonic() - start < 3
    if worker.process.poll() is None:
        assert worker.process.pid == first and resident(worker) - usual < 300
    assert torch.equal(fetch_audio(good.read_bytes(), public_only=True), fetch_audio(good))
    worker.stop()


def test_a_worker_that_died_is_replaced():
    worker = audio_decoding.DecodingWorker()
    content = (RECORDINGS / "jfk.mp3").read_bytes()
    for _ in range(2):
        samples, rate = worker.decode(content, "clip", 60)
        expected, expected_rate = audio_decoding.decode(io.BytesIO(content), "clip")
        assert rate == expected_rate and np.array_equal(samples, expected)
        worker.process.kill()
        worker.process.wait()
    with pytest.raises(AudioError, match="clip cannot be decoded"):
        worker.decode(b"no audio", "clip", 60)
    worker.stop()


def test_covers_are_not_decoded_in_the_own_process_either():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clip = fetch_audio(RECORDINGS / "jfk.wav")[:16_000].numpy()
    assert len(fetch_audio(BOMBS["mp3 with covers"](clip))) == 16_000
    with pytest.raises(AudioError, match="limit of 600 s"):
        fetch_audio(BOMBS["matroska with compressed blocks"](clip), max_seconds=600)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 500  # 600 s at 48 kHz are 115 MB


def test_a_header_that_lies_about_its_length():
    """It claims 2**31 samples, or all that 32 bits can say, and 16,000 follow."""
    header = (RECORDINGS / "jfk.wav").read_bytes()[:78]
    data = header.index(b"data")
    for claim in (2**31, 2**32 - 2):
        lying = header[: data + 4] + claim.to_bytes(4, "little") + bytes(32_000)
        assert len(fetch_audio(lying)) == 16_000


@pytest.fixture
def serve():
    """Starts real HTTP servers that behave as their paths say; gives the address of the root."""
    recording = (RECORDINGS / "english.wav").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            with contextlib.suppress(OSError):
                self.answer(self.path[1:])

        def answer(self, path):
            stopped = self.server.stopped
            if path == "slow-header":
                while not stopped.wait(0.2):
                    self.wfile.write(b"H")
            elif path == "missing":
                self.send_error(404)
            elif path.startswith(("to=", "late-to=")):
                stopped.wait(path.startswith("late"))  # 1 s
                self.send_response(302)
                self.send_header("Location", urllib.parse.unquote(path.partition("=")[2]))
                self.end_headers()
            elif path == "loop":
                self.send_response(302)
                self.send_header("Location", "/loop")
                self.end_headers()
            elif path == "chunked":
                self.protocol_version = "HTTP/1.1"
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for start in range(0, len(recording), 50_000):
                    piece = recording[start : start + 50_000]
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.write(b"0\r\n\r\n")
            elif path in ("endless", "slow"):
                self.send_response(200)
                self.end_headers()
                while not stopped.wait(0.2 if path == "slow" else 0):
                    self.wfile.write(bytes(1 if path == "slow" else 2**16))
            elif path == "partial" or "Range" in self.headers:
                first, last = 0, 99_999
                if "Range" in self.headers:
                    first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"]).groups()
                piece = recording[int(first) : int(last or len(recording)) + 1]
                self.send_response(206)
                self.send_header("Content-Length", str(len(piece)))
                self.send_header("Content-Range", f"bytes {first}-{int(first) + len(piece) - 1}/{len(recording)}")
                self.end_headers()
                self.wfile.write(piece)
            else:
                self.send_response(200)
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(len(recording) + 1000 * (path == "short")))
                self.end_headers()
                self.wfile.write(recording)

    def serve(certificate: trustme.LeafCert | None = None) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.stopped = threading.Event()
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(context)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}/"

    servers = []
    yield serve
    for server in servers:
        server.stopped.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def web(serve) -> str:
    return serve()


def test_broken_files_are_decoded_or_refused():
    """3,000 seeded mutations in processes of their own, so that a crash of the interpreter is seen as one."""
    script = Path(__file__).with_name("fuzz.py")
    runs = [
        subprocess.Popen([sys.executable, script, "1500", "--seed", seed], stdout=subprocess.PIPE, text=True)
        for seed in "01"
    ]
    for run in runs:
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 0, output
        count = {name: float(value) for name, value in re.findall(r"([a-z]+)=([0-9.]+)", output)}
        assert count["decoded"] > 200 and count["refused"] > 200 and count["decoded"] + count["refused"] == 1500
        assert count["seconds"] < 5 and count["megabytes"] < 300


def test_downloads(web):
    expected = fetch_audio(RECORDINGS / "english.wav")
    for path in ("clip.wav", "chunked", f"to={web}clip.wav", "to=/to%3D/chunked"):
        assert torch.equal(fetch_audio(web + path), expected), path


def test_secure_downloads(serve, monkeypatch, tmp_path):
    """Certificates are checked, also where the address is, and a server that never speaks costs no more than time."""
    authority = trustme.CA()
    web, other = serve(authority.issue_cert("127.0.0.1")), serve(authority.issue_cert("elsewhere.example"))
    expected = fetch_audio(RECORDINGS / "english.wav")
    monkeypatch.setattr(audio_utils, "is_public", lambda address: True)
    for limits in ({}, {"public_only": True}):
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        with pytest.raises(AudioError, match="CERTIFICATE_VERIFY_FAILED"):
            fetch_audio(f"{web}clip.wav", **limits)
        authority.cert_pem.write_to_path(tmp_path / "authority.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        for path in ("clip.wav", "chunked", f"to={web}clip.wav", f"to={serve()}clip.wav"):
            assert torch.equal(fetch_audio(web + path, **limits), expected)
        with pytest.raises(AudioError, match="mismatch"):
            fetch_audio(f"{web}to={other}clip.wav", **limits)
        for path in ("slow", "slow-header"):
            with pytest.raises(AudioError, match="took longer than the limit of 1 s"):
                fetch_audio(web + path, timeout=1, **limits)


@pytest.mark.parametrize(
    "path, limits, message",
    [
        ("missing", {}, "cannot be read: HTTP Error 404"),
        ("short", {}, "ended 1000 bytes early|IncompleteRead"),
        ("partial", {}, "answered with HTTP status 206 instead of 200"),
        ("endless", {"max_bytes": 10**6}, "larger than the limit of 1000000 bytes"),
        ("clip.wav", {"max_bytes": 1000}, "larger than the limit of 1000 bytes"),
        ("slow", {"timeout": 1}, "took longer than the limit of 1 s"),
        ("slow-header", {"timeout": 1}, "took longer than the limit of 1 s"),
        ("loop", {}, "infinite loop"),
        ("to=file:///etc/hostname", {}, "file:///etc/hostname. is not allowed"),
        ("to=ftp://127.0.0.1/clip.wav", {}, "which is not on the web"),
    ],
)
def test_downloads_have_limits(path, limits, message, web):
    start = time.monotonic()
    with pytest.raises(AudioError, match=message):
        fetch_audio(web + path, **limits)
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("limits", [{}, {"public_only": True}])
def test_one_deadline_for_redirects_and_handshakes(limits, web, monkeypatch):
    """A slow redirect, to a server that accepts connections and sends its TLS handshake a byte at a time."""
    monkeypatch.setattr(audio_utils, "is_public", lambda address: True)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            with contextlib.suppress(OSError), server.accept()[0] as connection:
                connection.sendall(b"\x16\x03\x03\x40\x00")  # a handshake record of 16 KB
                while True:
                    connection.sendall(bytes(1))
                    time.sleep(0.1)

        thread = threading.Thread(target=drip)
        thread.start()
        start = time.monotonic()
        with pytest.raises(AudioError, match="took longer than the limit of 1.5 s"):
            fetch_audio(f"{web}late-to=https://127.0.0.1:{server.getsockname()[1]}/", timeout=1.5, **limits)
        assert 1.5 <= time.monotonic() - start < 2
        thread.join()


def test_a_server_opens_public_addresses_only(web, monkeypatch):
    """Loopback, private and link-local addresses, by number, by name, in every spelling and after a redirect."""
    port = urllib.parse.urlsplit(web).port
    hosts = ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "10.0.0.1", "192.168.1.1", "169.254.169.254", "2130706433"]
    hosts += ["[::ffff:127.0.0.1]", "[fe80::1]", "[fd00::1]", "100.64.0.1", "224.0.0.1", "127.1", "[2002:7f00:1::]"]
    hosts += ["[64:ff9b::7f00:1]", "[64:ff9b:1::1]", "[fec0::1]", "192.0.0.192", "168.63.129.16"]
    for host in hosts:
        for scheme in ("http", "https"):
            with pytest.raises(AudioError, match="not a public address|cannot be read"):
                fetch_audio(f"{scheme}://{host}:{port}/clip.wav", public_only=True, timeout=5)
    for source in (str(RECORDINGS / "jfk.wav"), RECORDINGS / "jfk.wav", (RECORDINGS / "jfk.wav").as_uri()):
        with pytest.raises(AudioError, match="local files are not opened here"):
            fetch_audio(source, public_only=True)

    # A public server that redirects to this machine, as the resolver and the check see it.
    checked = []

    def first_is_public(address):
        checked.append(str(address))
        return len(checked) == 1

    monkeypatch.setattr(audio_utils, "is_public", first_is_public)
    with pytest.raises(AudioError, match="'localhost' resolves to is not a public address"):
        fetch_audio(f"{web}to=http://localhost:{port}/clip.wav", public_only=True)
    assert checked[0] == "127.0.0.1"


def test_public_addresses_pass():
    for address in ("93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8"):
        assert audio_utils.is_public(ipaddress.ip_address(address))


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


def test_windows_together_equal_windows_alone(extractor, monkeypatch):
    """As an accelerator transforms them: many at once, of unequal lengths, the last batch not full."""
    generator = torch.Generator().manual_seed(2)
    windows = [0.1 * torch.randn(n, generator=generator) for n in (1, 480_000, 16_000, 479_900, 250_000, 480_000, 40)]
    alone = log_mel(windows, extractor)
    monkeypatch.setattr(audio_utils, "WINDOWS_AT_ONCE", {"cpu": 3})
    torch.testing.assert_close(log_mel(windows, extractor), alone, atol=1e-6, rtol=0)


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
