"""Word times of a clip whose transcript is known, from the cross-attention of a complete Whisper."""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, WhisperForConditionalGeneration


MEDIAN_WIDTH = 7  # rows of 20 ms, as in openai/whisper
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
    step = np.zeros((tokens, rows), int)  # 0: both advance, 1: the token, 2: the row
    for token in range(tokens):
        for row in range(rows):
            before = total[token, row], total[token, row + 1], total[token + 1, row]
            step[token, row] = np.argmin(before)
            total[token + 1, row + 1] = cost[token, row] + before[step[token, row]]
    begins, token, row = np.zeros(tokens, int), tokens - 1, rows - 1
    while token >= 0 and row >= 0:
        begins[token] = row
        token, row = token - (step[token, row] < 2), row - (step[token, row] != 1)
    return begins


class Aligner:
    """
    Finds when the words of a transcript are spoken, as openai/whisper's `timing.py` does.

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
            windows: Log-mel features, float `(1, mel bins, frames)`, of one clip.
            num_rows: The number of rows of 20 ms that the clip covers.
            words: The words of the transcript, in order.

        Returns:
            The encoder's rows of the clip, float32 `(num_rows, d_model)`, and the span of each word.

        Raises:
            ValueError: if the words do not fit Whisper's decoder.
        """
        pieces = [self.tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
        prefix = self.tokenizer.convert_tokens_to_ids(PREFIX)
        ids = [*prefix, *(token for piece in pieces for token in piece), self.tokenizer.eos_token_id]
        if len(ids) > (limit := self.model.config.max_target_positions):
            raise ValueError(f"a transcript of {len(ids)} tokens; Whisper's decoder takes {limit}")
        outputs = self.model(windows, decoder_input_ids=torch.tensor([ids]), output_attentions=True)
        weights = torch.stack([outputs.cross_attentions[layer][0, head] for layer, head in self.heads])
        weights = weights[..., :num_rows]  # [heads, tokens, rows]
        weights = (weights - weights.mean(1, keepdim=True)) / weights.std(1, keepdim=True, correction=0).clamp(min=1e-9)
        margin = MEDIAN_WIDTH // 2
        if num_rows > margin:
            weights = F.pad(weights, (margin, margin), "reflect").unfold(-1, MEDIAN_WIDTH, 1).median(-1).values
        # The decoder attends to a token where it predicts it, one position before. The last prediction is of the end.
        begins = warp(-weights.mean(0)[len(prefix) - 1 : -1].double().numpy())
        firsts = np.cumsum([0, *map(len, pieces)])
        spans = [Span(int(begins[first]), int(begins[last])) for first, last in itertools.pairwise(firsts)]
        return outputs.encoder_last_hidden_state[0, :num_rows].float(), spans
