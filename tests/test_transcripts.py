"""make test ONLY=tests/test_transcripts.py: transcripts, and the formats in which they are written."""

import itertools
import json
import random

import pysubs2
import pytest

from transcripts import (
    FORMATS,
    GAP,
    LONGEST,
    PAUSE,
    SHORTEST,
    Segment,
    SubtitleStyle,
    Transcript,
    Word,
    make_subtitles,
    read_segment,
    segment_dict,
)


SENTENCES = (
    "The committee met on Monday, and nobody objected. It was, by all accounts, a short meeting. Why did the members "
    "leave before the vote? Because the train to Porto departs at four, and the next one is a day later. So it goes."
)


def speak(text: str, seed: int = 0) -> Transcript:
    """A transcript of one segment, spoken at 14 characters a second with pauses after sentences."""
    rng, time, words = random.Random(seed), 0.5, []
    for token in text.split():
        end = time + len(token) / 14 + 0.02
        words.append(Word(round(time, 3), round(end, 3), token, 0.9))
        time = end + (rng.uniform(0.3, 0.9) if token[-1] in ".?" else 0.03)
    segment = Segment(words[0].start, words[-1].end, text, tuple(words))
    return Transcript((segment,), words[-1].end + 1, "en")


def read_back(content: str, ending: str) -> list[tuple[float, float, str]]:
    events = pysubs2.SSAFile.from_string(content, format_=ending)
    return [(event.start / 1000, event.end / 1000, event.plaintext) for event in events]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("has_words", [True, False], ids=["word times", "segment times"])
def test_subtitles_can_be_read(has_words, seed):
    transcript = speak(" ".join([SENTENCES] * 5), seed)
    if not has_words:
        (segment,) = transcript.segments
        transcript = Transcript((Segment(segment.start, segment.end, segment.text),), transcript.duration)
    subtitles = make_subtitles(transcript, SubtitleStyle())
    assert " ".join(subtitle.text.replace("\n", " ") for subtitle in subtitles) == transcript.text  # nothing is lost
    within_sentence = 0
    for subtitle, following in itertools.pairwise([*subtitles, None]):
        lines = subtitle.text.split("\n")
        assert len(lines) <= 2 and max(map(len, lines)) <= 42
        assert 0 < subtitle.end - subtitle.start <= LONGEST
        if following is None:
            continue
        assert following.start - subtitle.end >= GAP - 1e-6
        room = following.start - GAP - subtitle.start
        assert subtitle.end - subtitle.start >= min(SHORTEST, room) - 1e-6
        within_sentence += not lines[-1].endswith((".", "?", ","))
    assert within_sentence <= len(subtitles) * 0.2


def test_a_subtitle_ends_at_a_pause_and_at_the_end_of_a_sentence():
    words = [Word(0.0, 0.4, "well"), Word(0.4, 0.8, "yes"), Word(0.8 + 2 * PAUSE, 3.0, "no"), Word(3.0, 3.4, "indeed")]
    lines = [s.text for s in make_subtitles(Transcript((Segment(0, 3.4, "", tuple(words)),), 4), SubtitleStyle())]
    assert lines == ["well yes", "no indeed"]
    long_word = "w" * 60
    (subtitle,) = make_subtitles(Transcript((Segment(0, 3, long_word),), 3), SubtitleStyle())
    assert subtitle.text == long_word  # it cannot be broken


@pytest.mark.parametrize("width, count", [(42, 2), (20, 1), (30, 3), (60, 2)])
def test_lines_are_as_wide_and_as_many_as_asked(width, count):
    subtitles = make_subtitles(speak(SENTENCES), SubtitleStyle(width, count))
    assert all(len(s.lines) <= count and max(map(len, s.text.split("\n"))) <= width for s in subtitles)
    with pytest.raises(ValueError, match="max_line_width must be 1 or more, got 0"):
        SubtitleStyle(0)


@pytest.mark.parametrize("ending", ["srt", "vtt"])
def test_subtitles_are_read_back(ending):
    text = "Is 3 < 5 & 5 > 3? Yes, it is."
    transcript = speak(text)
    content = FORMATS[ending](transcript, None)
    subtitles = make_subtitles(transcript, SubtitleStyle())
    events = read_back(content, ending)
    if ending == "vtt":
        assert content.startswith("WEBVTT\n\n") and "3 &lt; 5 &amp; 5 &gt; 3" in content
    else:
        assert [event[2] for event in events] == [subtitle.text for subtitle in subtitles]
    assert [event[:2] for event in events] == [(round(s.start, 3), round(s.end, 3)) for s in subtitles]


def test_the_spoken_word_is_underlined():
    transcript = speak("One two three.")
    content = FORMATS["srt"](transcript, SubtitleStyle(highlight_words=True))
    assert [line for line in content.splitlines() if "<u>" in line] == [
        *("<u>One</u> two three.", "One <u>two</u> three.", "One two <u>three.</u>")
    ]
    events = read_back(content, "srt")
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(events))

    words = tuple(Word(number / 50, (number + 1) / 50, f"word{number}") for number in range(200))  # without pauses
    fast = Transcript((Segment(0, 4, "", words),), 4)
    for style in (SubtitleStyle(highlight_words=True), SubtitleStyle(1, 1), SubtitleStyle(10, 1)):
        events = read_back(FORMATS["srt"](fast, style), "srt")
        assert all(start < end for start, end, _ in events)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(events))
    assert make_subtitles(fast, SubtitleStyle())[-1].end == 4  # no subtitle follows


def test_json_holds_the_whole_transcript():
    plain, doubtful = Segment(0.5, 1.0, "Uno."), Segment(2.0, 3.0, "", doubt="the answer did not end")
    transcript = Transcript((*speak("One two.").segments, plain, doubtful), 4.0, "en")
    fields = json.loads(FORMATS["json"](transcript, None))
    assert (fields["text"], fields["language"], fields["duration"]) == ("One two. Uno.", "en", 4.0)
    assert [segment["id"] for segment in fields["segments"]] == [0, 1, 2]
    assert fields["segments"][0]["words"][1]["word"] == "two."
    assert fields["segments"][2]["doubt"] == "the answer did not end"
    assert tuple(read_segment(segment_dict(segment)) for segment in transcript.segments) == transcript.segments
    assert FORMATS["txt"](transcript, None) == "One two.\nUno.\n"


def test_chunks_are_those_of_pipelines():
    transcript = speak("One two.")
    assert [chunk["text"] for chunk in transcript.chunks] == ["One", "two."]
    assert transcript.chunks[0]["timestamp"] == (0.5, 0.734)
    segments = Transcript((Segment(0.5, 1.0, "Uno."), Segment(2.0, 3.0, "", doubt="empty")), 4.0)
    assert segments.chunks == [{"text": "Uno.", "timestamp": (0.5, 1.0)}]


@pytest.mark.parametrize("ending", FORMATS)
def test_a_transcript_of_nothing(ending):
    content = FORMATS[ending](Transcript((), 3.0), None)
    assert content == {"txt": "", "srt": "", "vtt": "WEBVTT\n\n"}.get(ending, content)


def test_one_word_of_a_long_piece_does_not_stay():
    transcript = Transcript((Segment(0.0, 28.0, "Yes."),), 28.0)
    (subtitle,) = make_subtitles(transcript, SubtitleStyle())
    assert subtitle.end - subtitle.start == LONGEST
