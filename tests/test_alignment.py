"""
make test ONLY=tests/test_alignment.py: word times from Whisper's cross-attention, and a projector in closed
form. `make test-speech` compares the word times of a recording of a person.
"""

import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import transformers
from data_rows import chat, write_lines
from helpers import PREFIX, audio, complete_whisper, text
from packaging.version import Version
from safetensors.torch import load_file
from transformers import WhisperForConditionalGeneration

from audio_streaming import find_voice
from audio_utils import fetch_audio
from publishing.build import build
from publishing.paths import ROOT
from training.closed_form import Ridge, spread
from transcribe import Answer, Transcriber
from word_times import Aligner, Span, delay, separate, warp


pytest_plugins = "runs"  # fixtures

WORDS = ["one", "two", "three"]
JFK = "And so, my fellow Americans, ask not what your country can do for you, ask what you can do for your country."
# Seconds at which some of its words begin, by its energy. Whisper gives the second pause to the "what" behind it.
BEGINS = {3: 1.30, 5: 3.25, 6: 4.00, 9: 5.65, 14: 8.20}


@pytest.fixture(scope="module")
def whisper(start, tmp_path_factory):
    """The Whisper of `start`, with windows of 3 s, made complete: a tokenizer of its own and alignment heads."""
    folder = shutil.copytree(start.parent / "whisper", tmp_path_factory.mktemp("aligner") / "whisper")
    return complete_whisper(folder, " ".join(WORDS), [[0, 1], [0, 0]])


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


def test_spans_follow_each_other_within_the_clip(whisper, tmp_path):
    aligner = Aligner(whisper)
    torch.manual_seed(0)
    for num_rows in (2, 40, 150):
        rows, spans, _ = aligner.align(torch.randn(1, 128, 300), num_rows, WORDS)
        assert rows.shape == (num_rows, 128)
        assert [span.start for span in spans[1:]] == [span.end for span in spans[:-1]]
        assert spans[0].start == 0 and spans[-1].end < num_rows
    with pytest.raises(ValueError, match="Whisper's decoder takes 448"):
        aligner.align(torch.randn(1, 128, 300), 40, WORDS * 150)
    noise = np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)
    transcriber = Transcriber(lambda clips: [Answer("word " * 500) for _ in clips], 10.0, aligner=aligner)
    ((_, (segment,)),) = transcriber.batches(noise)  # one answer too long is not the end of the whole recording
    assert segment.text and not segment.words and segment.doubt == "the text repeats itself"
    other = shutil.copytree(whisper, tmp_path / "other")
    (other / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="names no `alignment_heads`"):
        Aligner(other)


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

    def forward(input_features, decoder_input_ids, output_attentions):
        assert decoder_input_ids.shape[1] == tokens
        logits, encoded = torch.zeros(1, tokens, len(aligner.tokenizer)), torch.zeros(1, 150, 128)
        return SimpleNamespace(cross_attentions=[attention] * 2, encoder_last_hidden_state=encoded, logits=logits)

    monkeypatch.setattr(aligner.model, "forward", forward)
    assert aligner.align(torch.zeros(1, 128, 300), 150, WORDS).spans == expected


def test_ridge_finds_the_map_that_made_the_rows():
    torch.manual_seed(0)
    rows, weight = torch.randn(500, 16), torch.randn(8, 16)
    ridge = Ridge(16, 8)
    for part in rows.split(70):
        ridge.add(part, part @ weight.T)
    solved, explained = ridge.solve()
    assert solved.dtype == torch.float32 and torch.allclose(solved, weight, atol=0.02)
    assert explained > 0.999
    noise = Ridge(16, 8)
    noise.add(rows, torch.randn(500, 8))
    solved, explained = noise.solve()
    assert explained < 0.1
    # Rows become as long as embeddings, even if they tell nothing.
    assert (rows @ solved.T).square().mean().sqrt().item() == pytest.approx(1, abs=0.1)


def test_words_are_spread_over_the_rows_of_their_spans():
    assert spread([7, 8], Span(3, 8)) == [7, 7, 7, 8, 8]
    assert spread([7], Span(3, 3)) == []


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="training needs transformers 5.18")
def test_stage_writes_a_projector_that_build_takes(run, start, whisper, tmp_path, sound):
    rows = []
    for number in range(6):
        soundfile.write(tmp_path / f"{number}.wav", sound(1 + number / 4, number), 16_000)
        rows.append({"audio": f"{number}.wav", "text": " ".join(WORDS[: 1 + number % 3]) if number else ""})
    # Which of two clips is transcribed?
    rows.append(chat(audio("1.wav"), audio("2.wav"), text("Do both say the same?"), answer="no"))
    settings = {"stage": "align", "aligner": whisper, "audio_tokens": "trimmed"}
    settings["data"] = [write_lines(tmp_path / "rows.jsonl", rows)]

    summary = run(tmp_path / "run", **settings)
    assert summary["clips"] == 5 and summary["words"] == 2 + 3 + 1 + 2 + 3
    assert run(tmp_path / "few", **settings, align_rows=2)["clips"] == 2
    path = tmp_path / "run" / "audio_projector.safetensors"
    projector = load_file(path)["audio_projector.weight"]
    assert projector.shape == (128, 128) and projector.dtype == torch.float32
    built = build(checkpoint=start, projector=path, output=tmp_path / "built")
    assert torch.equal(load_file(built / "model.safetensors")["model.audio_projector.weight"], projector)
    assert json.loads((built / "processor_config.json").read_text())["trained_audio_tokens"] == "trimmed"

    other = shutil.copytree(whisper, tmp_path / "other")
    model = WhisperForConditionalGeneration.from_pretrained(other)
    torch.nn.init.normal_(model.model.encoder.conv1.weight)
    model.save_pretrained(other)
    with pytest.raises(ValueError, match="is not the Whisper whose encoder"):
        run(tmp_path / "refused", **settings | {"aligner": other})
    with pytest.raises(ValueError, match="--stage align needs --aligner"):
        run(tmp_path / "refused", **settings | {"stage": "projector"})


def test_only_a_whisper_aligns(demo_repo):
    with pytest.raises(ValueError, match="holds a model of type 'qwen2_audio_vl'; expected a complete Whisper"):
        Aligner(demo_repo)


def test_words_move_to_where_they_are_said_and_stay_in_the_clip():
    spans = [Span(0, 4), Span(4, 9), Span(9, 12)]
    assert separate(delay(spans), 13) == [Span(0, 6), Span(6, 11), Span(11, 13)]


@pytest.mark.speech
def test_word_times_of_a_person(speech):
    from speech.parts import make_parts

    make_parts(ROOT / "build" / "speech")
    folder = ROOT / "build" / "speech" / "whisper"
    samples = fetch_audio(str(speech))
    words = Aligner(folder).find_words(JFK, samples, find_voice(samples).numpy())
    errors = [abs(words[word][0] - begin) for word, begin in BEGINS.items()]
    assert sum(errors) / len(errors) < 0.12  # 0.08 s
