"""`train.py --stage align`: word times from Whisper's cross-attention, and a projector by ridge regression."""

import json

import numpy as np
import pytest
import soundfile
import torch
from helpers import audio, text
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

import upload
from demo.bases import ASSETS, sharpen, write_feature_extractor
from demo.untrained import make_bases
from training import alignment, train


WORDS = ["one", "two", "three"]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A complete Whisper with random weights, windows of 3 s, and a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("whisper")
    full = AutoTokenizer.from_pretrained(ASSETS / "qwen2-vl-7b")
    tokenizer = full.train_new_from_iterator([" ".join(WORDS)] * 10, vocab_size=300)
    tokenizer.add_tokens(alignment.PREFIX, special_tokens=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"d_model": 64, "num_mel_bins": 128, "max_source_positions": 150, "vocab_size": len(tokenizer)}
    for half in ("encoder", "decoder"):
        sizes |= {f"{half}_layers": 2, f"{half}_attention_heads": 2, f"{half}_ffn_dim": 128}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    model = sharpen(WhisperForConditionalGeneration(WhisperConfig(**sizes, **ids, max_target_positions=64)), std=0.2)
    model.generation_config = GenerationConfig(**ids, alignment_heads=[[0, 1], [1, 0]])
    model.save_pretrained(folder)
    write_feature_extractor(folder, window_seconds=3)
    return folder


def test_warping_takes_the_cheapest_path():
    cost = np.ones((3, 7))
    cost[0, :2] = cost[1, 2:5] = cost[2, 5:] = 0
    assert alignment.warp(cost).tolist() == [0, 2, 5]
    assert alignment.warp(np.zeros((1, 4))).tolist() == [0]
    rng = np.random.default_rng(0)
    for _ in range(20):
        cost = rng.normal(size=(4, 9))
        begins = alignment.warp(cost).tolist()
        assert begins[0] == 0 and begins == sorted(begins)


def test_ridge_finds_the_map_that_made_the_rows():
    torch.manual_seed(0)
    rows, weight = torch.randn(500, 16), torch.randn(8, 16)
    ridge = alignment.Ridge(16, 8)
    for part in rows.split(70):
        ridge.add(part, part @ weight.T)
    found, explained = ridge.solve()
    assert found.dtype == torch.float32 and torch.allclose(found, weight, atol=0.02)
    assert explained > 0.999
    noise = alignment.Ridge(16, 8)
    noise.add(rows, torch.randn(500, 8))
    found, explained = noise.solve()
    assert explained < 0.1
    # As long as embeddings are, though nothing can be told from these rows.
    assert (rows @ found.T).square().mean().sqrt().item() == pytest.approx(1, abs=0.1)


def test_words_are_spread_over_the_rows_of_their_spans():
    assert alignment.spread([7, 8], alignment.Span(3, 8)) == [7, 7, 7, 8, 8]
    assert alignment.spread([7], alignment.Span(3, 3)) == []


def test_spans_follow_each_other_within_the_clip(whisper):
    aligner = alignment.Aligner(whisper)
    torch.manual_seed(0)
    for num_rows in (2, 40, 150):
        rows, spans = aligner.align(torch.randn(1, 128, 300), num_rows, WORDS)
        assert rows.shape == (num_rows, 64)
        assert [span.start for span in spans[1:]] == [span.end for span in spans[:-1]]
        assert spans[0].start == 0 and spans[-1].end < num_rows
    with pytest.raises(ValueError, match="Whisper's decoder takes 64"):
        aligner.align(torch.randn(1, 128, 300), 40, WORDS * 30)


def test_stage_writes_a_projector_that_build_takes(whisper, tmp_path, sound):
    base, _ = make_bases(tmp_path)
    start = upload.build(base, whisper, tmp_path / "start")
    rows = []
    for number in range(6):
        soundfile.write(tmp_path / f"{number}.wav", sound(1 + number / 4, number), 16_000)
        rows.append({"audio": f"{number}.wav", "text": " ".join(WORDS[: 1 + number % 3]) if number else ""})
    asked = [audio("1.wav"), audio("2.wav"), text("Do both say the same?")]  # two clips: which one is transcribed?
    rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "no"}]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(**more):
        given = {"stage": "align", "aligner": whisper, "model": start, "data": tmp_path / "rows.jsonl"}
        given |= {"output_dir": tmp_path / "run", "audio_tokens": "trimmed", "use_cpu": True, **more}
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        (args,) = train.HfArgumentParser(train.Arguments).parse_args_into_dataclasses(words)
        return train.train(args)

    summary = run()
    assert summary["clips"] == 5 and summary["words"] == 2 + 3 + 1 + 2 + 3
    assert run(align_rows=2, output_dir=tmp_path / "few")["clips"] == 2
    projector = load_file(tmp_path / "run" / "audio_projector.safetensors")["audio_projector.weight"]
    assert projector.shape == (128, 64) and projector.dtype == torch.float32
    built = upload.build(
        checkpoint=str(start), projector=tmp_path / "run" / "audio_projector.safetensors", output=tmp_path / "built"
    )
    assert torch.equal(load_file(built / "model.safetensors")["model.audio_projector.weight"], projector)
    assert json.loads((built / "processor_config.json").read_text())["trained_audio_tokens"] == "trimmed"

    other = WhisperForConditionalGeneration.from_pretrained(whisper)
    torch.nn.init.normal_(other.model.encoder.conv1.weight)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(whisper).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is not the Whisper whose encoder"):
        run(aligner=tmp_path / "other", output_dir=tmp_path / "refused")
    other.generation_config.alignment_heads = None
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="names no `alignment_heads`"):
        run(aligner=tmp_path / "other", output_dir=tmp_path / "refused")
    with pytest.raises(ValueError, match="--stage align needs --aligner"):
        run(stage="projector")
