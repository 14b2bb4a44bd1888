"""Word times of a clip whose transcript is known, from the cross-attention of a complete Whisper."""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.generation_whisper import _dynamic_time_warping, _median_filter
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE


MEDIAN_WIDTH = 7  # rows of 20 ms, as in openai/whisper
SAMPLES_PER_ROW = 320  # 20 ms at 16 kHz
# Rows by which the decoder attends to a word before it is said, and by which a time may move to the edge of a silence:
# both chosen on a voice of festival (ked) that speech.time_errors does not test with.
LEAD = 2
SNAP = 15
SHORTEST_SILENCE = 4  # rows: 80 ms


class TooLongError(ValueError):
    """A transcript of more tokens than the decoder of the aligning Whisper takes."""


class Span(NamedTuple):
    """The encoder's rows during which a word is spoken."""

    start: float
    end: float


class Alignment(NamedTuple):
    """
    The encoder's rows of a clip, float32 `(num_rows, d_model)`, and of each word its span and the mean probability of
    its tokens.
    """

    rows: torch.Tensor
    spans: list[Span]
    probabilities: list[float]


def warp(cost: np.ndarray) -> np.ndarray:
    """
    Dynamic time warping (Sakoe and Chiba, 1978, https://doi.org/10.1109/TASSP.1978.1163055): cost, float
    `(tokens, rows)` -> int `(tokens,)`, the row at which each token begins on the cheapest path that never goes back.
    """
    tokens, rows = _dynamic_time_warping(cost)  # the two places of each step of the path
    return rows[np.diff(tokens, prepend=-1) > 0]


class Aligner:
    """
    Finds when the words of a transcript are spoken, as openai/whisper's `timing.py` does. The folder holds a complete
    Whisper, with its tokenizer and the `alignment_heads` of its `generation_config.json`; without these, a ValueError
    is raised.
    """

    def __init__(self, folder: str | Path):
        # Not by AutoConfig, which would ask whether to run the code of a folder that has its own.
        if (kind := WhisperConfig.get_config_dict(folder)[0].get("model_type")) != "whisper":
            raise ValueError(f"{folder} holds a model of type {kind!r}; expected a complete Whisper.")
        settings = {"attn_implementation": "eager", "dtype": torch.float32}  # only eager attention gives its weights
        self.model = WhisperForConditionalGeneration.from_pretrained(folder, **settings).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.feature_extractor = WhisperFeatureExtractor.from_pretrained(folder)
        self.heads = getattr(self.model.generation_config, "alignment_heads", None)
        if not self.heads:
            need = "expected a Whisper as OpenAI published it"
            raise ValueError(f"{folder} names no `alignment_heads` in its generation_config.json; {need}.")

    def has_encoder(self, encoder: torch.nn.Module) -> bool:
        """Tells whether an encoder is the one of this Whisper, so that its rows need not be computed again."""
        first, other = self.model.model.encoder.conv1.weight, encoder.conv1.weight
        return first.shape == other.shape and torch.allclose(first.float().cpu(), other.float().cpu(), atol=1e-2)

    def find_words(
        self,
        text: str,
        samples: torch.Tensor,
        is_voice: np.ndarray,
        encoder_rows: torch.Tensor | None = None,
        language: str | None = None,
    ) -> list[tuple[float, float, str, float]]:
        """
        Finds the words of a clip, which text has spaces between.

        Args:
            text: The transcript.
            samples: float32 `[samples]` of the clip at 16 kHz, at most 30 s.
            is_voice: Where the clip has sound, bool `[rows of 20 ms]`.
            encoder_rows, language: As in [`align`].

        Returns start and end in seconds, text and probability of each word. None is empty, and none begins before the
        one before it has ended.
        """
        num_rows, words = max(1, -(-len(samples) // SAMPLES_PER_ROW)), text.split()
        windows = None
        if encoder_rows is None:
            windows = self.feature_extractor(samples, sampling_rate=16_000, return_tensors="pt").input_features
        alignment = self.align(windows, num_rows, words, language, encoder_rows)
        voice = np.zeros(num_rows, dtype=bool)
        voice[: len(is_voice)] = is_voice
        spans = snap(separate(delay(alignment.spans), num_rows), voice)
        length, seconds = len(samples) / 16_000, SAMPLES_PER_ROW / 16_000
        return [
            (float(span.start * seconds), float(min(span.end * seconds, length)), word, round(chance, 3))
            for span, word, chance in zip(spans, words, alignment.probabilities, strict=True)
        ]

    def prefix_ids(self, language: str | None = None) -> list[int]:
        """Returns the ids that begin a transcript. `language` is Whisper's code or name; the default is English."""
        code = TO_LANGUAGE_CODE.get((language or "en").lower(), (language or "en").lower())
        tokens = ["<|startoftranscript|>", f"<|{code}|>", "<|transcribe|>", "<|notimestamps|>"]
        ids = self.tokenizer.convert_tokens_to_ids(tokens)
        if None in ids or self.tokenizer.unk_token_id in ids[1:2]:
            raise ValueError(f"The aligning Whisper does not know the language {language!r}; give another, or none.")
        return ids

    @torch.no_grad()
    def align(
        self,
        windows: torch.Tensor | None,
        num_rows: int,
        words: list[str],
        language: str | None = None,
        encoder_rows: torch.Tensor | None = None,
    ) -> Alignment:
        """
        Args:
            windows: Log-mel features, float `(1, mel bins, frames)`, of one clip; None if the next is given.
            num_rows: The number of rows of 20 ms that the clip covers.
            words: The words of the transcript, in order.
            language: Whisper's code or name of the language. The default is English.
            encoder_rows: The output of this Whisper's encoder for the clip, `(1, rows, d_model)`. Without it the
                encoder computes it from the windows.

        Raises a [`TooLongError`] if the words do not fit Whisper's decoder.
        """
        pieces = [self.tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
        prefix = self.prefix_ids(language)
        ids = [*prefix, *(token for piece in pieces for token in piece), self.tokenizer.eos_token_id]
        if len(ids) > (limit := self.model.config.max_target_positions):
            raise TooLongError(f"a transcript of {len(ids)} tokens; Whisper's decoder takes {limit}")
        inputs = {"input_features": windows}
        if encoder_rows is not None:
            device = self.model.device
            inputs = {"encoder_outputs": BaseModelOutput(encoder_rows.to(device, self.model.dtype))}
        decoder_ids = torch.tensor([ids], device=self.model.device)
        outputs = self.model(**inputs, decoder_input_ids=decoder_ids, output_attentions=True)
        weights = torch.stack([outputs.cross_attentions[layer][0, head] for layer, head in self.heads]).cpu()
        weights = weights[..., :num_rows]  # [heads, tokens, rows]
        weights = (weights - weights.mean(1, keepdim=True)) / weights.std(1, keepdim=True, correction=0).clamp(min=1e-9)
        weights = _median_filter(weights, MEDIAN_WIDTH)
        # The decoder attends to a token where it predicts it, one position before. The last prediction is of the end.
        predicting = slice(len(prefix) - 1, -1)
        begins = warp(-weights.mean(0)[predicting].double().numpy())
        chances = outputs.logits[0, predicting].float().softmax(-1)
        chances = chances.gather(1, decoder_ids[0, len(prefix) :, None]).flatten().tolist()
        firsts = list(itertools.accumulate(map(len, pieces), initial=0))
        spans = [Span(int(begins[first]), int(begins[last])) for first, last in itertools.pairwise(firsts)]
        probabilities = [sum(chances[a:b]) / max(1, b - a) for a, b in itertools.pairwise(firsts)]
        return Alignment(outputs.encoder_last_hidden_state[0, :num_rows].float(), spans, probabilities)


def delay(spans: list[Span]) -> list[Span]:
    """Moves the times of words by LEAD, except the first, because a clip may begin with it."""
    return [Span(start + LEAD * (index > 0), end + LEAD) for index, (start, end) in enumerate(spans)]


def separate(spans: list[Span], num_rows: int) -> list[Span]:
    """
    Returns spans of at least one row each that follow each other, where attention put several words into one row. If
    there are more words than rows, they share the rows in order.
    """
    count = len(spans)
    if count > num_rows:
        edges = np.linspace(0, num_rows, count + 1)
        return [Span(float(start), float(end)) for start, end in itertools.pairwise(edges)]
    starts = [span.start for span in spans]
    for index in range(count):  # each starts after the one before, and leaves a row for each that follows
        earliest = starts[index - 1] + 1 if index else 0
        starts[index] = min(max(starts[index], earliest), num_rows - (count - index))
    ends = [*starts[1:], min(max(spans[-1].end, starts[-1] + 1), num_rows) if spans else 0]
    return [Span(start, end) for start, end in zip(starts, ends, strict=True)]


def snap(spans: list[Span], is_voice: np.ndarray) -> list[Span]:
    """
    Moves the ends of words to the silences of at least 80 ms between them: a word ends where a silence begins, and the
    next one starts where it ends.

    Args:
        spans: Of words that follow each other, in rows.
        is_voice: bool `(rows,)`.
    """
    if not spans:
        return []
    edges = np.flatnonzero(np.diff(np.concatenate([[True], is_voice, [True]]).astype(int)))
    silences = [(a, b) for a, b in edges.reshape(-1, 2).tolist() if b - a >= SHORTEST_SILENCE]
    starts, ends = [span.start for span in spans], [span.end for span in spans]
    for index in range(len(spans) + 1):  # the boundary before each word, and the one after the last
        place = starts[index] if index < len(spans) else ends[-1]
        # The boundary stays between the middles of the words beside it.
        low = sum(spans[index - 1]) / 2 if index else 0
        high = sum(spans[index]) / 2 if index < len(spans) else len(is_voice)
        near = [s for s in silences if s[0] - SNAP <= place <= s[1] + SNAP and s[1] > low and s[0] < high]
        if not near:
            continue
        begin, end = max(near, key=lambda silence: min(silence[1], high) - max(silence[0], low))
        # A move must neither leave a word empty nor let two overlap.
        is_before, is_after = index > 0, index < len(spans)
        new_end = begin if is_before and begin > starts[index - 1] else ends[index - 1] if is_before else 0
        new_start = end if is_after and end < ends[index] else starts[index] if is_after else len(is_voice)
        if new_end <= new_start:
            if is_before:
                ends[index - 1] = new_end
            if is_after:
                starts[index] = new_start
    return [Span(start, end) for start, end in zip(starts, ends, strict=True)]
