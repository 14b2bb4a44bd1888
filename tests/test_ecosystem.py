"""make test ONLY=tests/test_ecosystem.py: notebooks, agents, servers and trainers written for stock models."""

import dataclasses
import pickle
import types

import pytest
import torch
import transformers
from helpers import CHAT, TOKENS, audio, image, text
from openai.types.chat import ChatCompletionMessage
from packaging.version import Version
from transformers import AutoModel

from demo.ask import EXAMPLES, load, user


RELEASE = Version(transformers.__version__)


def assert_equal(inputs, expected):
    """Expects the same model inputs in the same order."""
    assert list(inputs) == list(expected) and all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_class_is_the_same_at_every_loading(repo, model):
    again = AutoModel.from_pretrained(repo, trust_remote_code=True, dtype="auto")
    assert type(again) is type(model)
    # Not after `output_hidden_states`, for which upstream leaves hooks. test_modeling.py compares pickled weights.
    assert type(pickle.loads(pickle.dumps(again))) is type(model)


def test_messages_may_be_objects(processor, sound):
    """Objects of the OpenAI client, dataclasses and mappings give the ids of the same messages as dicts."""
    question, answer = [audio(sound(0.5)), text("Who?")], {"role": "assistant", "content": "Nobody."}
    again = {"role": "user", "content": [text("Sure?")]}
    expected = processor.apply_chat_template([{"role": "user", "content": question}, answer, again], **CHAT)
    message_class = dataclasses.make_dataclass("Message", ["role", "content", ("name", str, None)])
    objects = [
        message_class("user", [types.MappingProxyType(item) for item in question]),
        ChatCompletionMessage(**answer),
        types.MappingProxyType(again),
    ]
    assert_equal(processor.apply_chat_template(objects, **CHAT), expected)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    objects[1] = ChatCompletionMessage(role="assistant", content=None, tool_calls=[call])
    with pytest.raises(ValueError, match=r"messages\[1\] calls a tool, but this model calls none"):
        processor.apply_chat_template(objects, **CHAT)


@pytest.mark.parametrize("places", [(), ("processor_kwargs",), ("audio_kwargs", "processor_kwargs")])
def test_load_audio_backend_is_taken(places, processor, sound):
    messages, settings = user([audio(sound(0.5)), text("Who?")]), {"load_audio_backend": "torchcodec"}
    for place in places:
        settings = {place: settings}
    inputs = processor.apply_chat_template(messages, **CHAT, **settings)
    assert_equal(inputs, processor.apply_chat_template(messages, **CHAT))


def test_answers_are_marked(processor, sound, picture):
    """`return_assistant_tokens_mask` marks the answers and the ends of their turns, whatever stands before them."""
    conversation = [
        *user([audio(sound(1.3)), image(picture), text("Who?"), audio(sound(0.2, 1))]),
        {"role": "assistant", "content": "Nobody, é."},
        *user([audio(sound(2.5, 2)), text("Sure?")]),
        {"role": "assistant", "content": [text("Yes"), text("!")]},
    ]
    settings = {**CHAT, "return_assistant_tokens_mask": True, "processor_kwargs": {"padding": True}}
    if Version("5.18") > RELEASE:
        with pytest.raises(ImportError, match=r"transformers>=5\.18"):
            processor.apply_chat_template(conversation, **settings)
        return
    for rows, answers in (
        ([conversation], ["Nobody, é.<|im_end|>Yes!<|im_end|>"]),
        ([conversation[:2], conversation], ["Nobody, é.<|im_end|>", "Nobody, é.<|im_end|>Yes!<|im_end|>"]),
    ):
        inputs = processor.apply_chat_template(rows, **settings)
        masks = inputs.pop("assistant_masks").bool()
        assert [processor.decode(ids[mask]) for ids, mask in zip(inputs["input_ids"], masks, strict=True)] == answers
        assert_equal(inputs, processor.apply_chat_template(rows, **CHAT, processor_kwargs={"padding": True}))


def test_transcription_request(demo_repo, examples):
    """One clip and a batch, with the prompt in the output or cut off, are the bare transcripts."""
    processor, model = load(demo_repo, torch.float32)
    asked = [example for example in examples if example["skill"] == "transcribe"]
    clips = [str(EXAMPLES / example["audio"][0]) for example in asked]
    words = [example["answer"] for example in asked]
    inputs = processor.apply_transcription_request(clips)
    output = model.generate(**inputs, max_new_tokens=12)
    new = output[:, inputs["input_ids"].shape[1] :]
    assert processor.decode(output, return_format="transcription_only") == words
    assert processor.decode(new, return_format="transcription_only") == words
    assert [answer.strip() for answer in processor.decode(new, skip_special_tokens=True)] == words
    output = model.generate(**processor.apply_transcription_request(clips[0]), max_new_tokens=12)
    assert processor.decode(output[0], return_format="transcription_only") == words[0]
    for call in (processor.apply_transcription_request, processor.decode):
        with pytest.raises(ValueError, match=r"have no times.*transcribe\.py"):
            call(clips if call != processor.decode else output, return_timestamps=True)
    assert processor.decode(output[0], return_timestamps=False) == processor.decode(output[0])
    prompts = processor.apply_transcription_request(clips, tokenize=False)
    assert_equal(processor(text=prompts, audio=clips, padding=True, return_tensors="pt"), inputs)


def test_transcription_request_says_what_is_asked(processor, sound):
    clips = [sound(0.5), sound(0.7)]
    first, second = processor.apply_transcription_request(clips, ["en", None], ["Write it down.", None], tokenize=False)
    assert "Write it down. The language is English.<|im_end|>" in first and "Transcribe the audio.<|im_end|>" in second
    assert "The language is Welsh." in processor.apply_transcription_request(clips[0], "welsh", tokenize=False)[0]
    for message, *arguments in (
        ("no clip to transcribe", []),
        ("language has 1 entries for 2 clips", clips, ["en"]),
        ("language must be a code or name", clips, "Klingon"),
        ("prompt has 3 entries for 2 clips", clips, None, ["a", "b", "c"]),
    ):
        with pytest.raises(ValueError, match=message):
            processor.apply_transcription_request(*arguments)
    with pytest.raises(ValueError, match="return_format must be"):
        processor.decode([1], return_format="parsed")


def test_tokens_are_counted_without_data(processor, ask, sound, picture):
    counted = processor._get_num_multimodal_tokens(audio_lengths=[1, 16_000, 16_001], image_sizes=[picture.size[::-1]])
    assert counted["num_audio_tokens"] == [TOKENS, TOKENS, 2 * TOKENS]
    ids = ask(image(picture), audio(sound(1.5)))["input_ids"]
    assert counted["num_image_tokens"] == [(ids == processor.image_token_id).sum()]
    assert (ids == processor.audio_token_id).sum() == 2 * TOKENS


def test_outputs_of_the_encoder_are_returned(ask, model, sound):
    inputs = ask(audio(sound(1.5)), text("Who?"))
    outputs, nothing = model(**inputs), model(**ask(text("Who?")))
    assert hasattr(outputs, "audio_outputs") == (Version("5.24") <= RELEASE)
    if hasattr(outputs, "audio_outputs"):
        features = model.get_audio_features(inputs["input_features"])
        assert nothing.audio_outputs is None
        for name in ("last_hidden_state", "pooler_output"):
            assert torch.equal(outputs.audio_outputs[name], features[name])
        given = model(**{**inputs, "input_features": None}, mm_encoder_outputs={"audio": features})
        assert given.audio_outputs is features


@pytest.mark.parametrize("grids", [1, 0])
def test_fewer_pictures_than_placeholders(grids, ask, model, picture):
    inputs = ask(image(picture), image(picture), text("Same?"))
    inputs["pixel_values"] = inputs["pixel_values"][: grids * len(inputs["pixel_values"]) // 2]
    inputs["image_grid_thw"] = inputs["image_grid_thw"][:grids]
    with pytest.raises(ValueError, match="image and video tokens do not fit image_grid_thw"):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.long
@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.5 cannot trace transformers' own decorators")
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("kind", ["text", "fixed", "trimmed"])
def test_forward_compiles_as_one_graph(kind, learns, processor, fresh_model, sound):
    def ask(*seconds):
        content = [audio(sound(length, seed)) for seed, length in enumerate(seconds) if kind != "text"]
        settings = {} if kind == "text" else {"audio_tokens": kind}
        inputs = processor.make_inputs(user([*content, text("Who?")]), **settings)
        return {**inputs, "labels": inputs["input_ids"]} if learns else inputs

    model = fresh_model.float().train(learns)
    torch.compiler.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    for inputs in [ask(1.5), ask(0.7, 1.9)]:
        results = []
        for forward in (model.forward, compiled):
            with torch.set_grad_enabled(learns):
                outputs = forward(**inputs)
            if learns:
                outputs.loss.backward()
            gradient = model.model.audio_projector.weight.grad
            assert (gradient is not None) == (learns and kind != "text")
            results.append((outputs.logits.detach(), gradient))
            model.zero_grad(set_to_none=True)
        torch.testing.assert_close(results[1], results[0])
    if kind == "trimmed":
        mask = inputs["input_features_mask"]
        with pytest.raises(RuntimeError, match="Audio tokens and audio features do not match"):
            compiled(**{**inputs, "input_features_mask": mask.roll(50, 1).tril()})
    inputs["input_ids"][0, -1] = model.config.audio_token_id
    with pytest.raises(ValueError, match="Audio tokens and audio features do not match: the prompt has"):
        model(**inputs)
    if kind != "text":
        with pytest.raises(RuntimeError, match="Audio tokens and audio features do not match"):
            compiled(**inputs)


def test_what_does_not_work_says_so(repo):
    with pytest.raises(ValueError, match="does not support an attention implementation through torch's flex_attention"):
        AutoModel.from_pretrained(repo, trust_remote_code=True, attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="Could not load model"):
        transformers.pipeline("automatic-speech-recognition", model=str(repo), trust_remote_code=True)


def test_continuous_batching(ask, model, sound, picture):
    prompts = [ask(text(words)) for words in ("Who?", "What is this, and why is it here?", "Hm")]
    ids = [inputs["input_ids"][0].tolist() for inputs in prompts]
    if Version("5.24") > RELEASE:
        with pytest.raises(ImportError, match=r"transformers>=5\.24"):
            model.generate_batch(ids)
        return
    expected = [model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist() for inputs in prompts]
    small = transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)  # by default most of the memory
    batched = model.generate_batch(ids, max_new_tokens=6, continuous_batching_config=small).values()
    assert [prompt + answer.generated_tokens for prompt, answer in zip(ids, batched, strict=True)] == expected
    for item in (audio(sound(0.5)), image(picture)):
        with pytest.raises(ValueError, match=r"prompts \[3\] have tokens of audio, images or video"):
            model.generate_batch([*ids, ask(item)["input_ids"][0].tolist()])
