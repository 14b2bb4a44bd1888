"""make test ONLY=tests/test_audio_utils.py: every way to hand over a clip, and what is refused."""

import base64
import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import multiprocess
import numpy as np
import pytest
import soundfile
import soxr
import torch
from helpers import answer, start_python
from sounds import ENCODINGS, RECORDINGS, encode
from transformers import WhisperFeatureExtractor

import audio_decoding
import audio_utils
from audio_streaming import stream_audio
from audio_utils import AudioError, fetch_all, fetch_audio, log_mel
from demo.bases import ASSETS
from publishing.paths import ROOT


FLAC = RECORDINGS / "audio-stereo-16-bit-44100Hz.flac"


@pytest.fixture(scope="module")
def original() -> np.ndarray:
    """3 s of speech, float32 at 16 kHz."""
    return fetch_audio(RECORDINGS / "jfk.wav")[:48_000].numpy()


def test_files_are_exact():
    """A mono file at its own rate, and the mean of the channels of a stereo file."""
    expected, _ = soundfile.read(RECORDINGS / "jfk.wav", dtype="float32")
    assert torch.equal(fetch_audio(str(RECORDINGS / "jfk.wav")), torch.from_numpy(expected))
    stereo, _ = soundfile.read(FLAC, dtype="float32")
    torch.testing.assert_close(fetch_audio(FLAC, sr=44100), torch.from_numpy(stereo.mean(axis=1)), atol=1e-6, rtol=0)


def test_files_of_a_batch_are_opened_in_order(original):
    paths = [str(RECORDINGS / name) for name in ("jfk.wav", "jfk.mp3", "english.wav")]
    content = {"type": "audio", "audio": {"bytes": Path(paths[1]).read_bytes(), "path": None}}
    clips = [*paths, content, original] * 3
    expected = [fetch_audio(clip) for clip in clips]
    clips += [io.BytesIO(Path(path).read_bytes()) for path in paths]
    for one, many in zip([*expected, *expected[:3]], fetch_all(clips), strict=True):
        assert torch.equal(one, many)
    assert fetch_all([]) == []
    with pytest.raises(AudioError, match=r"first\.wav"):
        fetch_all([paths[0], "/missing/first.wav", io.BytesIO(b"no audio"), "/missing/second.wav"])


@pytest.fixture
def batch(original, monkeypatch) -> list[bytes]:
    """Ten different MP3 files, which are decoded in two processes that begin with them."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    audio_decoding.make_pools()
    return [encode(original[: 8_000 + 3_000 * i], "clip.mp3", "stereo") for i in range(10)]


def list_processes() -> list:
    return [worker.process for worker in audio_decoding.BATCHES.free if worker.process]


def test_many_files_are_decoded_in_processes(batch, tmp_path):
    (tmp_path / "clip.mp3").write_bytes(batch[3])
    expected = [fetch_audio(clip) for clip in batch]
    assert not list_processes()
    for _ in range(2):
        for one, many in zip(expected, fetch_all([*batch[:3], tmp_path / "clip.mp3", *batch[4:]]), strict=True):
            assert torch.equal(one, many)
        assert 1 <= len(list_processes()) <= 2
    for process in list_processes():
        os.kill(process.pid, signal.SIGKILL)
    assert all(map(torch.equal, expected, fetch_all(batch)))


def test_an_error_in_a_process_is_the_error_here(batch):
    broken = batch[0][:50] + b"x" * 100
    with pytest.raises(AudioError) as here:
        fetch_audio(broken)
    with pytest.raises(AudioError) as there:
        fetch_all([*batch, broken])
    assert str(here.value) == str(there.value)
    with pytest.raises(AudioError, match=r"longer than the limit of 0\.6 s"):
        fetch_all(batch, max_seconds=0.6)


def test_a_file_that_a_process_refuses_is_read_from_its_begin(batch, tmp_path):
    """The process moves the place in a file that it shares with this one."""
    (tmp_path / "clip.mp3").write_bytes(encode(np.tile(fetch_audio(batch[9]).numpy(), 40), "clip.mp3"))
    with pytest.raises(AudioError, match="longer than the limit of 20 s"):
        fetch_all([*batch, tmp_path / "clip.mp3"], max_seconds=20)


def test_an_interrupted_call_keeps_no_process(batch):
    """Ctrl-C in a notebook, while every process is busy."""
    pool = audio_decoding.WorkerPool(1, 60)
    worker = pool.free.pop()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        pool.decode(io.BytesIO(batch[0]), "clip", 60.0, time.monotonic() + 60)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    pool.free.append(worker)
    pool.give_turns()
    assert pool.free == [worker]


def test_a_process_imports_from_where_this_one_does(batch, tmp_path):
    """Some programs change `sys.path`, so that an interpreter that they start finds no PyAV."""
    (tmp_path / "clip.mp3").write_bytes(batch[9])
    program = f"""
import sys, time
sys.path[:0] = {[str(ROOT), *sys.path]!r}
from audio_decoding import WorkerPool
with open({str(tmp_path / "clip.mp3")!r}, "rb") as file:
    print(len(WorkerPool(1, 60).decode(file, "clip", 60.0, time.monotonic() + 60)[0]))
"""
    command = [sys._base_executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(audio_decoding.decode(io.BytesIO(batch[9]), "clip")[0]), done.stderr


def test_files_are_opened_after_the_end_of_the_main_thread(batch, tmp_path):
    (tmp_path / "clip.mp3").write_bytes(batch[9])
    program = f"""
import sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from audio_utils import fetch_all
def work():
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    print(len(fetch_all(2 * ["clip.mp3"])))
threading.Thread(target=work).start()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "2\n", done.stderr


def test_a_forked_process_decodes_with_processes_of_its_own(batch):
    clip = batch[9]
    expected, before = fetch_all(batch), {process.pid for process in list_processes()}
    samples, rate = audio_decoding.decode(io.BytesIO(clip), "clip")
    child = os.fork()
    if not child:
        forked = audio_decoding.decode_in_batch(io.BytesIO(clip), "clip", 60.0)
        (own,) = list_processes()
        os._exit(own.pid in before or forked[1] != rate or not np.array_equal(forked[0], samples))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(map(torch.equal, expected, fetch_all(batch)))
    assert {process.pid for process in list_processes()} >= before


@pytest.mark.parametrize("module", [multiprocessing, multiprocess], ids=lambda module: module.__name__)
def test_a_process_of_a_data_loader_or_of_datasets_starts_no_others(batch, module):
    def decode():
        audio_decoding.decode_in_batch(io.BytesIO(batch[9]), "clip", 60.0)
        os._exit(len(list_processes()))

    child = module.get_context("fork").Process(target=decode)
    child.start()
    child.join()
    assert child.exitcode == 0


def best_match(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, int]:
    """The correlation of two clips where they fit best, and by how many samples the first one is late there."""
    size = 2 * max(len(ours), len(theirs))
    correlation = np.fft.irfft(np.fft.rfft(ours, size) * np.fft.rfft(theirs, size).conj())
    shift = int(np.argmax(correlation))
    shift -= size if shift > size // 2 else 0
    ours, theirs = ours[max(shift, 0) :], theirs[max(-shift, 0) :]
    length = min(len(ours), len(theirs))
    return np.corrcoef(ours[:length], theirs[:length])[0, 1], shift


@pytest.mark.parametrize("at, seconds", [(0, 3.0), (1, 2.5)])
@pytest.mark.parametrize("name", ["aac.m4a", "opus.webm"])
def test_audio_keeps_its_place_in_a_video(name, at, seconds, original):
    """Audio that begins after the pictures, and a gap between its timestamps."""
    padded = np.concatenate([original, np.zeros(64_000, np.float32)])  # pictures last as long as the gap and more
    content = encode(padded, name, video=True, gap=(at, seconds))
    place, middle = at * 16_000, round((at + seconds / 2) * 16_000)
    for ours in (fetch_audio(content).numpy(), torch.cat([*stream_audio(content)]).numpy()):
        # A packet has 20 ms, so the gap is where one begins.
        assert at == 0 or best_match(ours[:middle], original[: place + 640])[0] > 0.95
        correlation, delay = best_match(ours[middle:], original[place:])
        assert correlation > 0.95 and abs(delay - seconds / 2 * 16_000) < 800, (correlation, delay)
    with pytest.raises(AudioError, match="lasts longer than the limit of 5 s"):
        fetch_audio(content, max_seconds=5)


@pytest.mark.parametrize("layout", ["mono", "stereo"])
@pytest.mark.parametrize("name", ENCODINGS)
def test_formats(name, layout, original):
    """Against the sound before it was encoded, and where libsndfile can read the file against that."""
    if name == "clip.amr" and layout == "stereo":
        pytest.skip("AMR is mono")
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


@pytest.mark.parametrize(
    "name, layout", [("aac.m4a", "5.1"), ("aac.m4a", "7.1"), ("s24.flac", "7.1"), ("s16.wav", "7.1"), ("aac.m4a", None)]
)
def test_surround_sound_and_the_track_of_a_video(name, layout, original):
    """PyAV itself crashes on eight planes of samples (with a segmentation fault)."""
    ours = fetch_audio(encode(original, name, layout or "mono", video=layout is None)).numpy()
    assert best_match(ours, original)[0] > 0.98


def test_every_way_to_hand_over_a_clip():
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
        {"array": samples, "path": "elsewhere.wav", "sampling_rate": rate},
        {"bytes": content, "path": "elsewhere.wav"},
        {"bytes": None, "path": str(path)},
        {"type": "audio", "audio": samples, "sampling_rate": rate},
        {"audio_url": {"url": path.as_uri()}},
        {"input_audio": {"data": encoded, "format": "wav"}},
    ]
    for way in ways:
        assert torch.equal(fetch_audio(way), expected), type(way)


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
        for name in ("jfk.wav", "english.wav", "{FLAC.name}", "sample1.webm"):
            path = f"{RECORDINGS}/{{name}}"
            rows = datasets.Dataset.from_dict({{"audio": [path]}})
            decoder = rows.cast_column("audio", datasets.Audio())[0]["audio"]
            slower = rows.cast_column("audio", datasets.Audio(sampling_rate=8000))[0]["audio"]
            expected = fetch_audio(path)
            assert isinstance(decoder, AudioDecoder)
            torch.testing.assert_close(fetch_audio(decoder), expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(fetch_audio({{"audio": AudioDecoder(path)}}), expected, atol=1e-4, rtol=0)
            assert abs(len(fetch_audio(slower)) - len(expected)) < 160  # 10 ms, which torchcodec drops of Vorbis
        print("TOKENS")
    """
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:{libraries}"}
    answer(start_python(code, env=environment))


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
    stereo = np.stack([left, right])
    for samples in (stereo, stereo.T, np.flip(np.flip(stereo, 1).copy(), 1)):
        torch.testing.assert_close(fetch_audio(samples), expected)
    assert len(fetch_audio(np.zeros((1, 700), np.int16))) == len(fetch_audio(np.zeros((700, 1), np.int16))) == 700


@pytest.mark.parametrize("rate", [1001, 8000, 11025, 22050, 44100, 47_999, 48000, 96000, 767_999])
def test_resampling_keeps_pitch_and_length(rate):
    """Also between rates without a common divisor."""
    hertz = 100 if rate < 8000 else 1000
    tone, expected = (torch.sin(2 * torch.pi * hertz * torch.arange(2 * n) / n) for n in (rate, 16_000))
    resampled = fetch_audio((tone, rate))
    assert len(resampled) == 32_000
    torch.testing.assert_close(resampled[500:-500], expected[500:-500], atol=2e-3, rtol=0)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("samples", [None, 1, 7, 1000])
def test_both_resamplers_agree(rate, samples):
    """What an accelerator would do, run on the CPU: equal for all but the last digits, at the edges as well."""
    accelerated = audio_utils.torchaudio_resampler(rate, 16_000, torch.device("cpu"))
    for path in (RECORDINGS / "jfk.wav", FLAC):
        sound = fetch_audio(path, sr=rate)[rate // 2 :][:samples]
        expected = audio_utils.resample(sound, rate, 16_000)
        assert len(expected) == round(len(sound) * 16_000 / rate)
        torch.testing.assert_close(accelerated(sound)[: len(expected)], expected, atol=5e-4, rtol=0)


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
        "torchaudio does not import: PyAV resamples the audio for the accelerator on the CPU."
    ]


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere/clip.wav", r"nowhere/clip.wav' is neither an existing file, nor an address, nor base64"),
        ("file:///nowhere/clip.wav", "nowhere/clip.wav"),
        ("http://127.0.0.1:9/clip.wav", "cannot be read: .*refused"),
        pytest.param("data:audio/wav;base64," + "A" * 100_000 + "#", "cannot be read", id="long"),
        (b"", "content of 0 bytes cannot be decoded"),
        (b"no sound at all" * 99, "content of 1485 bytes cannot be decoded"),
        *[(bytearray(FLAC.read_bytes()[:size]), f"of {size} bytes cannot be decoded") for size in (10, 100, 4000)],
        (np.zeros(0, np.float32), "holds no samples"),
        (np.array([0.1, np.nan]), "not finite"),
        (np.array([0.1, np.inf], np.float32), "not finite"),
        (np.array([12000.0, -3000.0]), "peak of 12000, but full scale is 1.0"),
        (np.zeros((5, 5)), r"shape \(5, 5\) .* could be \[channels, samples\] or \[samples, channels\]"),
        (np.zeros((9, 900)), "or is neither"),
        (np.zeros((2, 3, 4)), "expected .samples., "),
        (np.zeros(5, bool), "expected float, int16, int32 or uint8"),
        (np.zeros(5, np.int64), "int64 is not audio"),
        (np.array(["a"]), "is not audio"),
        ([0.1, 0.2], "The list is not audio"),
        (None, "NoneType is not audio"),
        (ASSETS / "images" / "chelsea.png", "chelsea.png"),
        ({"type": "audio"}, "exactly one source"),
        ({"url": "a.wav", "path": "b.wav"}, "has url, path"),
        ((np.zeros(5, np.float32), 0), "whole number of Hz from 1000 to 768000, got 0"),
        ((np.zeros(5, np.float32), 44100.5), "got 44100.5"),
        ((np.zeros(2, np.float32), 768_000), "too short: 2 samples at 768000 Hz are none at 16000 Hz"),
        # Others are refused in any words.
        *[(np.zeros(shape), "") for shape in ((0, 0), (), (1, 1, 1, 1, 1))],
        (np.float32(0.5), ""),
        *[(np.zeros(3, dtype), "") for dtype in (complex, object, [("left", "f4"), ("right", "f4")], "datetime64[s]")],
        (np.broadcast_to(np.zeros((1, 1)), (2**20, 2**20)), ""),
        *[(torch.zeros(3, dtype=dtype), "") for dtype in (torch.complex64, torch.bool)],
        (torch.zeros(2, 3).to_sparse(), ""),
        (torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), ""),
        (torch.zeros((0, 3)), ""),
        ({"array": [[0.1, 0.2], [0.3]], "sampling_rate": 16_000}, ""),
        ({"array": ["a", None], "sampling_rate": 16_000}, ""),
        *[({"array": np.zeros(9, np.float32), "sampling_rate": rate}, "") for rate in ("high", [16_000], float("nan"))],
        ({"audio": {"audio": {"audio": {"url": "x"}}}}, ""),
        ((np.zeros(9, np.float32), 16_000, 1), ""),
    ],
)
def test_what_is_no_sound_is_refused_by_name(source, message):
    with pytest.raises(AudioError, match=message) as error:
        fetch_audio(source)
    assert len(str(error.value)) < 300


def test_a_mask_and_long_doubles_are_not_lost():
    """torch knows neither: it would take the samples under a mask, and raise TypeError for the other."""
    samples = np.linspace(-0.5, 0.5, 16_000)
    assert torch.equal(fetch_audio(samples.astype(np.longdouble)), fetch_audio(samples))
    assert torch.equal(fetch_audio(np.ma.masked_array(samples)), fetch_audio(samples))
    with pytest.raises(AudioError, match="has masked samples; fill them"):
        fetch_audio(np.ma.masked_array(samples, mask=samples > 0))


def test_a_video_without_sound_is_refused():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        output.mux(stream.encode(None))
    with pytest.raises(AudioError, match="no audio track"):
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


@pytest.fixture(scope="module", params=[80, 128])
def extractor(request):
    return WhisperFeatureExtractor(feature_size=request.param)


def test_log_mel_equals_whisper(extractor):
    """Clips of any length up to a window, and extreme ones."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, 159, 200, 201, 400, 16_000, 80_001, 479_599, 479_800, 479_999, 480_000]
    clips = [0.1 * torch.randn(length, generator=generator) for length in lengths]
    clips += [torch.zeros(16_000), torch.ones(30_000), torch.full((480_000,), -0.5)]
    clips += [torch.randn(90_000, generator=generator).sign(), 1e-6 * torch.randn(4000, generator=generator)]
    clips += [fetch_audio(RECORDINGS / "jfk.wav")]
    expected = extractor([clip.numpy() for clip in clips], sampling_rate=16_000, return_tensors="pt")["input_features"]
    torch.testing.assert_close(log_mel(clips, extractor), expected, atol=1e-5, rtol=0)


def test_windows_together_equal_windows_alone(extractor, monkeypatch):
    """As an accelerator transforms them: many at once, of unequal lengths, the last batch not full."""
    generator = torch.Generator().manual_seed(2)
    windows = [0.1 * torch.randn(n, generator=generator) for n in (1, 480_000, 16_000, 479_900, 250_000, 480_000, 40)]
    alone = log_mel(windows, extractor)
    monkeypatch.setattr(audio_utils, "WINDOWS_AT_ONCE", {"cpu": 3})
    torch.testing.assert_close(log_mel(windows, extractor), alone, atol=1e-6, rtol=0)


def test_dither_is_refused():
    with pytest.raises(ValueError, match="dither"):
        log_mel([torch.zeros(5)], WhisperFeatureExtractor(feature_size=128, dither=0.1))
