"""Word times of a clip whose transcript is known, from the cross-attention of a complete Whisper."""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer, WhisperForConditionalGeneration
from transformers.models.whisper.generation_whisper import _dynamic_time_warping, _median_filter


MEDIAN_WIDTH = 7  # rows of 20 ms, as in openai/whisper
PREFIX = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]


class Span(NamedTuple):
    """The encoder's rows during which a word is spoken."""

    start: int
    end: int


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
        settings = {"attn_implementation": "eager", "dtype": torch.float32}  # only eager attention gives its weights
        self.model = WhisperForConditionalGeneration.from_pretrained(folder, **settings).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.heads = getattr(self.model.generation_config, "alignment_heads", None)
        if not self.heads:
            need = "expected a Whisper as OpenAI published it"
            raise ValueError(f"{folder} names no `alignment_heads` in its generation_config.json; {need}.")

    @torch.no_grad()
    def align(self, windows: torch.Tensor, num_rows: int, words: list[str]) -> tuple[torch.Tensor, list[Span]]:
        """
        Args:
            windows: Log-mel features, float `(1, mel bins, frames)`, of one clip.
            num_rows: The number of rows of 20 ms that the clip covers.
            words: The words of the transcript, in order.

        Returns the encoder's rows of the clip, float32 `(num_rows, d_model)`, and the span of each word. Raises a
        ValueError if the words do not fit Whisper's decoder.
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
        weights = _median_filter(weights, MEDIAN_WIDTH)
        # The decoder attends to a token where it predicts it, one position before. The last prediction is of the end.
        begins = warp(-weights.mean(0)[len(prefix) - 1 : -1].double().numpy())
        firsts = np.cumsum([0, *map(len, pieces)])
        spans = [Span(int(begins[first]), int(begins[last])) for first, last in itertools.pairwise(firsts)]
        return outputs.encoder_last_hidden_state[0, :num_rows].float(), spans
