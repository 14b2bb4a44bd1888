"""make test ONLY=tests/test_modeling.py: the model, loaded from a built folder, against the sum of its parts."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import (
    AUDIO,
    KINDS,
    TOKENS,
    VISION,
    WITHOUT_AUDIO,
    SumOfParts,
    assert_close,
    assert_refused,
    audio,
    greedy,
    greedy_output,
    image,
    join,
    step_logits,
    text,
    two_turns,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoConfig, AutoModel, DynamicCache

from benchmarks.parts import Parts
from configuration_qwen2_audio_vl import FAMILIES


BOTH = pytest.mark.parametrize("audio_tokens", ["fixed", "trimmed"])


@pytest.fixture
def audio_tokens():
    return "fixed"


@pytest.fixture
def processor(audio_tokens, processor, trimmed_processor):
    return trimmed_processor if audio_tokens == "trimmed" else processor


@pytest.fixture(scope="module")
def parts(shared_model, bases):
    return SumOfParts(shared_model, bases["whisper"])


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_equals_sum_of_parts(kind, kinds, model, parts):
    assert_equals_parts(kinds(kind), model, parts)


@pytest.mark.bases
@pytest.mark.parametrize("kind", ["interleaved", "mixed batch of two audios"])
def test_each_base_equals_the_sum_of_its_parts(kind, kinds, model, parts):
    assert_equals_parts(kinds(kind), model, parts)


def assert_equals_parts(inputs, model, parts):
    """Compares the logits of the last four tokens of a prompt, and those of the next four, computed with the cache."""
    prompt, output = model(**inputs, logits_to_keep=4).logits, greedy_output(model, inputs, steps=4)
    mask = F.pad(inputs["attention_mask"], (0, 4), value=1)
    expected = parts.logits({**inputs, "input_ids": output.sequences, "attention_mask": mask}, last=8)
    assert_close(prompt, expected[:, :4], atol=2e-4)
    assert_close(torch.stack(output.logits, dim=1), expected[:, 3:7], atol=2e-4)


@pytest.mark.parametrize("kind", ["image, audio", "video, audio", "mixed batch"])
def test_token_types_are_found_where_they_are_not_given(kind, kinds, model):
    inputs = kinds(kind)
    expected = model(**inputs, logits_to_keep=2).logits
    assert torch.equal(model(**{**inputs, "mm_token_type_ids": None}, logits_to_keep=2).logits, expected)


@pytest.fixture
def stock(model):
    """The base with the very tensors of the model: kernels round copies that lie otherwise in memory in another way."""
    qwen = Parts(model).qwen
    qwen.generation_config = model.generation_config
    return qwen


@pytest.mark.bases
def test_without_audio_equals_stock_to_the_bit(kinds, model, stock):
    for kind in ("text", *WITHOUT_AUDIO):
        inputs = kinds(kind)
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits), kind
        for more in ({}, {"num_beams": 3, "num_return_sequences": 2}):
            ours, theirs = (greedy_output(each, inputs, 4, **more) for each in (model, stock))
            assert torch.equal(ours.sequences, theirs.sequences), (kind, more)
            assert all(map(torch.equal, ours.logits, theirs.logits)), (kind, more)


@pytest.mark.bases
def test_second_turn_without_audio_equals_stock_to_the_bit(processor, model, stock, picture):
    turns = [image(picture), text("What is this?")], [text("And why?")]
    results = []
    for each in (model, stock):
        _, _, whole, cache = two_turns(processor, each, *turns)
        results.append(step_logits(each, whole, past_key_values=cache))
    assert torch.equal(*results)


def test_audio_features_are_encoder_then_projector(kinds, model, parts):
    inputs = kinds("audio alone")
    features = model.get_audio_features(inputs["input_features"])
    expected = parts.encoder(inputs["input_features"]).last_hidden_state
    assert torch.equal(features.last_hidden_state, expected)
    assert torch.equal(features.pooler_output, parts.projector(expected))


def test_return_tuple(kinds, model):
    inputs = kinds("audio alone")
    assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)
    features = model.get_audio_features(inputs["input_features"], return_dict=False)
    assert isinstance(features, tuple) and features[1].shape == (11, TOKENS, 64)


@pytest.mark.parametrize("audio_tokens, lengths", [("fixed", [50, 150]), ("trimmed", [25, 125])])
def test_joined_windows_are_encoded_like_separate_ones(audio_tokens, lengths, processor, model, sound):
    """vLLM's form of a batch: the windows of each clip one after another, and a mask of the frames that count."""
    texts, clips = "<|audio_pad|> and <|audio_pad|>", [sound(0.5), sound(2.5, 1)]
    call = {"text": texts, "audio": clips, "audio_tokens": audio_tokens}
    plain = processor(**call, return_tensors="pt")["input_features"]
    joined = processor(**call, return_tensors="pt", return_text_replacement_offsets=True)
    rows = list(zip(joined["input_features"], joined["input_features_mask"], strict=True))
    assert plain.shape[::2] == (4, 100) and [row.shape[1] for row, _ in rows] == [100, 300]
    expected = model.get_audio_features(plain).pooler_output
    for (row, mask), windows, length in zip(rows, expected.split([1, 3]), lengths, strict=True):
        own = model.get_audio_features(row[None], input_features_mask=[mask]).pooler_output
        torch.testing.assert_close(own, windows.flatten(0, 1)[:length])
        torch.testing.assert_close(model.get_audio_features(row[None]).pooler_output, windows)


@BOTH
@pytest.mark.parametrize(
    "kind, more",
    [
        ("image, audio", {"use_cache": False}),
        ("left padded", {"use_cache": False}),
        ("mixed batch of two audios", {"use_cache": False}),
        ("mixed batch of two audios", {"cache_implementation": "static"}),
        ("image, audio", {"past_key_values": None}),
        ("image, audio", {"prefill_chunk_size": 100}),
    ],
)
def test_cache_changes_nothing(audio_tokens, kind, more, kinds, model):
    inputs = kinds(kind)
    if "past_key_values" in more:
        more = {"past_key_values": DynamicCache(config=model.config.get_text_config())}
    try:
        logits = step_logits(model, inputs, **more)
    except ValueError as error:  # transformers before 5.23 cannot split what was encoded
        assert "prefill_chunk_size" in more and "audio embeddings were given" in str(error)
    else:
        assert_close(logits, step_logits(model, inputs))


def test_decode_step_does_not_wait_for_the_device(kinds, model, stock):
    """Looking for audio in every decode step would copy a number to the host each time."""

    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    inputs, counts = kinds("text"), []
    for each in (model, stock):
        cache = each(**inputs, use_cache=True).past_key_values
        with Waits() as waits:
            each(input_ids=torch.tensor([[5]]), past_key_values=cache, position_ids=torch.full((3, 1, 1), 40))
        counts.append(waits.count)
    assert counts[0] == counts[1]


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.5 cannot trace transformers' own decorators")
def test_compiled_decode_step_is_one_graph(kinds, model):
    inputs = kinds("audio")
    outputs = model(**inputs, use_cache=True, logits_to_keep=1)
    step = outputs.logits.argmax(-1)
    length = inputs["input_ids"].shape[1]
    positions = torch.full((3, 1, 1), length)
    expected = model(input_ids=step, past_key_values=copy.deepcopy(outputs.past_key_values), position_ids=positions)
    decode = torch.compile(model.model.forward, fullgraph=True, backend="eager")
    compiled = decode(input_ids=step, past_key_values=outputs.past_key_values, position_ids=positions)
    torch.testing.assert_close(model.lm_head(compiled.last_hidden_state), expected.logits)


@BOTH
def test_encoder_runs_once_per_generate(audio_tokens, kinds, model):
    calls = []
    with model.model.audio_encoder.register_forward_hook(lambda _, args, __: calls.append(len(args[0]))):
        for more in ({}, {"use_cache": False}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
            calls.clear()
            greedy(model, kinds("two audios"), **more)
            assert calls == [3], more  # 0.7 s and 1.9 s are one and two windows, never repeated


@BOTH
@pytest.mark.parametrize("drafts", ["prompt lookup", "assistant model"])
def test_assisted_decoding(audio_tokens, drafts, kinds, model, repo):
    inputs = kinds("image, audio")
    if drafts == "prompt lookup":
        more = {"prompt_lookup_num_tokens": 3}
    else:  # an assistant without the audio would raise
        more = {"assistant_model": AutoModel.from_pretrained(repo, trust_remote_code=True)}
    assert torch.equal(greedy(model, inputs, steps=8, **more), greedy(model, inputs, steps=8))


@pytest.mark.bases
def test_drafts_from_the_prompt_have_no_placeholders(kinds, model):
    """Without a system message the tokens of the first item follow the first line break, from which drafts begin."""
    for kind in ("image, audio", "audio, image"):
        assert torch.equal(greedy(model, kinds(kind), prompt_lookup_num_tokens=3), greedy(model, kinds(kind)))


@pytest.mark.bases
def test_pictures_are_found_by_their_ids(kinds, fresh_model):
    """Not by their embeddings, which a word may share, and to which training may add noise."""
    inputs, embeddings = kinds("image, audio"), fresh_model.get_input_embeddings()
    word = inputs["input_ids"][0, -6]  # the last one of the question
    with torch.no_grad():
        embeddings.weight[word] = embeddings.weight[fresh_model.config.image_token_id]
        expected = fresh_model(**inputs).logits
        embeddings.register_forward_hook(lambda module, args, output: output + 1e-6)
        noisy = fresh_model(**inputs).logits
    assert_close(noisy, expected, atol=1e-2)


@BOTH
@pytest.mark.parametrize("more", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}])
def test_beams_keep_two_audios_in_order(audio_tokens, more, ask, model, sound):
    """Repeating windows one by one gives A, A, B, B where the rows need A, B, A, B."""
    rows = [
        [audio(sound(0.7, 1)), audio(sound(0.9, 2)), text("First?")],
        [audio(sound(1.5, 3)), text("Second, which has one audio of two windows?")],
    ]
    flags = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False}
    together = model.generate(**ask(*rows), max_new_tokens=4, min_new_tokens=4, **flags, **more)
    answers = together.sequences[:, -4:].chunk(2)
    for row, row_answers, scores in zip(rows, answers, together.sequences_scores.chunk(2), strict=True):
        for answer, score in zip(row_answers, scores, strict=True):
            # The score of a beam is the mean log-probability of its tokens, which one plain pass gives as well.
            inputs = ask(*row)
            added = {"input_ids": answer, "attention_mask": torch.ones(4), "mm_token_type_ids": torch.zeros(4)}
            for name, value in added.items():
                inputs[name] = torch.cat([inputs[name], value[None].to(inputs[name].dtype)], dim=1)
            log_probs = model(**inputs, logits_to_keep=5).logits[0, :-1].log_softmax(-1)
            assert_close(score, log_probs.gather(-1, answer[:, None]).mean(), atol=1e-5)


def test_missing_or_extra_audio_features_are_an_error(kinds, model):
    inputs = kinds("two audios")
    features = inputs.pop("input_features")
    assert_refused(model, "150 audio tokens, but 0 audio embeddings", **inputs)
    assert_refused(model, "150 audio tokens, but 100 audio embeddings", **inputs, input_features=features[:2])
    assert_refused(model, "0 audio tokens, but 150 audio embeddings", **kinds("text"), input_features=features)


def test_features_of_another_extractor_are_an_error(kinds, model):
    inputs = kinds("audio alone")
    for wrong in (inputs["input_features"][:, :80], inputs["input_features"][..., :99], inputs["input_features"][0]):
        with pytest.raises(ValueError, match=r"takes \(windows, 128 mel bins, 100 frames\)"):
            model.get_audio_features(wrong)


def test_second_turn_on_a_cache_without_positions(processor, model, sound, picture):
    """A new cache of the same tensors has no positions. They can be counted, unless it holds a picture."""
    for content in ([image(picture), audio(sound(1.3, 1))], [audio(sound(1.3, 1))]):
        _, _, whole, cache = two_turns(processor, model, content, [text("And?")])
        expected = step_logits(model, whole, past_key_values=copy.deepcopy(cache))
        del cache.mrope_positions
        if len(content) == 1:
            assert_close(step_logits(model, whole, past_key_values=cache), expected)
        else:
            with pytest.raises(ValueError, match="The cache holds images or videos, but not their positions"):
                greedy(model, whole, past_key_values=cache)


def test_assisted_decoding_starts_without_a_cache(processor, model, repo):
    _, _, whole, cache = two_turns(processor, model, [text("What?")], [text("And?")])
    for drafts in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model}):
        with pytest.raises(ValueError, match="Start it without a filled cache"):
            greedy(model, whole, past_key_values=cache, **drafts)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache(name, processor, model, sound):
    first, _, whole, cache = two_turns(processor, model, [audio(sound(1.3, 1))], [text("And?")])
    expected = step_logits(model, {**whole, **join(AUDIO, first)})
    assert_close(step_logits(model, whole, **{name: cache}), expected)


def test_second_turn_needs_its_own_media_alone(processor, model, sound, picture):
    first, second, whole, cache = two_turns(processor, model, [image(picture)], [image(picture.rotate(90))])
    with pytest.raises(ValueError, match="image_grid_thw and video_grid_thw|do not match"):
        greedy(model, {**whole, **join(VISION, first, second)}, past_key_values=cache)
    first, _, whole, cache = two_turns(processor, model, [audio(sound(1.3, 1))], [audio(sound(0.6, 2))])
    with pytest.raises(ValueError, match="50 audio tokens, but 0 audio embeddings"):
        greedy(model, whole, past_key_values=cache)
    with pytest.raises(ValueError, match="The cache holds"):
        greedy(model, first, past_key_values=cache)


def test_padding_is_counted_by_any_form_of_the_mask(ask, model, picture):
    """The second turn of a padded batch, by `forward` alone, with a mask of two axes and masks of four."""
    first, new_ids = ask([text("Yes."), image(picture)], [text("No, not this.")]), torch.tensor([[11, 12, 13]] * 2)
    mask = torch.cat([first["attention_mask"], torch.ones_like(new_ids)], dim=1)
    causal = torch.ones(3, mask.shape[1]).tril(mask.shape[1] - 3).bool() & mask[:, None, None].bool()
    results = []
    for form in (mask, causal, torch.where(causal, 0.0, torch.finfo(torch.float32).min)):
        cache = DynamicCache(config=model.config.get_text_config())
        model(**first, past_key_values=cache, use_cache=True, logits_to_keep=1)
        results.append(model(new_ids, attention_mask=form, past_key_values=cache, logits_to_keep=1).logits)
    for logits in results[1:]:  # test_dialogues.py compares the first with rows that have no padding
        assert_close(logits, results[0])


def test_decode_by_hand_after_another_call(kinds, model):
    """`rope_deltas` on the model would give this conversation the positions of the other one."""
    first, other = kinds("image, audio"), kinds("image")
    for disturb in (False, True):
        outputs = model(**first, use_cache=True, logits_to_keep=1)
        step = outputs.logits.argmax(-1)
        if disturb:
            model(**other, use_cache=True, logits_to_keep=1)
            model(**kinds("text"), use_cache=True, logits_to_keep=1)
        logits = model(input_ids=step, past_key_values=outputs.past_key_values).logits[0, -1]
        assert_close(logits, step_logits(model, first, steps=2)[1, 0])
    assert model.model.rope_deltas is None


def test_four_threads_at_once(kinds, model):
    names = ["image, audio", "text", "mixed batch", "video, audio"]
    inputs = {name: kinds(name) for name in names}
    alone = {name: greedy(model, inputs[name], steps=6) for name in names}
    with ThreadPoolExecutor(len(names)) as pool:
        results = list(pool.map(lambda name: greedy(model, inputs[name], steps=6), names * 3))
    for name, result in zip(names * 3, results, strict=True):
        assert torch.equal(result, alone[name]), name


@BOTH
def test_audio_with_inputs_embeds(audio_tokens, kinds, model):
    inputs = kinds("two audios")
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids).detach()
    expected = model(input_ids=ids, **inputs, logits_to_keep=2).logits
    assert torch.equal(model(inputs_embeds=embeds, **inputs, logits_to_keep=2).logits, expected)
    expected = greedy(model, {"input_ids": ids, **inputs})
    inputs = join(("attention_mask", *AUDIO), inputs)
    tokens = model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, expected)


@BOTH
def test_precomputed_audio_features(audio_tokens, kinds, model):
    inputs = kinds("mixed batch of two audios")
    features = {name: inputs.pop(name) for name in AUDIO if name in inputs}
    outputs = {"audio": model.get_audio_features(**features)}
    expected = model(**inputs, **features, logits_to_keep=1).logits
    assert torch.equal(model(**inputs, mm_encoder_outputs=outputs, logits_to_keep=1).logits, expected)
    for more in ({}, {"num_beams": 2}):
        expected = greedy(model, {**inputs, **features}, **more)
        assert torch.equal(greedy(model, inputs, mm_encoder_outputs=dict(outputs), **more), expected)
    with pytest.raises(ValueError, match="either input_features or mm_encoder_outputs"):
        model(**inputs, **features, mm_encoder_outputs=outputs)


@pytest.mark.parametrize("kind", ["image, audio", "interleaved", "mixed batch"])
def test_positions_count_audio_as_text(kind, kinds, model, parts):
    inputs, names = kinds(kind), ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw")
    inputs, types = {name: inputs.get(name) for name in names}, inputs["mm_token_type_ids"]
    positions, deltas = model.model.get_rope_index(**inputs, mm_token_type_ids=types)
    stock = parts.qwen.model.get_rope_index(**inputs, mm_token_type_ids=types.masked_fill(types == 3, 0))
    is_token = inputs["attention_mask"].bool()
    assert torch.equal(positions[:, is_token], stock[0][:, is_token]) and torch.equal(deltas, stock[1])


def test_bf16_model_with_float32_features(repo, kinds):
    model = AutoModel.from_pretrained(repo, trust_remote_code=True, dtype=torch.bfloat16)
    inputs = kinds("image, audio")
    assert inputs["input_features"].dtype == torch.float32
    assert greedy(model, inputs).shape == (1, 4)
    model.model.audio_projector.float()  # kept in full precision while it learns
    with torch.no_grad():
        assert model(**inputs, logits_to_keep=1).logits.dtype == torch.bfloat16


def test_frozen_encoder_costs_nothing_in_training(fresh_model, kinds):
    model, inputs = fresh_model.train(), kinds("image, audio")
    encoder, projector = model.model.audio_encoder, model.model.audio_projector
    assert model.model.language_model.training and not any(module.training for module in encoder.modules())
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] != 0, -100)
    recorded = []
    with encoder.register_forward_hook(lambda _, __, output: recorded.append(output.last_hidden_state)):
        model(**inputs, labels=labels).loss.backward()
    assert not recorded[0].requires_grad and recorded[0].grad_fn is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in encoder.parameters())
    assert projector.weight.grad.abs().sum() > 0

    encoder.requires_grad_(True)
    model.zero_grad()
    model.train()
    assert encoder.layers[0].training
    model(**inputs, labels=labels).loss.backward()
    assert encoder.conv1.weight.grad.abs().sum() > 0


def test_gradient_checkpointing(fresh_model, kinds):
    model, inputs = fresh_model.train(), kinds("audio")
    labels, grads = inputs["input_ids"], []
    for enable in (lambda: None, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        grads.append(model.model.audio_projector.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_backbone_alone(kinds, model, repo):
    backbone = type(model.model).from_pretrained(repo)
    assert not any(parameter.requires_grad for parameter in backbone.audio_encoder.parameters())
    inputs = kinds("image, audio")
    expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
    for each in (backbone, pickle.loads(pickle.dumps(backbone)), copy.deepcopy(backbone)):
        assert torch.equal(each(**inputs).last_hidden_state, expected)


def test_vllm_is_handed_the_backbone(repo, model_type):
    """vLLM asks `AutoModel` for a model with its own attention, to put its own head on it."""
    config = AutoConfig.from_pretrained(repo, trust_remote_code=True)
    assert type(AutoModel.from_config(config, trust_remote_code=True)).__name__.endswith("ForConditionalGeneration")
    AttentionInterface.register("vllm", AttentionInterface()["sdpa"])  # vLLM registers its own under this name
    config.text_config._attn_implementation = "vllm"
    with torch.device("meta"):
        assert (
            type(AutoModel.from_config(config, trust_remote_code=True)).__name__
            == f"{FAMILIES[model_type].prefix}Model"
        )
