"""
make test ONLY=tests/test_transcribe.py: recordings of any length, as samples, pieces and segments, and the command.
"""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import soundfile
import torch
from sounds import encode
from transformers import AutoModel, AutoProcessor

import transcribe
from audio_decoding import AudioError
from audio_streaming import SAMPLING_RATE, ahead, cut_pieces, find_duration, find_voice, halve, stream_audio
from audio_utils import fetch_audio
from demo.ask import DEMO
from demo.bases import ASSETS
from transcribe import Answer, Piece, Transcriber, answer_pieces, find_doubt


FILES = sorted(path for path in (ASSETS / "audio").iterdir() if path.suffix in (".wav", ".mp3", ".flac", ".webm"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_stream_has_the_samples_of_the_file(path):
    assert torch.equal(torch.cat(list(stream_audio(str(path)))), fetch_audio(str(path)))
    assert find_duration(path) == pytest.approx(len(fetch_audio(str(path))) / SAMPLING_RATE, abs=0.1)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 47_999, 48_000])
def test_a_stream_is_resampled_as_the_whole(rate, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 5 * rate).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", noise, rate)
    streamed = list(stream_audio(tmp_path / "noise.wav"))
    assert len(streamed) > 1
    assert torch.equal(torch.cat(streamed), fetch_audio(tmp_path / "noise.wav"))


def test_samples_and_untrusted_files_are_opened_whole(speech):
    expected = fetch_audio(str(speech))
    for source, limits in ((expected.numpy(), {}), (speech.read_bytes(), {"public_only": True})):
        assert torch.equal(torch.cat(list(stream_audio(source, **limits))), expected)
    with pytest.raises(AudioError, match="local files are not opened here"):
        list(stream_audio(str(speech), public_only=True))
    with pytest.raises(AudioError, match="no.such"):
        list(stream_audio("no.such.wav"))
    with pytest.raises(AudioError, match="longer than the limit of 5 s"):
        list(stream_audio(str(speech), max_seconds=5))


def test_a_broken_stream_is_an_error(tmp_path):
    soundfile.write(tmp_path / "loud.wav", np.full(SAMPLING_RATE, np.nan, np.float32), SAMPLING_RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match="not finite"):
        list(stream_audio(tmp_path / "loud.wav"))
    (tmp_path / "empty.wav").write_bytes(b"")
    with pytest.raises(AudioError, match=r"empty\.wav"):
        list(stream_audio(tmp_path / "empty.wav"))


@pytest.fixture
def spoken(sound):
    """Three loud stretches of 2 s with quiet ones of 0.5 s between them, float32 `[112000]`."""
    quiet = 0.001 * sound(0.5, 3)
    return torch.from_numpy(np.concatenate([sound(2, 0), quiet, sound(2, 1), quiet, sound(2, 2)]))


def test_pieces_are_cut_where_it_is_quiet(spoken):
    pieces = list(cut_pieces(spoken.split(5000), 4.0))
    assert torch.equal(torch.cat([piece.samples for piece in pieces]), spoken)
    assert [piece.start for piece in pieces[1:]] == [piece.end for piece in pieces[:-1]]
    assert all(len(piece.samples) <= 4.0 * SAMPLING_RATE for piece in pieces)
    first, second, _ = (piece.end / SAMPLING_RATE for piece in pieces)
    assert 2.0 < first < 2.5 and 4.5 < second < 5.0
    left, right = halve(Piece(100, spoken[: 9 * SAMPLING_RATE // 2]))
    assert left.start == 100 and left.end == right.start and 2.0 < (left.end - 100) / SAMPLING_RATE < 2.5
    # A run that goes on cuts the rest in the same places.
    rest = list(cut_pieces(spoken.split(5000), 4.0, start=pieces[1].start))
    assert [piece.start for piece in rest] == [piece.start for piece in pieces[1:]]
    assert torch.equal(rest[0].samples, pieces[1].samples)


def test_pieces_end_in_pauses(spoken):
    """In the middle of a silence that lasts as long as was asked for, but not after less than 2 s."""
    whole = list(cut_pieces(spoken.split(5000), 28.0))
    pieces = list(cut_pieces(spoken.split(5000), 28.0, pause=0.3))
    assert len(whole) == 1 and len(pieces) > 1
    assert torch.equal(torch.cat([piece.samples for piece in pieces]), spoken)
    for piece in pieces[:-1]:
        assert len(piece.samples) >= 2 * SAMPLING_RATE
        around = spoken[piece.end - round(0.14 * SAMPLING_RATE) : piece.end + round(0.14 * SAMPLING_RATE)]
        assert around.abs().max() < 0.1 * spoken.abs().max()
    rest = list(cut_pieces(spoken.split(5000), 28.0, pieces[0].end, pause=0.3))
    assert [piece.start for piece in rest] == [piece.start for piece in pieces[1:]]
    assert len(list(cut_pieces(spoken.split(5000), 28.0, pause=20.0))) == 1
    with pytest.raises(ValueError, match="pause must be more than 0 and at most 28 s, got 30"):
        Transcriber(print, pause=30.0)


def test_voice_is_found_in_levels_of_20_ms(spoken):
    is_voice = find_voice(spoken)
    assert len(is_voice) == 350
    expected = torch.tensor([True] * 100 + [False] * 25 + [True] * 100 + [False] * 25 + [True] * 100)
    assert (is_voice == expected).float().mean() > 0.99
    assert not find_voice(torch.zeros(SAMPLING_RATE)).any() and len(find_voice(torch.zeros(10))) == 0


def test_a_thread_reads_ahead_and_stops():
    threads, closed = set(), []

    def count():
        try:
            for number in range(1000):
                threads.add(threading.current_thread())
                yield number
        finally:
            closed.append(True)

    numbers = count()
    reader = ahead(numbers, 3)
    assert [next(reader) for _ in range(5)] == list(range(5))
    reader.close()
    assert closed and threading.current_thread() not in threads
    assert list(ahead((number for number in range(20)), 3)) == list(range(20))

    def fail():
        yield 1
        raise AudioError("broken midway")

    reader = ahead(fail(), 2)
    assert next(reader) == 1
    with pytest.raises(AudioError, match="broken midway"):
        next(reader)


SENTENCE = "It was a bright cold day in April."


@pytest.mark.parametrize(
    "text, is_complete, doubt",
    [
        (SENTENCE, True, None),
        (SENTENCE, False, "the answer did not end"),
        ("It was.", True, "the text has 7 characters for 2.0 s of voice"),
        ("", True, "the text has 0 characters for 2.0 s of voice"),
        (" ".join([SENTENCE] * 3), True, "the text repeats itself"),
        ("\u4eca\u5929\u5929\u6c14\u5f88\u597d\u6211\u4eec", True, None),
    ],
)
def test_a_text_that_may_be_wrong_is_noticed(sound, text, is_complete, doubt):
    samples = torch.from_numpy(np.concatenate([np.zeros(8000, np.float32), sound(2), np.zeros(8000, np.float32)]))
    assert find_doubt(samples, Answer(text, is_complete)) == doubt


def test_a_piece_in_doubt_is_cut_in_halves_and_asked_once_more(spoken, caplog):
    asked = []

    def ask(clips):
        """Answers with 15 characters for each second, but drops most of a clip of more than 3 s."""
        asked.append([len(clip) / SAMPLING_RATE for clip in clips])
        return [
            Answer("abcde fghij klmno"[: 15 if len(c) < 3 * SAMPLING_RATE else 4] * round(len(c) / 16_000))
            for c in clips
        ]

    pieces = [Piece(0, spoken[:32_000]), Piece(32_000, spoken[40_000:])]
    results = answer_pieces(ask, pieces)
    assert [len(lengths) for lengths in asked] == [2, 2]
    assert [piece.start for piece, _, _ in results][:2] == [0, 32_000] and len(results) == 3
    assert all(doubt is None for _, _, doubt in results)

    batches = list(Transcriber(lambda clips: [Answer("um") for _ in clips], 4.0).batches(spoken.numpy()))
    ((_, segments),) = batches
    doubts = [segment.doubt for segment in segments if segment.end - segment.start > 1.1]
    assert doubts and all("of voice" in doubt for doubt in doubts)
    assert "may be wrong: the text has 2 characters" in caplog.text


def test_silence_is_not_asked_about(sound):
    """Models answer some silences with words."""

    def ask(clips):
        assert len(clips) == 1
        return [Answer(SENTENCE)]

    recording = np.concatenate([sound(2), np.zeros(64_000, np.float32)])
    ((end, segments),) = Transcriber(ask, 2.5).batches(recording)
    assert end == len(recording) and [segment.text for segment in segments] == [SENTENCE]
    assert list(Transcriber(lambda clips: 1 / 0).batches(np.zeros(32_000, np.float32))) == [(32_000, [])]

    def doubtful(clips):
        assert all(find_voice(clip).any() for clip in clips)
        return [Answer("um" if len(clip) > 5 * SAMPLING_RATE else SENTENCE) for clip in clips]

    # A piece in doubt, whose second half is silent.
    ((_, segments),) = Transcriber(doubtful).batches(np.concatenate([sound(4), np.zeros(80_000, np.float32)]))
    assert [segment.text for segment in segments] == [SENTENCE]


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"max_seconds": 1.0}, "max_seconds must be from 2 to 600, got 1.0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"language": "klingon"}, "language must be a code or name of Whisper's"),
    ],
)
def test_settings_are_checked(settings, reason):
    with pytest.raises(ValueError, match=reason):
        Transcriber(lambda clips: [], **settings)


@pytest.fixture(scope="module")
def recording(examples, tmp_path_factory):
    """A recording of three clips of the demo, of which one begins every 2.4 s, and what is said in it."""
    clips = [fetch_audio(str(DEMO / "examples" / e["audio"][0])) for e in examples if e["skill"] == "transcribe"]
    said = [example["answer"] for example in examples if example["skill"] == "transcribe"]
    short = [(clip, text) for clip, text in zip(clips, said, strict=True) if len(clip) < 24_000]
    samples = [np.pad(clip.numpy(), (0, 38_400 - len(clip))) for clip, _ in short]
    path = tmp_path_factory.mktemp("recording") / "talk.flac"
    soundfile.write(path, np.concatenate(samples), SAMPLING_RATE)
    return path, [text for _, text in short]


def test_a_recording_is_transcribed_piece_by_piece(demo_repo, recording):
    path, said = recording
    processor = AutoProcessor.from_pretrained(demo_repo, trust_remote_code=True)
    model = AutoModel.from_pretrained(demo_repo, trust_remote_code=True, dtype="auto").eval()
    assert processor.piece_seconds == 3.0  # of the checkpoint, kept by `build`
    result = transcribe.transcribe(model, processor, str(path), batch_size=2)
    assert [segment.text for segment in result.segments] == said
    assert result.text == " ".join(said) and result.duration == pytest.approx(soundfile.info(path).duration, abs=1e-3)
    ends = [0.0, *(segment.end for segment in result.segments)]
    assert all(end <= segment.start < segment.end for end, segment in zip(ends, result.segments, strict=False))
    assert list(transcribe.transcribe_segments(model, processor, str(path), batch_size=3)) == list(result.segments)
    with pytest.raises(TypeError, match="unknown"):
        transcribe.transcribe(model, processor, str(path), unknown=1)


def command(demo_repo, output, *arguments) -> subprocess.CompletedProcess:
    line = [sys.executable, demo_repo / "transcribe.py", demo_repo, "--output-dir", output, *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=output.parent)


def test_command_line(demo_repo, recording, tmp_path):
    path, said = recording
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    output = tmp_path / "output"
    done = command(demo_repo, output, tmp_path / "broken.wav", path)
    assert done.returncode == 1, done.stderr
    assert "broken.wav failed: " in done.stderr and "1 of 2 files failed" in done.stderr
    assert "times real time" in done.stderr and not [*output.glob("*.unfinished.jsonl")]
    assert (output / "talk.txt").read_text().splitlines() == said
    assert sorted(p.name for p in output.iterdir() if p.stem == "talk") == [
        f"talk.{e}" for e in ("json", "srt", "txt", "vtt")
    ]

    # A run that was stopped after the first batch, and in the middle of a line, goes on there.
    unfinished = output / "talk.unfinished.jsonl"
    facts = dict.fromkeys(("url", "max_seconds", "pause", "language", "prompt", "aligner"))
    facts |= {"word_timestamps": False, "dtype": "auto", "model": transcribe.identify(str(demo_repo))}
    stat = os.stat(path)
    facts |= {"source": str(path), "bytes": stat.st_size, "changed": stat.st_mtime}
    first = json.loads((output / "talk.json").read_text())["segments"][0]
    first = {"start": first["start"], "end": first["end"], "text": "from the earlier run"}
    end = round(SAMPLING_RATE * (first["end"] + 0.3))
    lines = [json.dumps(facts), json.dumps([end, [first]]), '[123, [{"sta']
    unfinished.write_text("\n".join(lines))
    done = command(demo_repo, output, path, "--output-format", "txt", "--stream")
    assert done.returncode == 0, done.stderr
    assert (output / "talk.txt").read_text().splitlines() == ["from the earlier run", *said[1:]]
    assert said[-1] in done.stdout and not unfinished.exists()


def test_a_run_that_was_interrupted_goes_on_and_repeats_no_file(demo_repo, recording, tmp_path, monkeypatch, capsys):
    path, said = recording
    soundfile.write(tmp_path / "long.flac", np.tile(fetch_audio(path).numpy(), 2), SAMPLING_RATE)
    line = ["transcribe.py", demo_repo, path, tmp_path / "long.flac", "--output-dir", tmp_path]
    monkeypatch.setattr(sys, "argv", [*map(str, line), "--batch-size", "1", "--output-format", "txt"])
    asked, ask = [], transcribe.LocalAsker.__call__

    def interrupted(self, clips):
        asked.append(len(clips))
        if len(asked) == len(said) + 3:  # by Ctrl-C in the third piece of the second file
            raise KeyboardInterrupt  # a signal would be ignored in a process that a shell started in the background
        return ask(self, clips)

    monkeypatch.setattr(transcribe.LocalAsker, "__call__", interrupted)
    assert transcribe.main() == 130 and "goes on after the last batch" in capsys.readouterr().err
    assert not (tmp_path / "long.txt").exists()
    # Both files are read again from their batches, the one that was complete too.
    for name in ("talk", "long"):
        unfinished = tmp_path / f"{name}.unfinished.jsonl"
        unfinished.write_text(unfinished.read_text().replace(said[0], f"earlier {name}", 1))
    assert transcribe.main() == 0
    assert (tmp_path / "talk.txt").read_text().splitlines() == ["earlier talk", *said[1:]]
    assert (tmp_path / "long.txt").read_text().splitlines() == ["earlier long", *(said * 2)[1:]]
    assert len(asked) == len(said) + 3 + 2 * len(said) - 2 and not [*tmp_path.glob("*.unfinished.jsonl")]


def test_what_was_asked_is_never_asked_again(sound, tmp_path):
    """Wherever a run ends: in a character, between text and line end, or while it goes through what it has."""
    recording, unfinished, asked = tmp_path / "talk.wav", tmp_path / "talk.unfinished.jsonl", []
    soundfile.write(recording, np.tile(np.append(sound(1.5), np.zeros(8_000, np.float32)), 5), SAMPLING_RATE)

    def ask(clips):
        asked.append(len(clips))
        return [Answer("他说的话很长\u2028他们在北京住了") for _ in clips]

    def run():
        return transcribe.resume(Transcriber(ask, 2.5, 1), str(recording), unfinished, {"model": 1})

    batches = list(run())
    content = unfinished.read_bytes()
    for missing in range(len(content.splitlines(keepends=True)[-1])):
        asked.clear()
        unfinished.write_bytes(content[: len(content) - missing])
        next(run())  # stopped at its first output
        assert list(run()) == batches and unfinished.read_bytes() == content
        assert len(asked) == min(missing, 1)
    asked.clear()
    next(transcribe.resume(Transcriber(ask, 2.5, 1), str(recording), unfinished, {"model": 2}))
    assert asked == [1] and len(unfinished.read_bytes().splitlines()) == 2


def test_a_folder_that_has_changed_is_another_model(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    before = transcribe.identify(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert transcribe.identify(".") == before
    os.utime("config.json", (1, 1))
    assert transcribe.identify(".") != before


def test_what_is_missing_is_said(demo_repo, recording, tmp_path):
    path, _ = recording
    content = encode(np.tile(fetch_audio(path).numpy(), 4), "clip.mp3")
    (tmp_path / "half.mp3").write_bytes(content[: len(content) // 2])
    soundfile.write(tmp_path / "silence.wav", np.zeros(SAMPLING_RATE), SAMPLING_RATE)
    done = command(demo_repo, tmp_path / "output", tmp_path / "half.mp3", tmp_path / "silence.wav")
    assert done.returncode == 0, done.stderr
    assert "is it complete?" in done.stderr and "silence.wav: no voice was found in 1.0 s" in done.stderr


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["talk.wav", "other/talk.mp3"], "Two files are named talk"),
        (["talk.wav", "--word-timestamps"], "give its folder or Hub id as --aligner"),
        (["talk.wav", "--aligner", "openai/whisper-base"], "--aligner needs --word-timestamps"),
        (["talk.wav", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["talk.wav", "--max-line-width", "0"], "max_line_width must be 1 or more"),
        (["talk.wav", "--batch-size", "0"], "batch_size must be 1 or more"),
        ([], "name the recordings to transcribe"),
    ],
)
def test_command_line_refuses(demo_repo, tmp_path, monkeypatch, capsys, arguments, reason):
    line = ["transcribe.py", str(demo_repo), "--output-dir", str(tmp_path / "output"), *arguments]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as end:
        transcribe.main()
    assert end.value.code == 2 and reason in capsys.readouterr().err
