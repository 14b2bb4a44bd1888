"""make test ONLY=tests/test_trimmed.py: audio tokens in proportion to the clip, beside what test_modeling.py tests."""

import copy
import json
import sys
from functools import partial

import pytest
import torch
from helpers import AUDIO, CHAT, TOKENS, assert_close, assert_refused, audio, join, step_logits, text, two_turns
from transformers import AutoProcessor

from audio_utils import fetch_audio
from configuration_qwen2_audio_vl import count_audio
from demo.ask import EXAMPLES, user
from handler import EndpointHandler, read_messages
from publishing.build import build


@pytest.fixture
def processor(trimmed_processor):
    return trimmed_processor


@pytest.mark.parametrize(
    "samples, tokens, windows",
    [(0, 1, 1), (1, 1, 1), (320, 1, 1), (321, 2, 1), (48_000, 150, 1), (480_000, 1500, 1), (480_001, 1501, 2)],
)
def test_tokens_of_a_clip(samples, tokens, windows):
    assert count_audio(samples, 1500, "trimmed") == (windows, tokens)
    assert count_audio(samples, 1500) == count_audio(samples, 1500, "fixed") == (windows, 1500 * windows)


def test_where_the_choice_is_made(repo, processor, sound, tmp_path):
    """In a call, at loading, in a saved processor and at building."""
    load, clips = partial(AutoProcessor.from_pretrained, repo, trust_remote_code=True), [sound(0.7), sound(1.25, 1)]
    fixed, messages = load(), user([audio(clips[0]), text("Who?"), audio(clips[1])])
    trimmed = processor.apply_chat_template(messages, **CHAT)
    plain = fixed.apply_chat_template(messages, **CHAT)
    count = [(inputs["input_ids"] == fixed.audio_token_id).sum() for inputs in (trimmed, plain)]
    assert count == [35 + 63, TOKENS + 2 * TOKENS]
    assert torch.equal(trimmed["input_features"], plain["input_features"])
    processor.save_pretrained(tmp_path / "saved")
    built = build(checkpoint=repo, output=tmp_path / "built", audio_tokens="trimmed")
    for folder in (tmp_path / "saved", built):
        loaded = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        assert loaded.audio_tokens == "trimmed"
        assert torch.equal(loaded.apply_chat_template(messages, **CHAT)["input_ids"], trimmed["input_ids"])
    calls = [
        partial(fixed.apply_chat_template, messages, **CHAT),
        lambda **kwargs: fixed.apply_chat_template(messages, **CHAT, processor_kwargs={"audio_kwargs": kwargs}),
        partial(fixed, text=["<|im_start|>user\n<|audio_pad|>Who?<|audio_pad|>"], audio=clips),
    ]
    for call in calls:
        ids = torch.as_tensor(call(audio_tokens="trimmed")["input_ids"])
        assert (ids == fixed.audio_token_id).sum() == count[0]
    assert fixed._get_num_multimodal_tokens([], audio_lengths=[1], audio_tokens="trimmed")["num_audio_tokens"] == [1]
    for call in (*calls, load, partial(build, checkpoint=repo, output=tmp_path / "half")):
        with pytest.raises(ValueError, match="audio_tokens must be fixed or trimmed, got 'half'"):
            call(audio_tokens="half")
    assert not (tmp_path / "half").exists()


def test_a_model_is_asked_as_it_was_trained_or_warns(demo_repo, sound, tmp_path, monkeypatch):
    messages, path = user([audio(sound(0.7))]), tmp_path / "processor_config.json"
    for trained, asked, warns in (
        (None, "trimmed", False),
        ("fixed", "fixed", False),
        ("both", "trimmed", False),
        ("trimmed", "fixed", True),
        ("fixed", "trimmed", True),
    ):
        processor = AutoProcessor.from_pretrained(demo_repo, trust_remote_code=True, trained_audio_tokens=trained)
        processor.save_pretrained(tmp_path)
        assert json.loads(path.read_text()).get("trained_audio_tokens") == trained
        processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
        warnings = []
        monkeypatch.setattr(sys.modules[type(processor).__module__].logger, "warning_once", warnings.append)
        processor.apply_chat_template(messages, tokenize=True, return_dict=True, audio_tokens=asked)
        assert len(warnings) == warns and all(f"trained with {trained} audio tokens" in words for words in warnings)


def test_handler_does_what_the_folder_says(demo_repo, examples, tmp_path):
    folder = build(checkpoint=demo_repo, output=tmp_path / "repo", audio_tokens="trimmed")
    (name,) = next(example["audio"] for example in examples if example["skill"] == "transcribe")
    clip = (EXAMPLES / name).read_bytes()
    samples = len(fetch_audio(clip))
    for repo, tokens in ((demo_repo, 150), (folder, -(-samples // 320))):
        handler = EndpointHandler(str(repo))
        inputs = handler._process(handler._open_messages(read_messages(clip)))
        assert (inputs["input_ids"] == handler.processor.audio_token_id).sum() == tokens
        assert isinstance(handler({"inputs": clip})["text"], str)


def test_wrong_numbers_are_errors_that_name_both(ask, model, sound, processor):
    inputs = ask(audio(sound(0.7, 1)), audio(sound(1.9, 2)), text("Which?"))
    features, mask, ids = inputs["input_features"], inputs["input_features_mask"], inputs["input_ids"]
    one_more = ids.clone()
    one_more[0, (ids[0] == processor.audio_eos_token_id).nonzero()[-1]] = processor.audio_token_id
    without = r"130 audio tokens, but 150 audio embeddings .* pass its input_features_mask"
    for changes, message in (
        ({"input_features_mask": None}, without),
        ({"input_features_mask": None, "input_features": features[:2]}, r"130 audio tokens, but 100 .*_mask"),
        ({"input_features": features[:2], "input_features_mask": mask[:2]}, r"130 audio tokens, but 85 audio emb"),
        ({"input_features": features[:2]}, r"input_features_mask has shape \(3, 100\), but the features are 2 windows"),
        ({"input_features": None, "input_features_mask": None}, r"130 audio tokens, but 0 audio embeddings"),
        ({"input_features": None}, r"input_features_mask only together with the input_features"),
        ({"input_ids": one_more}, r"131 audio tokens, but 130 audio embeddings"),
        ({"input_features": features.repeat(2, 1, 1), "input_features_mask": mask.repeat(2, 1)}, r"130 .* but 260 "),
    ):
        assert_refused(model, message, **{**inputs, **changes})
    for wrong in (mask[[1, 0, 2]], mask.roll(20, 1), mask.T, mask.masked_fill(torch.arange(100) == 4, 0)):
        assert_refused(model, "input_features", **{**inputs, "input_features_mask": wrong})
    encoded = {"audio": model.get_audio_features(features)}
    without_audio = {name: value for name, value in inputs.items() if name not in AUDIO}
    assert_refused(model, without, **without_audio, mm_encoder_outputs=encoded)
    with pytest.raises(ValueError, match="input_features_mask has shape"):
        model.get_audio_features(features, input_features_mask=torch.ones(3, 50))


def test_numbers_that_coincide_are_no_match_of_windows(ask, model, sound):
    """Two clips of half a window have as many tokens as one whole window has rows."""
    inputs = ask([audio(sound(0.5, 1)), text("One")], [audio(sound(0.5, 2)), text("Two")])
    del inputs["input_features_mask"]
    features, message = inputs.pop("input_features")[:1], r"50 audio tokens, but 50 .*by window: \[50\].*_features_mask"
    assert_refused(model, message, **inputs, input_features=features)
    assert_refused(model, message, **inputs, mm_encoder_outputs={"audio": model.get_audio_features(features)})


def test_second_clip_as_long_as_the_first(processor, model, sound):
    """The new turn's window has as many rows as the tokens of both turns. It alone is encoded, whatever is given."""
    contents = [audio(sound(0.5, 1)), text("What?")], [audio(sound(0.5, 2)), text("And this?")]
    first, second, whole, cache = two_turns(processor, model, *contents)
    expected, encoded = step_logits(model, {**whole, **join(AUDIO, first, second)}), []
    with model.model.audio_encoder.register_forward_hook(lambda _, args, __: encoded.append(len(args[0]))):
        for inputs in (join(AUDIO, second), join(AUDIO, first, second)):
            assert_close(step_logits(model, {**whole, **inputs}, past_key_values=copy.deepcopy(cache)), expected)
    assert encoded == [1, 1]


def test_mask_marks_the_rows_of_each_clip(processor, model, sound):
    inputs = processor(text="<|audio_pad|><|audio_pad|>", audio=[sound(0.01), sound(1.5)], return_tensors="pt")
    mask = inputs["input_features_mask"]
    assert mask.tolist() == [[1] * 2 + [0] * 98, [1] * 100, [1] * 50 + [0] * 50]
    fixed = processor(text="<|audio_pad|>", audio=sound(0.1), audio_tokens="fixed")
    assert "input_features_mask" not in fixed
    whole = model.get_audio_features(inputs["input_features"]).pooler_output
    kept = model.get_audio_features(inputs["input_features"], mask).pooler_output
    torch.testing.assert_close(kept, torch.cat([whole[0, :1], whole[1], whole[2, :25]]))


def test_projector_works_on_kept_rows_only(ask, fresh_model, sound):
    """In a pass, in training and in `generate`; the encoder is given whole windows."""
    inputs = ask(audio(sound(0.7, 1)), audio(sound(1.9, 2)), text("Which?"))
    projected, encoded = [], []
    model = fresh_model.model
    model.audio_projector.register_forward_hook(lambda _, args, __: projected.append(args[0][..., 0].numel()))
    model.audio_encoder.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    fresh_model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    fresh_model.eval().generate(**inputs, max_new_tokens=2)
    assert projected == [35 + 95] * 2 and encoded == [3] * 2
