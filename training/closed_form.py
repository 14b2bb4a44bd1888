"""
A start of the projector without steps: a Whisper finds when each word of a transcript is said, and a ridge regression
maps the encoder's rows at that time to the language model's embeddings of the word.
"""

import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from collator import ChatCollator, answer_text
from publishing.checkpoints import EMBEDDINGS, PROJECTOR_FILE, save_projector, stored_tensors
from publishing.paths import resolve, write_json
from training.arguments import Arguments
from word_times import Aligner, Span


RIDGE = 1e-3  # times the mean of the diagonal
FIRST_OF_ENCODER = "model.audio_encoder.conv1.weight"


class Ridge:
    """Ridge regression of rows `(d_model,)` onto embeddings `(hidden_size,)`, in constant memory."""

    def __init__(self, d_model: int, hidden_size: int):
        self.products = torch.zeros(d_model, d_model, dtype=torch.float64)
        self.targets = torch.zeros(d_model, hidden_size, dtype=torch.float64)
        self.energy, self.num_rows = 0.0, 0

    def add(self, rows: torch.Tensor, embeddings: torch.Tensor):
        """Adds rows `(rows, d_model)` and the embedding `(rows, hidden_size)` that each of them should become."""
        rows, embeddings = rows.double(), embeddings.double()
        self.products += rows.T @ rows
        self.targets += rows.T @ embeddings
        self.energy += float(embeddings.square().sum())
        self.num_rows += len(rows)

    def solve(self) -> tuple[torch.Tensor, float]:
        """
        Returns the weight of the projector, float32 `(hidden_size, d_model)`, and the share of the embeddings' energy
        that the regression explains. The weight is scaled so that rows become as long as embeddings, because a
        regression shrinks what it cannot tell.
        """
        ridge = RIDGE * self.products.diagonal().mean() * torch.eye(len(self.products), dtype=torch.float64)
        weight = torch.linalg.solve(self.products + ridge, self.targets)
        energy = (weight * (self.products @ weight)).sum()  # the energy of the rows that the weight makes
        explained = 2 * (weight * self.targets).sum() - energy
        return (weight * (self.energy / energy).sqrt()).T.float().contiguous(), float(explained) / self.energy


def spread(tokens: list[int], span: Span) -> list[int]:
    """Returns the token that is said during each row of a word's span. Each of them takes the same time."""
    length = span.end - span.start
    return [tokens[row * len(tokens) // length] for row in range(length)]


def fit_projector(
    clips: Iterable[tuple[torch.Tensor, int, str]], aligner: Aligner, embeddings: torch.Tensor, tokenizer
) -> tuple[torch.Tensor, dict]:
    """
    Args:
        clips: The log-mel window `(1, mel bins, frames)`, the rows that it covers and the transcript of each clip.
        embeddings: The language model's embeddings `(words, hidden_size)`, of any float dtype.
        tokenizer: The language model's tokenizer.

    Returns what [`Ridge.solve`] returns, the second value in a summary that also counts clips, words and rows.
    """
    ridge, num_clips, num_words = Ridge(aligner.model.config.d_model, embeddings.shape[1]), 0, 0
    for windows, num_rows, text in clips:
        words = text.split()
        rows, spans, _ = aligner.align(windows, num_rows, words)
        places, tokens = [], []
        for number, (word, span) in enumerate(zip(words, spans, strict=True)):
            # An answer has a space before every word but the first.
            ids = tokenizer(f" {word}" if number else word, add_special_tokens=False).input_ids
            places += range(span.start, span.end)
            tokens += spread(ids, span)
        ridge.add(rows[places], embeddings[tokens])
        num_clips, num_words = num_clips + 1, num_words + len(words)
    if not num_clips:
        raise ValueError("--stage align needs rows with a transcript and one clip of one window; --data has none.")
    weight, explained = ridge.solve()
    counts = {"clips": num_clips, "words": num_words, "rows of the encoder": ridge.num_rows}
    return weight, {**counts, "explained": round(explained, 4)}


def read_clips(processor, dataset, collator: ChatCollator) -> Iterator[tuple[torch.Tensor, int, str]]:
    """Yields window, number of rows and transcript of each row of data with one clip in one window and a transcript."""
    for row in dataset:
        text = answer_text(collator.messages(row)[-1]["content"])
        inputs = collator.inputs(row, "trimmed") if text.strip() else {}
        if len(inputs.get("input_features", ())) == 1:
            yield inputs["input_features"], int((inputs["input_ids"] == processor.audio_token_id).sum()), text


def align(args: Arguments, processor, dataset, collator: ChatCollator) -> dict:
    """
    Writes the projector to `args.output_dir`, and returns the summary. Of the model only the embeddings and a weight of
    the encoder are read. Raises a ValueError if the model has another encoder than the aligner.
    """
    start, aligner, tensors = time.time(), Aligner(args.aligner), {}
    for tensor in stored_tensors(resolve(args.model).folder):
        if tensor.name in (EMBEDDINGS, FIRST_OF_ENCODER):
            with safe_open(tensor.path, "pt") as file:
                tensors[tensor.name] = file.get_tensor(tensor.name)
    first, expected = tensors[FIRST_OF_ENCODER], aligner.model.model.encoder.conv1.weight
    if first.shape != expected.shape or not torch.allclose(first.float(), expected.float(), atol=1e-2):
        raise ValueError(f"--aligner {args.aligner} is not the Whisper whose encoder {args.model} has.")
    clips = itertools.islice(read_clips(processor, dataset, collator), args.align_rows)
    weight, summary = fit_projector(clips, aligner, tensors[EMBEDDINGS], processor.tokenizer)
    output = Path(args.output_dir)
    save_projector(output / PROJECTOR_FILE, weight, processor)
    summary = {"stage": args.stage, **summary, "seconds": round(time.time() - start, 1)}
    write_json(output / "summary.json", summary)
    return summary
