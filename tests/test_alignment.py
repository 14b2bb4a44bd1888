"""make test ONLY=tests/test_alignment.py: word times from Whisper's cross-attention; with `-m speech` of a person."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from audio_utils import fetch_audio
from demo.bases import ASSETS, sharpen
from publishing.paths import ROOT
from training.alignment import PREFIX, Aligner, Span, warp


WORDS = ["one", "two", "three"]
JFK = "And so, my fellow Americans, ask not what your country can do for you, ask what you can do for your country."
# Seconds at which some of its words begin, by its energy. Whisper gives the second pause to the "what" behind it.
BEGINS = {3: 1.30, 5: 3.25, 6: 4.00, 9: 5.65, 14: 8.20}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A complete Whisper with random weights, windows of 3 s, and a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("whisper")
    full = AutoTokenizer.from_pretrained(ASSETS / "qwen2-vl-7b")
    tokenizer = full.train_new_from_iterator([" ".join(WORDS)] * 10, vocab_size=300)
    tokenizer.add_tokens(PREFIX, special_tokens=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"d_model": 64, "num_mel_bins": 128, "max_source_positions": 150, "vocab_size": len(tokenizer)}
    for half in ("encoder", "decoder"):
        sizes |= {f"{half}_layers": 2, f"{half}_attention_heads": 2, f"{half}_ffn_dim": 128}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    model = sharpen(WhisperForConditionalGeneration(WhisperConfig(**sizes, **ids, max_target_positions=64)), std=0.2)
    model.generation_config = GenerationConfig(**ids, alignment_heads=[[0, 1], [1, 0]])
    model.save_pretrained(folder)
    return folder


def test_warping_takes_the_cheapest_path():
    cost = np.ones((3, 7))
    cost[0, :2] = cost[1, 2:5] = cost[2, 5:] = 0
    assert warp(cost).tolist() == [0, 2, 5]
    assert warp(np.zeros((1, 4))).tolist() == [0]
    rng = np.random.default_rng(0)
    for _ in range(20):
        cost = rng.normal(size=(3, 6))
        # A path keeps the row where the token advances, or advances both.
        paths = [
            (cost[0, : b + shared_b].sum() + cost[1, b : c + shared_c].sum() + cost[2, c:].sum(), [0, b, c])
            for b, c in itertools.combinations_with_replacement(range(6), 2)
            for shared_b, shared_c in itertools.product((0, 1), repeat=2)
            if b + shared_b > 0 and c + shared_c > b
        ]
        assert warp(cost).tolist() == min(paths)[1]


def test_spans_follow_each_other_within_the_clip(whisper):
    aligner = Aligner(whisper)
    torch.manual_seed(0)
    for num_rows in (2, 40, 150):
        spans = aligner.align(torch.randn(1, 128, 300), num_rows, WORDS)
        assert [span.start for span in spans[1:]] == [span.end for span in spans[:-1]]
        assert spans[0].start == 0 and spans[-1].end < num_rows
    with pytest.raises(ValueError, match="Whisper's decoder takes 64"):
        aligner.align(torch.randn(1, 128, 300), 40, WORDS * 30)
    aligner.model.generation_config.alignment_heads = None
    aligner.model.save_pretrained(whisper.parent / "other")
    aligner.tokenizer.save_pretrained(whisper.parent / "other")
    with pytest.raises(ValueError, match="names no `alignment_heads`"):
        Aligner(whisper.parent / "other")


def test_a_word_is_where_the_decoder_attends_when_it_predicts_it(whisper, monkeypatch):
    """The position before each token attends to the token's rows; each word has as many rows a token."""
    aligner, expected, position = Aligner(whisper), [Span(0, 40), Span(40, 90), Span(90, 130)], len(PREFIX) - 1
    counts = [len(aligner.tokenizer(f" {word}", add_special_tokens=False).input_ids) for word in WORDS]
    tokens = len(PREFIX) + sum(counts) + 1
    attention = torch.full((1, 2, tokens, 150), 1e-3)
    for span, count in zip([*expected, Span(130, 150)], [*counts, 1], strict=True):
        for rows in torch.arange(span.start, span.end).tensor_split(count):
            attention[:, :, position, rows] = 1
            position += 1
    seen = []

    def forward(windows, decoder_input_ids, output_attentions):
        seen.append(decoder_input_ids.shape[1])
        return SimpleNamespace(cross_attentions=[attention, attention])

    monkeypatch.setattr(aligner.model, "forward", forward)
    assert aligner.align(torch.zeros(1, 128, 300), 150, WORDS) == expected
    assert seen == [tokens]


@pytest.mark.speech
def test_word_times_of_a_person(speech):
    from speech.parts import make_parts

    make_parts(ROOT / "build" / "speech")
    folder = ROOT / "build" / "speech" / "whisper"
    samples = fetch_audio(str(speech))
    windows = WhisperFeatureExtractor.from_pretrained(folder)(samples, sampling_rate=16_000, return_tensors="pt")
    spans = Aligner(folder).align(windows.input_features, -(-len(samples) // 320), JFK.split())
    errors = [abs(spans[word].start / 50 - begin) for word, begin in BEGINS.items()]
    assert sum(errors) / len(errors) < 0.25  # 0.16 s; with the attention one token late 0.48 s
