"""Transcripts with times, and the formats in which they are written: each is a pure function of a transcript."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass


FRAME = 1 / 24  # seconds of a film frame
GAP = 2 * FRAME  # seconds from the end of a subtitle to the start of the next
SHORTEST, LONGEST = 5 / 6, 7.0  # seconds that a subtitle stays
READING_SPEED = 20.0  # characters a second
PAUSE = 0.6  # seconds of silence at which a subtitle should end
# Latin and Chinese marks, some of which look alike.
SENTENCE_ENDS = ".!?\u2026\u3002\uff01\uff1f"
CLAUSE_ENDS = ",;:\u2013\u2014\u3001\uff0c\uff1a\uff1b"
CLOSING = "\"')]}\u201d\u2019\u00bb"  # what may follow the end of a sentence
# The costs of what a reader minds, in the search for the best subtitles of a recording.
NEW_SUBTITLE, WITHIN_SENTENCE, WITHIN_CLAUSE, ACROSS_PAUSE, ACROSS_SENTENCE = 1.0, 3.0, 6.0, 4.0, 0.5
TOO_FAST, TOO_SHORT, TOO_LONG, TOO_WIDE = 2.0, 4.0, 100.0, 1000.0


@dataclass(frozen=True)
class Word:
    """A word with its times in seconds, and the probability that the aligning model gave it, None if unknown."""

    start: float
    end: float
    text: str
    probability: float | None = None


@dataclass(frozen=True)
class Segment:
    """
    A stretch of a recording with its text. Times are seconds of the recording. `words` is empty if no word times were
    asked for. `doubt` says why the text may be wrong, None if nothing speaks against it.
    """

    start: float
    end: float
    text: str
    words: tuple[Word, ...] = ()
    doubt: str | None = None


@dataclass(frozen=True)
class Transcript:
    """The text of a recording of `duration` seconds. `language` is the one that was asked for, or None."""

    segments: tuple[Segment, ...]
    duration: float
    language: str | None = None

    @property
    def text(self) -> str:
        return " ".join(segment.text for segment in self.segments if segment.text)

    @property
    def words(self) -> tuple[Word, ...]:
        return tuple(word for segment in self.segments for word in segment.words)

    @property
    def chunks(self) -> list[dict]:
        """
        Texts with `timestamp` `(start, end)` as in transformers' pipelines: words if they have times, or segments.
        """
        parts = self.words or [segment for segment in self.segments if segment.text]
        return [{"text": part.text, "timestamp": (part.start, part.end)} for part in parts]


@dataclass(frozen=True)
class SubtitleStyle:
    """The shape of subtitles: characters of a line, lines of a subtitle, and whether the spoken word is underlined."""

    max_line_width: int = 42
    max_line_count: int = 2
    highlight_words: bool = False

    def __post_init__(self):
        for name in ("max_line_width", "max_line_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Subtitle:
    """A subtitle. Its lines are lists of words."""

    start: float
    end: float
    lines: list[list[Word]]

    @property
    def text(self) -> str:
        return "\n".join(" ".join(word.text for word in line) for line in self.lines)


def to_txt(transcript: Transcript, style: SubtitleStyle | None = None) -> str:
    """A line of text for each segment."""
    return "".join(f"{segment.text}\n" for segment in transcript.segments if segment.text)


def to_json(transcript: Transcript, style: SubtitleStyle | None = None) -> str:
    """The whole transcript, with the names of openai/whisper's JSON."""
    return json.dumps(to_dict(transcript), ensure_ascii=False, indent=2) + "\n"


def to_dict(transcript: Transcript) -> dict:
    segments = [{"id": number, **segment_dict(segment)} for number, segment in enumerate(transcript.segments)]
    facts = {"language": transcript.language, "duration": transcript.duration}
    return {"text": transcript.text, **facts, "segments": segments}


def segment_dict(segment: Segment) -> dict:
    """`doubt` and `words` are left out where there is nothing to say."""
    fields = {"start": segment.start, "end": segment.end, "text": segment.text}
    if segment.words:
        fields["words"] = [word_dict(word) for word in segment.words]
    return fields | ({"doubt": segment.doubt} if segment.doubt else {})


def word_dict(word: Word) -> dict:
    return {"word": word.text, "start": word.start, "end": word.end, "probability": word.probability}


def read_segment(fields: dict) -> Segment:
    """Reads what [`segment_dict`] wrote."""
    words = (Word(word["start"], word["end"], word["word"], word["probability"]) for word in fields.get("words", ()))
    return Segment(fields["start"], fields["end"], fields["text"], tuple(words), fields.get("doubt"))


def to_srt(transcript: Transcript, style: SubtitleStyle | None = None) -> str:
    """SubRip: numbered subtitles, times with a comma."""
    cues = enumerate(make_cues(transcript, style or SubtitleStyle()), 1)
    return "".join(
        f"{number}\n{clock(start, ',')} --> {clock(end, ',')}\n{text}\n\n" for number, (start, end, text) in cues
    )


def to_vtt(transcript: Transcript, style: SubtitleStyle | None = None) -> str:
    """WebVTT (https://www.w3.org/TR/webvtt1): `&`, `<` and `>` of the text are escaped."""
    cues = make_cues(transcript, style or SubtitleStyle(), escape)
    return "WEBVTT\n\n" + "".join(f"{clock(start, '.')} --> {clock(end, '.')}\n{text}\n\n" for start, end, text in cues)


FORMATS = {"txt": to_txt, "srt": to_srt, "vtt": to_vtt, "json": to_json}


def escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def clock(seconds: float, separator: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, milliseconds = divmod(milliseconds, 1000)
    return f"{hours:02}:{minutes:02}:{whole:02}{separator}{milliseconds:03}"


def make_cues(
    transcript: Transcript, style: SubtitleStyle, write: Callable[[str], str] = str
) -> Iterable[tuple[float, float, str]]:
    """Yields start, end and text of each subtitle; with `highlight_words` of each word, which is underlined."""
    for subtitle in make_subtitles(transcript, style):
        if not style.highlight_words:
            yield subtitle.start, subtitle.end, write(subtitle.text)
            continue
        words = list(itertools.chain(*subtitle.lines))
        ends = [word.start for word in words[1:]] + [subtitle.end]
        starts = [subtitle.start, *ends[:-1]]
        for spoken, start, end in zip(words, starts, ends, strict=True):
            lines = (
                " ".join(f"<u>{write(word.text)}</u>" if word is spoken else write(word.text) for word in line)
                for line in subtitle.lines
            )
            yield start, end, "\n".join(lines)


def timed_words(segment: Segment) -> list[Word]:
    """Returns the words of a segment. Without word times each gets a share of the time by its number of characters."""
    if segment.words:
        return list(segment.words)
    texts = segment.text.split()
    edges = list(itertools.accumulate((len(text) + 1 for text in texts), initial=0))
    pace = (segment.end - segment.start) / max(1, edges[-1])
    times = [segment.start + pace * edge for edge in edges]
    return [Word(start, end, text) for text, (start, end) in zip(texts, itertools.pairwise(times), strict=True)]


def make_subtitles(transcript: Transcript, style: SubtitleStyle) -> list[Subtitle]:
    """
    Divides the words among subtitles by dynamic programming: the cheapest division of the first n words is the cheapest
    of fewer words and one more subtitle. A subtitle is cheap if it ends with a sentence or at a pause, fits its lines,
    and can be read in its time. The bounds are those of Netflix's timed text style guide
    (https://partnerhelp.netflixstudios.com/hc/en-us/articles/217350977).
    """
    words = [word for segment in transcript.segments for word in timed_words(segment)]
    most = style.max_line_width * style.max_line_count
    best = [(0.0, 0)]  # the cost of the first n words, and the first word of their last subtitle
    for end in range(1, len(words) + 1):
        options, characters = [], -1
        for first in range(end - 1, -1, -1):
            characters += len(words[first].text) + 1
            if first < end - 1 and (characters > most or words[end - 1].end - words[first].start > LONGEST):
                break
            options.append((best[first][0] + cost_of(words, first, end, characters, style), first))
        best.append(min(options))
    bounds, end = [], len(words)
    while end:
        bounds.append((best[end][1], end))
        end = best[end][1]
    groups = [words[first:end] for first, end in reversed(bounds)]
    last = max([transcript.duration, *(word.end for word in words[-1:])])
    following = [*((group[0].start, GAP) for group in groups[1:]), (last, 0.0)][: len(groups)]
    return [make_subtitle(group, *limit, style) for group, limit in zip(groups, following, strict=True)]


def cost_of(words: list[Word], first: int, end: int, characters: int, style: SubtitleStyle) -> float:
    """Returns the cost of a subtitle of the words from `first` to before `end`."""
    start, last = words[first].start, words[end - 1]
    following = words[end].start if end < len(words) else float("inf")
    room = min(following - GAP, start + LONGEST) - start  # the longest that it can stay
    cost = NEW_SUBTITLE
    if end < len(words) and not ends_with(last, SENTENCE_ENDS):
        is_pause = following - last.end >= PAUSE
        cost += 0 if is_pause else WITHIN_SENTENCE if ends_with(last, CLAUSE_ENDS) else WITHIN_CLAUSE
    for word, next_word in itertools.pairwise(words[first:end]):
        cost += ACROSS_PAUSE * (next_word.start - word.end >= PAUSE) + ACROSS_SENTENCE * ends_with(word, SENTENCE_ENDS)
    cost += TOO_FAST * max(0.0, characters / READING_SPEED - room)
    cost += TOO_SHORT * max(0.0, SHORTEST - room) + TOO_LONG * max(0.0, last.end - start - LONGEST)
    lines = break_lines(words[first:end], style)
    widest = max(width_of(line) for line in lines)
    return cost + TOO_WIDE * (len(lines) > style.max_line_count or (widest > style.max_line_width and end - first > 1))


def ends_with(word: Word, marks: str) -> bool:
    return word.text.rstrip(CLOSING).endswith(tuple(marks))


def width_of(line: list[Word]) -> int:
    return sum(len(word.text) + 1 for word in line) - 1


def break_lines(words: list[Word], style: SubtitleStyle) -> list[list[Word]]:
    """Breaks words into the fewest lines that fit; two lines are broken at a mark, or where they are most even."""
    if width_of(words) <= style.max_line_width:
        return [words]
    lines = [[words[0]]]
    for word in words[1:]:
        if width_of([*lines[-1], word]) <= style.max_line_width:
            lines[-1].append(word)
        else:
            lines.append([word])
    if len(lines) != 2:
        return lines
    pairs = [(words[:place], words[place:]) for place in range(1, len(words))]
    pairs = [pair for pair in pairs if max(map(width_of, pair)) <= style.max_line_width] or [tuple(lines)]
    evenness = style.max_line_width / 4  # characters by which a break at a mark may be less even

    def cost(pair: tuple[list[Word], list[Word]]) -> float:
        is_mark = ends_with(pair[0][-1], SENTENCE_ENDS + CLAUSE_ENDS)
        return abs(width_of(pair[0]) - width_of(pair[1])) - evenness * is_mark

    return list(min(pairs, key=cost))


def make_subtitle(words: list[Word], following: float, gap: float, style: SubtitleStyle) -> Subtitle:
    """Lets a subtitle stay until it can be read, if the next one, or the end of the recording, leaves the time."""
    start, end = words[0].start, words[-1].end
    characters = width_of(words)
    needed = start + min(LONGEST, max(SHORTEST, characters / READING_SPEED))
    # A subtitle ends two frames before the next; words that follow at once give up these frames.
    latest = max(following - gap, min(words[-1].start + FRAME, following))
    return Subtitle(start, min(max(end, needed), latest, start + LONGEST), break_lines(words, style))


def rounded(segment: Segment) -> Segment:
    """Rounds the times to milliseconds, which all formats have."""
    words = (dataclasses.replace(word, start=round(word.start, 3), end=round(word.end, 3)) for word in segment.words)
    return dataclasses.replace(segment, start=round(segment.start, 3), end=round(segment.end, 3), words=tuple(words))
