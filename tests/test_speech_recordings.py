"""make test ONLY=tests/test_speech_recordings.py: the recordings and the clips without speech of the test set."""

import gzip

import av
import numpy as np
import pytest

from audio_utils import SAMPLING_RATE, fetch_audio
from demo.ask import read_rows
from demo.bases import ASSETS
from speech import recordings


TEXTS = """\
; Core sounds

one-moment: One moment,  please.
menu: ...to mute or umute yourself.
beep: [a beep]
vm-intro: Leave a message after the tone. (simple tone)
join: <beep ascending>
silence/1: (1 second of silence)
digits/1: one
letters/a: a
phonetic/a_p: alpha
help: press * to pause
web: visit www.asterisk.org
spy-sip: SIP
spy-nbs: N B S
spy-local: Local
for: ... for ...
lost: This one was never recorded.
long: A very long explanation.
"""


def encode_g722(samples: np.ndarray, path):
    """Writes float32 `[samples]` at 16 kHz as raw G.722."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="g722") as output:
        stream = output.add_stream("g722", rate=SAMPLING_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray((samples[None] * 2**15).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate = SAMPLING_RATE
        output.mux([*stream.encode(frame), *stream.encode(None)])


def tone(seconds: float) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(SAMPLING_RATE * seconds)) / SAMPLING_RATE)).astype(np.float32)


@pytest.fixture
def write_packages(tmp_path, monkeypatch):
    """`write_packages(texts, seconds)` writes the files of the packages, with recordings of these lengths by name."""
    monkeypatch.setattr(recordings, "fetch_packages", lambda folder: tmp_path)

    def write(texts: str, seconds: dict[str, float]):
        (tmp_path / recordings.TEXTS).parent.mkdir(parents=True)
        (tmp_path / recordings.TEXTS).write_bytes(gzip.compress(texts.encode()))
        for name, length in seconds.items():
            encode_g722(tone(length), tmp_path / recordings.SOUNDS / f"{name}.g722")

    return write


def test_rules_drop_what_is_no_fair_test(write_packages, tmp_path):
    names = recordings.read_texts(TEXTS)
    write_packages(TEXTS, {name: 31 if name == "long" else 0.5 for name in names if name != "lost"})
    rows, dropped = recordings.write_recordings(tmp_path / "out")
    assert {row["text"]: row["group"] for row in rows} == {
        "One moment, please.": "three or more words",
        "to mute or unmute yourself.": "three or more words",
        "Local": "shorter",
        "for": "shorter",
    }
    assert {" ".join(reason.split()[:2]): count for reason, count in dropped.items()} == {
        "silence, a": 4,
        "a digit,": 3,
        "a sign": 2,
        "an abbreviation": 2,
        "has a": 1,
        "longer than": 1,
    }
    assert rows == read_rows(tmp_path / "out" / "rows.jsonl")
    for row in rows:
        assert len(fetch_audio(tmp_path / "out" / row["audio"])) == SAMPLING_RATE * row["seconds"] == 8_000
    assert rows == recordings.write_recordings(tmp_path / "again")[0]  # in the same order


def test_sentences_of_a_text_are_left_out_of_training_as_well(write_packages, tmp_path):
    write_packages("login: Login incorrect.  Please try again.\n", {"login": 0.5})
    recordings.write_recordings(tmp_path / "out")
    left_out = (tmp_path / "out" / "texts.txt").read_text().splitlines()
    assert left_out == ["Login incorrect.", "Login incorrect. Please try again.", "Please try again."]


def test_g722_is_decoded_to_what_was_encoded(tmp_path):
    samples = tone(1)
    encode_g722(samples, tmp_path / "tone.g722")
    decoded = recordings.decode_g722(tmp_path / "tone.g722")
    assert decoded.dtype == np.float32 and decoded.shape == (16_000,)
    assert np.abs(np.fft.rfft(decoded)).argmax() == 440
    assert decoded.std() == pytest.approx(samples.std(), rel=0.05)


def test_what_is_missing_for_the_packages_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(recordings.shutil, "which", lambda tool: None)
    with pytest.raises(RuntimeError, match="no apt-get and no dpkg-deb here"):
        recordings.fetch_packages(tmp_path)
    monkeypatch.setattr(recordings.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    (tmp_path / "asterisk-core-sounds-en_1.6.1-1_all.deb").write_bytes(b"another version")
    with pytest.raises(RuntimeError, match="has sha256 [0-9a-f]{64}, expected 973e797d"):
        recordings.fetch_packages(tmp_path)


def loudness_range(samples: np.ndarray) -> float:
    """How many times louder the loud tenths of a second are than the quiet ones."""
    frames = samples[: len(samples) // 1_600 * 1_600].reshape(-1, 1_600)
    low, high = np.quantile(frames.std(1), [0.1, 0.9])
    return high / low if low else 1


def test_silences_have_the_lengths_that_are_said_and_no_speech(tmp_path):
    rows = recordings.write_silences(tmp_path / "a", count=60)
    assert {row["group"] for row in rows} == set(recordings.SILENCES) and {row["text"] for row in rows} == {""}
    clips = [fetch_audio(tmp_path / "a" / row["audio"]).numpy() for row in rows]
    assert [round(len(clip) / SAMPLING_RATE, 3) for clip in clips] == [row["seconds"] for row in rows]
    assert 1 <= min(row["seconds"] for row in rows) < 2 and 7 < max(row["seconds"] for row in rows) < 8
    # Speech comes in syllables and pauses; these sounds stay as loud as they are.
    assert max(map(loudness_range, clips)) < 4 < loudness_range(fetch_audio(ASSETS / "audio" / "jfk.wav").numpy())
    levels = [clip.std() for clip, row in zip(clips, rows, strict=True) if row["group"] != "silence"]
    assert max(levels) > 30 * min(levels) > 0
    assert rows == recordings.write_silences(tmp_path / "b", count=60)
    assert len(recordings.write_silences(tmp_path / "c", count=6, seed=1)) == 6
    assert recordings.write_silences(tmp_path / "c", count=6, seed=1) != rows[:6]
