"""
A start for the projector in closed form: where a transcript says which words are spoken, the cross-attention of a
complete Whisper says when, and a ridge regression takes the encoder's rows to the language model's embeddings of them.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, WhisperForConditionalGeneration


MEDIAN_WIDTH = 7  # rows of 20 ms, as in openai/whisper
RIDGE = 1e-3  # of the mean of the diagonal
PREFIX = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]


class Span(NamedTuple):
    """The encoder's rows during which a word is spoken."""

    start: int
    end: int


def warp(cost: np.ndarray) -> np.ndarray:
    """
    Dynamic time warping (Sakoe and Chiba, 1978, https://doi.org/10.1109/TASSP.1978.1163055).

    Args:
        cost: float `(tokens, rows)`.

    Returns:
        int `(tokens,)`: the row at which each token begins, on the cheapest path that never goes back.
    """
    tokens, rows = cost.shape
    total = np.full((tokens + 1, rows + 1), np.inf)
    total[0, 0] = 0
    came = np.zeros((tokens, rows), int)
    for token in range(tokens):
        for row in range(rows):
            ways = total[token, row], total[token, row + 1], total[token + 1, row]  # both, next token, next row
            came[token, row] = np.argmin(ways)
            total[token + 1, row + 1] = cost[token, row] + ways[came[token, row]]
    begins, token, row = np.zeros(tokens, int), tokens - 1, rows - 1
    while token >= 0 and row >= 0:
        begins[token] = row
        token, row = token - (came[token, row] < 2), row - (came[token, row] != 1)
    return begins


class Aligner:
    """
    Tells when the words of a transcript are spoken, as openai/whisper's `timing.py` does.

    Args:
        folder: A complete Whisper, with its tokenizer and the `alignment_heads` of its `generation_config.json`.

    Raises:
        ValueError: if the folder does not name alignment heads.
    """

    def __init__(self, folder: str | Path):
        settings = {"attn_implementation": "eager", "dtype": torch.float32}  # only eager attention gives its weights
        self.model = WhisperForConditionalGeneration.from_pretrained(folder, **settings).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.heads = getattr(self.model.generation_config, "alignment_heads", None)
        if not self.heads:
            raise ValueError(
                f"{folder} names no `alignment_heads` in its generation_config.json; expected a Whisper as OpenAI "
                "published it."
            )

    @torch.no_grad()
    def align(self, windows: torch.Tensor, num_rows: int, words: list[str]) -> tuple[torch.Tensor, list[Span]]:
        """
        Args:
            windows: Log-mel features `(1, mel bins, frames)` of one clip.
            num_rows: The rows of 20 ms that the clip covers.
            words: What is said in it, in order.

        Returns:
            The encoder's rows of the clip, float32 `(num_rows, d_model)`, and the span of each word.

        Raises:
            ValueError: if the words do not fit Whisper's decoder.
        """
        pieces = [self.tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
        prefix = self.tokenizer.convert_tokens_to_ids(PREFIX)
        ids = [*prefix, *(token for piece in pieces for token in piece), self.tokenizer.eos_token_id]
        if len(ids) > self.model.config.max_target_positions:
            raise ValueError(
                f"a transcript of {len(ids)} tokens; Whisper's decoder takes {self.model.config.max_target_positions}"
            )
        outputs = self.model(windows, decoder_input_ids=torch.tensor([ids]), output_attentions=True)
        weights = torch.stack([outputs.cross_attentions[layer][0, head] for layer, head in self.heads])
        weights = weights[..., :num_rows]  # [heads, tokens, rows]
        weights = (weights - weights.mean(1, keepdim=True)) / weights.std(1, keepdim=True, correction=0).clamp(min=1e-9)
        margin = MEDIAN_WIDTH // 2
        if num_rows > margin:
            weights = F.pad(weights, (margin, margin), "reflect").unfold(-1, MEDIAN_WIDTH, 1).median(-1).values
        begins = warp(-weights.mean(0)[len(prefix) :].double().numpy())  # the last is of the end
        firsts = np.cumsum([0, *map(len, pieces)])
        spans = [Span(int(begins[first]), int(begins[last])) for first, last in itertools.pairwise(firsts)]
        return outputs.encoder_last_hidden_state[0, :num_rows].float(), spans


class Ridge:
    """
    Ridge regression of rows onto embeddings, in memory that does not grow with the rows.

    Args:
        d_model, hidden_size: Of the encoder's rows and of the embeddings.
    """

    def __init__(self, d_model: int, hidden_size: int):
        self.products = torch.zeros(d_model, d_model, dtype=torch.float64)
        self.targets = torch.zeros(d_model, hidden_size, dtype=torch.float64)
        self.energy, self.num_rows = 0.0, 0

    def add(self, rows: torch.Tensor, embeddings: torch.Tensor):
        """Rows `(rows, d_model)` and the embedding `(rows, hidden_size)` that each of them should become."""
        rows, embeddings = rows.double(), embeddings.double()
        self.products += rows.T @ rows
        self.targets += rows.T @ embeddings
        self.energy += float(embeddings.square().sum())
        self.num_rows += len(rows)

    def solve(self) -> tuple[torch.Tensor, float]:
        """
        Returns:
            The weight of the projector, float32 `(hidden_size, d_model)`, and the share of the embeddings' energy that
            the regression explains. The weight is scaled so that rows become as long as embeddings are, since a
            regression shrinks what it cannot tell.
        """
        ridge = RIDGE * self.products.diagonal().mean() * torch.eye(len(self.products), dtype=torch.float64)
        weight = torch.linalg.solve(self.products + ridge, self.targets)
        energy = (weight * (self.products @ weight)).sum()  # of the rows that it makes
        explained = 2 * (weight * self.targets).sum() - energy
        scale = (self.energy / energy).sqrt()
        return (weight * scale).T.float().contiguous(), float(explained) / self.energy


def spread(tokens: list[int], span: Span) -> list[int]:
    """The token that is spoken during each row of a word's span, each of them for as long."""
    length = span.end - span.start
    return [tokens[row * len(tokens) // length] for row in range(length)]


def fit_projector(
    clips: Iterable[tuple[torch.Tensor, int, str]], aligner: Aligner, embeddings: torch.Tensor, tokenizer
) -> tuple[torch.Tensor, dict]:
    """
    Args:
        clips: Of each the log-mel window `(1, mel bins, frames)`, the rows that it covers, and its transcript.
        embeddings: The language model's `(words, hidden_size)`, of any float dtype.
        tokenizer: The language model's.

    Returns:
        The weight of the projector, float32 `(hidden_size, d_model)`, and what was found: clips, words, rows, and the
        share of the embeddings' energy that the rows explain.
    """
    ridge = Ridge(aligner.model.config.d_model, embeddings.shape[1])
    found = {"clips": 0, "words": 0}
    for windows, num_rows, text in clips:
        words = text.split()
        rows, spans = aligner.align(windows, num_rows, words)
        places, tokens = [], []
        for number, (word, span) in enumerate(zip(words, spans, strict=True)):
            # As an answer has it: a space before every word but the first.
            spoken = tokenizer(f" {word}" if number else word, add_special_tokens=False).input_ids
            places += range(span.start, span.end)
            tokens += spread(spoken, span)
        ridge.add(rows[places], embeddings[tokens])
        found = {"clips": found["clips"] + 1, "words": found["words"] + len(words)}
    weight, explained = ridge.solve()
    return weight, {**found, "rows of the encoder": ridge.num_rows, "explained": round(explained, 4)}
