"""
make test ONLY=tests/test_speech_data.py: training texts (Debian: wordnet-base, fortunes, scowl).
`make test-speech` tests clips as well (Debian's synthesizers and `demo/requirements.txt`).
"""

import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from audio_utils import SAMPLING_RATE, fetch_audio
from demo.ask import read_rows, write_rows
from evaluation.scoring import normalize
from speech import clips, sentences, sources
from speech.generated import LETTERS, Templates, spell, spell_ordinal
from speech.sounds import SOUNDS, make_sound


FOLDERS = (sources.WORDNET, sources.FORTUNES, sources.SCOWL)
needs_texts = pytest.mark.skipif(
    not all(folder.is_dir() for folder in FOLDERS), reason="needs Debian's wordnet-base, fortunes and scowl"
)


def needs_voices(test):
    missing = not all(map(shutil.which, ("espeak-ng", "flite", "festival")))
    return pytest.mark.speech(needs_texts(pytest.mark.skipif(missing, reason="needs Debian's synthesizers")(test)))


@needs_texts
def test_texts_follow_from_the_seed_and_more_of_them_begin_with_the_same():
    texts = sentences.deal(60, seed=1)
    assert sentences.deal(40, seed=1) == texts[:40]
    assert sentences.deal(40, seed=2) != texts[:40]
    assert len({text for text, _ in texts}) == 60


@needs_texts
def test_texts_are_clean():
    for text, source in sentences.deal(300, seed=3):
        assert 1 <= len(text.split()) <= sources.MAX_WORDS and len(text) <= 145, text
        assert sources.SENTENCE.fullmatch(text) or source == "joined", text
        assert not set(text) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz ,;:.!?'-"), text
    is_clean = sources.read_sources().is_clean
    assert is_clean("No, the twenty-one cats aren't John's.")
    for text in ("at 7 o'clock", "He met Mr. Smith", "on TV", "a qwrtz", "a  b", "the (old) man", "", "word " * 26):
        assert not is_clean(text), text


@needs_texts
def test_held_out_texts_are_never_said_in_training():
    held_out = sentences.deal(50, seed=4, held_out=True)
    assert all(sentences.is_held_out(normalize(text)) for text, _ in held_out)
    assert all(3 <= len(text.split()) <= 20 and source in ("wordnet", "fortune") for text, source in held_out)
    for text, source in sentences.deal(300, seed=4):
        parts = [text] if source != "joined" else text.split(". ")
        assert not any(sentences.is_held_out(normalize(part)) for part in parts), text


@needs_texts
def test_excluded_texts_are_not_said(tmp_path):
    said = [text for text, _ in sentences.deal(100, seed=5)]
    (tmp_path / "texts.txt").write_text("\n".join([f"a-name: {said[0].upper()}", said[1], f"One. {said[2]}", ""]))
    excluded = sentences.read_excluded(tmp_path / "texts.txt")
    assert {normalize(text) for text in said[:3]} <= excluded and "one" in excluded
    again = {normalize(text) for text, _ in sentences.deal(100, seed=5, exclude=excluded)}
    assert not again & excluded and len(again) == 100


@needs_texts
@pytest.mark.parametrize("name", sentences.MIXES)
def test_lengths_of_a_mix(name):
    texts = [text for text, _ in sentences.deal(300, seed=3, mix=name)]
    assert len(set(texts)) == 300
    for length, share in sentences.MIXES[name].lengths.items():
        low, high = sentences.LENGTHS[length]
        assert sum(low <= len(text) <= high for text in texts) / len(texts) == pytest.approx(share, abs=0.1)


@needs_texts
def test_words_that_are_common_are_said():
    words = [word for text, _ in sentences.deal(1000, seed=6) for word in sources.words_of(text)]
    common = sources.read_sources().common
    assert len(common) == sources.NUM_COMMON and len(words) > 5000
    assert len(set(words).intersection(common)) > 2500


def test_numbers_are_spelled():
    numbers = (0, 13, 21, 40, 105, 990, 1_001, 12_345, 7_000_000)
    assert [spell(number) for number in numbers] == [
        *("zero", "thirteen", "twenty-one", "forty", "one hundred and five", "nine hundred and ninety"),
        *("one thousand and one", "twelve thousand three hundred and forty-five", "seven million"),
    ]
    assert [normalize(spell(number)) for number in numbers] == list(map(str, numbers))
    ordinals = ["first", "second", "third", "twelfth", "twentieth", "twenty-first", "thirtieth"]
    assert [spell_ordinal(number) for number in (1, 2, 3, 12, 20, 21, 30)] == ordinals
    assert "A" not in LETTERS


def test_templates_are_filled_with_fresh_words():
    kinds = ("animal", "artifact", "food", "person", "place", "adjective", "word")
    templates = Templates({kind: [f"{kind}{letter}" for letter in "abcdef"] for kind in kinds})
    rng = random.Random(0)
    for kind in ("number", "letters", "instruction", "question", "statement"):
        texts = [templates.make(kind, rng) for _ in range(300)]
        assert len(set(texts)) > 100 and not any(set(text) & set("{}0123456789") for text in texts)


def test_nothing_is_said_in_sounds():
    for number, kind in enumerate(SOUNDS):
        samples = make_sound(kind, np.random.default_rng(number))
        assert samples.dtype == np.float32 and SAMPLING_RATE <= len(samples) <= 8 * SAMPLING_RATE
        assert np.isfinite(samples).all() and np.abs(samples).max() <= 0.9
        assert np.array_equal(samples, make_sound(kind, np.random.default_rng(number)))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 12 clips, of which a third says nothing, by synthesizers that start at once."""
    monkeypatch.setattr(clips, "CHUNK", 12)
    monkeypatch.setattr(clips, "NOTHING", 1 / 3)
    monkeypatch.setattr(clips, "ENGINES", {"flite": 2, "espeak-ng": 1})
    monkeypatch.setattr(clips, "OTHER_SPEAKER", 0)


@needs_voices
def test_chunks_hold_clips_and_rows(small_chunks, tmp_path):
    (tmp_path / "clips").mkdir()
    texts = sentences.deal(12, seed=7)
    clips.write_chunk(tmp_path, 2, texts, seed=7, held_out=False, longest=10)
    rows = read_rows(clips.rows_of(tmp_path, 2, 12))
    assert rows[0]["audio"] == "clips/000024.flac"
    nothing = [row for row in rows if row["engine"] == "none"]
    assert nothing and all(row["text"] == "" and row["source"] == "nothing said" for row in nothing)
    for row in rows:
        samples = fetch_audio(tmp_path / row["audio"])
        assert abs(len(samples) / SAMPLING_RATE - row["seconds"]) < 0.01 and samples.abs().max() < 0.99
        assert clips.SHORTEST <= row["seconds"] <= 10
        assert row["engine"] == "none" or row["text"] in {text for text, _ in texts}
        assert set(row) == {"audio", "text", "seconds", "engine", "voice", "source"}


@needs_voices
def test_clips_follow_from_the_seed(small_chunks):
    texts = sentences.deal(8, seed=8)
    first, again = (clips.make_clips(texts, "8") for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one[0], other[0]) and one[1] == other[1]


@needs_voices
def test_held_out_voices_are_never_trained_on(monkeypatch):
    monkeypatch.setattr(clips, "HELD_OUT_ENGINES", {"flite": 1, "espeak-ng": 1})
    rng, variants = random.Random(0), clips.espeak_variants(False) + clips.espeak_variants(True)
    trained = {clips.cast("a", rng, variants, False).voice for _ in range(3000)}
    held_out = {clips.cast("a", rng, variants, True).voice for _ in range(300)}
    assert not trained & held_out
    written = clips.make_clips(sentences.deal(6, seed=9, held_out=True), "9", held_out=True)
    assert all(row["text"] and row["voice"] not in trained for _, row in written)


@needs_texts
def test_a_run_goes_on_where_it_ended(small_chunks, monkeypatch, tmp_path, capsys):
    numbers = []

    def write_chunk(folder, number, texts, seed, held_out, longest):
        numbers.append(number)
        write_rows(clips.rows_of(folder, number, len(texts)), [{"text": texts[0].text}])
        return len(texts)

    # In this process, where `write_chunk` is replaced.
    monkeypatch.setattr(clips, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(1))
    monkeypatch.setattr(clips, "write_chunk", write_chunk)
    for count in (20, 36):
        clips.write_clips(tmp_path, count, 10)
    assert numbers == [0, 1, 1, 2] and "chunk 3 of 3: 24 clips" in capsys.readouterr().out
    assert len(read_rows(tmp_path / "rows.jsonl")) == 3
    with pytest.raises(ValueError, match="Give another folder"):
        clips.write_clips(tmp_path, 24, 11)
