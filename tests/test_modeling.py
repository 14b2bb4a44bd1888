"""The model, loaded from a built folder with the Auto classes, against the sum of its parts."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from helpers import TOKENS, SumOfParts, audio, image, text, video
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    DynamicCache,
    WhisperModel,
)


@pytest.fixture(scope="module")
def parts(shared_model, bases):
    return SumOfParts(shared_model, bases["whisper"])


@pytest.fixture
def frames(photo):
    picture = Image.open(photo).convert("RGB").resize((112, 84))
    return np.stack([np.roll(np.asarray(picture), shift, axis=1) for shift in range(4)])


@pytest.fixture
def thumbnail(photo):
    return Image.open(photo).convert("RGB").resize((112, 84))


@pytest.fixture
def kinds(ask, speech, thumbnail, frames, sound):
    """The kinds of input that a user has, by name."""
    clip, picture, film, words = audio(str(speech)), image(thumbnail), video(frames), text("What is this?")
    return {
        "text": lambda: ask(words),
        "audio": lambda: ask(clip, words),
        "image": lambda: ask(picture, words),
        "image, audio": lambda: ask(picture, clip, words),
        "audio, image": lambda: ask(clip, picture, words),
        "video, audio": lambda: ask(film, clip, words),
        "two audios": lambda: ask(audio(sound(0.7, 1)), audio(sound(1.9, 2)), words),
        "left padded": lambda: ask([audio(sound(2.5)), text("Say it again, slowly.")], [clip, text("Hm?")]),
        "mixed batch": lambda: ask([picture, words], [clip, picture, text("Why?")], [words]),
        "mixed batch of two audios": lambda: ask([audio(sound(1.2, 3)), picture, audio(sound(0.4, 4))], [words, clip]),
        "audio alone": lambda: ask(clip),
        "interleaved": lambda: ask(picture, audio(sound(0.7, 1)), film, audio(sound(1.1, 2)), picture, words),
    }


KINDS = [
    "text",
    "audio",
    "image",
    "image, audio",
    "audio, image",
    "video, audio",
    "two audios",
    "left padded",
    "mixed batch",
    "mixed batch of two audios",
    "audio alone",
    "interleaved",
]


def greedy(model, inputs, steps=4, **more):
    output = model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, **more)
    return output[:, inputs["input_ids"].shape[1] :]


def step_logits(model, inputs, steps=3, **more):
    """Logits `[steps, batch, vocabulary]` of greedy decoding: random weights often choose the same token anyway."""
    more = {"output_logits": True, "return_dict_in_generate": True, **more}
    output = model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, **more)
    return torch.stack(output.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_sum_of_parts(kind, kinds, model, parts):
    inputs = kinds[kind]()
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=4).logits
    torch.testing.assert_close(logits, parts.logits(inputs, last=4), atol=2e-4, rtol=0)
    assert torch.equal(greedy(model, inputs), parts.greedy(inputs, 4))


@pytest.mark.parametrize("kind", ["image, audio", "video, audio", "mixed batch"])
def test_token_types_are_found_where_they_are_not_given(kind, kinds, model):
    inputs = kinds[kind]()
    with torch.no_grad():
        expected = model(**inputs, logits_to_keep=2).logits
        assert torch.equal(model(**{**inputs, "mm_token_type_ids": None}, logits_to_keep=2).logits, expected)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_without_audio_equals_stock_to_the_bit(kind, kinds, model, parts):
    inputs = kinds[kind]()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, parts.qwen(**inputs).logits)
    assert torch.equal(greedy(model, inputs), greedy(parts.qwen, inputs))


def test_audio_features_are_encoder_then_projector(repo_30s, bases, speech):
    model = AutoModel.from_pretrained(repo_30s, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repo_30s, trust_remote_code=True)
    inputs = processor(audio=str(speech))
    with torch.no_grad():
        features = model.get_audio_features(inputs["input_features"])
        hidden = WhisperModel.from_pretrained(bases["whisper_30s"]).eval().encoder(inputs["input_features"])
        expected = model.model.audio_projector(hidden.last_hidden_state)
    assert features.pooler_output.shape == (1, 1500, 64)
    assert torch.equal(features.last_hidden_state, hidden.last_hidden_state)
    assert torch.equal(features.pooler_output, expected)


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


def test_batch_equals_its_rows(ask, model, sound, thumbnail):
    rows = [
        [audio(sound(2.2, 1)), audio(sound(0.5, 2)), text("One.")],
        [image(thumbnail), audio(sound(0.9, 3)), text("And two, which is longer.")],
        [text("Three.")],
    ]
    together = ask(*rows)
    with torch.no_grad():
        logits = model(**together, logits_to_keep=2).logits
        for row, row_logits in zip(rows, logits, strict=True):
            alone = ask(*row)
            torch.testing.assert_close(model(**alone, logits_to_keep=2).logits[0], row_logits, atol=2e-5, rtol=0)
    alone = torch.cat([greedy(model, ask(*row)) for row in rows])
    assert torch.equal(greedy(model, together), alone)


@pytest.mark.parametrize("kind", ["image, audio", "left padded", "mixed batch of two audios"])
def test_cache_changes_nothing(kind, kinds, model):
    inputs = kinds[kind]()
    assert torch.equal(greedy(model, inputs), greedy(model, inputs, use_cache=False))
    torch.testing.assert_close(
        step_logits(model, inputs), step_logits(model, inputs, use_cache=False), atol=2e-5, rtol=0
    )


def test_static_cache(kinds, model):
    inputs = kinds["mixed batch of two audios"]()
    static = step_logits(model, inputs, cache_implementation="static")
    torch.testing.assert_close(static, step_logits(model, inputs), atol=2e-5, rtol=0)


def test_decode_step_does_not_wait_for_the_device(kinds, model, parts):
    """Looking for audio in every decode step would copy a number to the host each time."""

    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    inputs, counts = kinds["text"](), []
    with torch.no_grad():
        for each in (model, parts.qwen):
            cache = each(**inputs, use_cache=True).past_key_values
            with Waits() as waits:
                each(input_ids=torch.tensor([[5]]), past_key_values=cache, position_ids=torch.full((3, 1, 1), 40))
            counts.append(waits.count)
    assert counts[0] == counts[1]


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.5 cannot trace transformers' own decorators")
def test_compiled_decode_step_is_one_graph(kinds, model):
    inputs = kinds["audio"]()
    with torch.no_grad():
        outputs = model(**inputs, use_cache=True, logits_to_keep=1)
        step = outputs.logits.argmax(-1)
        length = inputs["input_ids"].shape[1]
        positions = torch.full((3, 1, 1), length)
        expected = model(input_ids=step, past_key_values=copy.deepcopy(outputs.past_key_values), position_ids=positions)
        decode = torch.compile(model.model.forward, fullgraph=True, backend="eager")
        compiled = decode(input_ids=step, past_key_values=outputs.past_key_values, position_ids=positions)
    torch.testing.assert_close(model.lm_head(compiled.last_hidden_state), expected.logits)


def test_encoder_runs_once_per_generate(kinds, model):
    calls = []
    hook = model.model.audio_encoder.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    try:
        for more in ({}, {"use_cache": False}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
            calls.clear()
            greedy(model, kinds["two audios"](), **more)
            assert calls == [3], more  # 0.7 s and 1.9 s are one and two windows, never repeated
    finally:
        hook.remove()


@pytest.mark.parametrize("drafts", ["prompt lookup", "assistant model"])
def test_assisted_decoding(drafts, kinds, model, repo):
    inputs = kinds["image, audio"]()
    if drafts == "prompt lookup":
        more = {"prompt_lookup_num_tokens": 3}
    else:  # an assistant without the audio would raise
        more = {"assistant_model": AutoModel.from_pretrained(repo, trust_remote_code=True)}
    assert torch.equal(greedy(model, inputs, steps=8, **more), greedy(model, inputs, steps=8))


def test_chunked_prefill_uses_all_audio_or_raises(kinds, model):
    inputs = kinds["image, audio"]()
    try:
        chunked = step_logits(model, inputs, prefill_chunk_size=100)
    except ValueError as error:  # transformers before 5.23 cannot split what was encoded
        assert "audio embeddings were given" in str(error)
    else:
        torch.testing.assert_close(chunked, step_logits(model, inputs), atol=2e-5, rtol=0)


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}])
def test_beams_keep_two_audios_in_order(more, ask, model, sound):
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
            for name, value in (
                ("input_ids", answer),
                ("attention_mask", torch.ones(4)),
                ("mm_token_type_ids", torch.zeros(4)),
            ):
                inputs[name] = torch.cat([inputs[name], value[None].to(inputs[name].dtype)], dim=1)
            with torch.no_grad():
                log_probs = model(**inputs, logits_to_keep=5).logits[0, :-1].log_softmax(-1)
            expected = log_probs.gather(-1, answer[:, None]).mean()
            torch.testing.assert_close(score, expected, atol=1e-5, rtol=0)


def test_returned_sequences_see_their_own_audio(ask, model, sound):
    inputs = ask([audio(sound(0.7, 1)), audio(sound(0.9, 2))], [audio(sound(0.3, 3)), audio(sound(0.2, 4))])
    scores = {}
    for copies in (1, 2):
        output = model.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=True,
            num_return_sequences=copies,
            return_dict_in_generate=True,
            output_logits=True,
        )
        scores[copies] = output.logits[0]
    torch.testing.assert_close(scores[2], scores[1].repeat_interleave(2, dim=0), atol=1e-5, rtol=0)


def test_missing_or_extra_audio_features_are_an_error(kinds, model):
    inputs = kinds["two audios"]()
    features = inputs.pop("input_features")
    for call in (model, lambda **inputs: model.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(ValueError, match=r"150 audio tokens, but 0 audio embeddings"):
            call(**inputs)
        with pytest.raises(ValueError, match=r"150 audio tokens, but 100 audio embeddings"):
            call(**inputs, input_features=features[:2])
        with pytest.raises(ValueError, match=r"0 audio tokens, but 150 audio embeddings"):
            call(**kinds["text"](), input_features=features)


def test_features_of_another_extractor_are_an_error(kinds, model):
    inputs = kinds["audio alone"]()
    for wrong in (inputs["input_features"][:, :80], inputs["input_features"][..., :99], inputs["input_features"][0]):
        with pytest.raises(ValueError, match=r"takes \(windows, 128 mel bins, 100 frames\)"):
            model.get_audio_features(wrong)


AUDIO = ("input_features", "input_features_mask")


def joined(names, *inputs) -> dict[str, torch.Tensor]:
    """Those of the model inputs that are there, of several calls of the processor after each other."""
    return {name: torch.cat([each[name] for each in inputs]) for name in names if name in inputs[0]}


def conversation_in_two_turns(processor, first, second):
    """Model inputs of a first turn, and a function that gives those of both turns, after the model's answer."""
    kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    messages = [{"role": "user", "content": first}]
    inputs = processor.apply_chat_template(messages, **kwargs)

    def both(answer_ids):
        follow_up = [{"role": "user", "content": second}]
        turn = processor.apply_chat_template([{"role": "system", "content": ""}, *follow_up], **kwargs)
        start = turn["input_ids"][0].tolist().index(processor.tokenizer.convert_tokens_to_ids("<|im_end|>"))
        new_ids = torch.cat([answer_ids, turn["input_ids"][:, start:]], dim=1)
        new_types = torch.cat([torch.zeros_like(answer_ids), turn["mm_token_type_ids"][:, start:]], dim=1)
        ids = torch.cat([inputs["input_ids"], new_ids], dim=1)
        types = torch.cat([inputs["mm_token_type_ids"], new_types], dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}, turn

    return inputs, both


@pytest.mark.parametrize("features", ["whole conversation", "new turn"])
@pytest.mark.parametrize("interlude", [False, True])
@pytest.mark.parametrize("with_image", [False, True])
def test_second_turn_on_a_reused_cache(features, interlude, with_image, processor, model, sound, thumbnail, kinds):
    """New audio after a cached turn is encoded, and stands at the positions of its own conversation."""
    first = [audio(sound(1.3, 1)), text("What is this?")]
    first = [image(thumbnail), *first] if with_image else first
    inputs, both = conversation_in_two_turns(processor, first, [audio(sound(0.6, 2)), text("And this?")])
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    if interlude:
        greedy(model, kinds["text"]())  # a call without the image
    whole, turn = both(output.sequences[:, inputs["input_ids"].shape[1] :])
    all_audio, vision = joined(AUDIO, inputs, turn), joined(("pixel_values", "image_grid_thw"), inputs)
    expected = step_logits(model, {**whole, **vision, **all_audio})
    given = all_audio if features == "whole conversation" else joined(AUDIO, turn)
    continued = step_logits(model, {**whole, **given}, past_key_values=output.past_key_values)
    torch.testing.assert_close(continued, expected, atol=2e-5, rtol=0)


def test_second_turn_may_bring_an_image(processor, model, sound, thumbnail):
    inputs, both = conversation_in_two_turns(
        processor,
        [image(thumbnail), audio(sound(1.3, 1))],
        [audio(sound(0.6, 2)), image(thumbnail.rotate(90)), text("?")],
    )
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    whole, turn = both(output.sequences[:, inputs["input_ids"].shape[1] :])
    names = ("pixel_values", "image_grid_thw", *AUDIO)
    expected = step_logits(model, {**whole, **joined(names, inputs, turn)})
    continued = step_logits(model, {**whole, **joined(names, turn)}, past_key_values=output.past_key_values)
    torch.testing.assert_close(continued, expected, atol=2e-5, rtol=0)


def test_second_turn_on_a_cache_without_positions(processor, model, sound, thumbnail):
    """Positions are kept on the cache; a new cache of the same tensors has none, and after a picture they matter."""
    for first, is_known in (([image(thumbnail), audio(sound(1.3, 1))], False), ([audio(sound(1.3, 1))], True)):
        inputs, both = conversation_in_two_turns(processor, first, [text("And?")])
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        whole, _ = both(output.sequences[:, inputs["input_ids"].shape[1] :])
        expected = step_logits(model, whole, past_key_values=copy.deepcopy(output.past_key_values))
        bare = copy.deepcopy(output.past_key_values)
        del bare.mrope_positions
        if is_known:
            torch.testing.assert_close(step_logits(model, whole, past_key_values=bare), expected, atol=2e-5, rtol=0)
        else:
            with pytest.raises(ValueError, match="The cache holds images or videos, but not their positions"):
                greedy(model, whole, past_key_values=bare)


def test_assisted_decoding_starts_without_a_cache(processor, model, repo):
    inputs, both = conversation_in_two_turns(processor, [text("What?")], [text("And?")])
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    whole, _ = both(output.sequences[:, inputs["input_ids"].shape[1] :])
    for drafts in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model}):
        with pytest.raises(ValueError, match="Assisted decoding must start without a filled cache"):
            greedy(model, whole, past_key_values=output.past_key_values, **drafts)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache(name, processor, model, sound):
    inputs, both = conversation_in_two_turns(processor, [audio(sound(1.3, 1))], [text("And?")])
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    whole, _ = both(output.sequences[:, inputs["input_ids"].shape[1] :])
    expected = step_logits(model, {**whole, **joined(AUDIO, inputs)})
    continued = step_logits(model, whole, **{name: output.past_key_values})
    torch.testing.assert_close(continued, expected, atol=2e-5, rtol=0)


def test_pictures_of_the_first_turn_given_again(processor, model, thumbnail):
    inputs, both = conversation_in_two_turns(processor, [image(thumbnail)], [image(thumbnail.rotate(90))])
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    whole, turn = both(output.sequences[:, inputs["input_ids"].shape[1] :])
    given = joined(("pixel_values", "image_grid_thw"), inputs, turn)
    with pytest.raises(ValueError, match="image_grid_thw and video_grid_thw|do not match"):
        greedy(model, {**whole, **given}, past_key_values=output.past_key_values)


def test_padding_is_counted_by_any_form_of_the_mask(ask, model, thumbnail):
    """The second turn of a padded batch, by `forward` alone, with masks of two axes and of four."""
    first = ask([text("Yes."), image(thumbnail)], [text("No, not this.")])
    rows = [ask(text("Yes."), image(thumbnail)), ask(text("No, not this."))]
    ids = model.get_input_embeddings().weight.new_tensor([11, 12, 13]).long()
    length = first["input_ids"].shape[1]
    words = ids[None].expand(2, -1)
    expected = []
    for row in rows:
        whole = torch.cat([row["input_ids"], ids[None]], dim=1)
        types = torch.cat([row["mm_token_type_ids"], torch.zeros(1, 3, dtype=torch.long)], dim=1)
        with torch.no_grad():
            vision = joined(("pixel_values", "image_grid_thw"), row)
            expected.append(model(input_ids=whole, mm_token_type_ids=types, **vision, logits_to_keep=1).logits[0, -1])
    mask = torch.cat([first["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    causal = torch.ones(length + 3, length + 3).tril().bool()[None, None, -3:] & mask[:, None, None, :].bool()
    for form in (mask, causal, torch.where(causal, 0.0, torch.finfo(torch.float32).min)):
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(**first, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = model(input_ids=words, attention_mask=form, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        torch.testing.assert_close(logits, torch.stack(expected), atol=2e-5, rtol=0)


def test_second_turn_needs_its_audio(processor, model, sound):
    inputs, both = conversation_in_two_turns(processor, [audio(sound(1.3, 1))], [audio(sound(0.6, 2))])
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    whole, _ = both(output.sequences[:, inputs["input_ids"].shape[1] :])
    with pytest.raises(ValueError, match="50 audio tokens, but 0 audio embeddings"):
        greedy(model, whole, past_key_values=output.past_key_values)
    with pytest.raises(ValueError, match="The cache holds"):
        greedy(model, inputs, past_key_values=output.past_key_values)


def test_decode_by_hand_after_another_call(kinds, model):
    """`rope_deltas` on the model would give this conversation the positions of the other one."""
    first, other = kinds["image, audio"](), kinds["image"]()
    with torch.no_grad():
        for disturb in (False, True):
            outputs = model(**first, use_cache=True, logits_to_keep=1)
            step = outputs.logits.argmax(-1)
            if disturb:
                model(**other, use_cache=True, logits_to_keep=1)
                model(**kinds["text"](), use_cache=True, logits_to_keep=1)
            logits = model(input_ids=step, past_key_values=outputs.past_key_values).logits[0, -1]
            torch.testing.assert_close(logits, step_logits(model, first, steps=2)[1, 0], atol=2e-5, rtol=0)


def test_embeddings_after_an_image_call(kinds, model):
    """Stale `rope_deltas` would shift a prompt that is given as embeddings."""
    inputs = kinds["text"]()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with torch.no_grad():
        expected = model(inputs_embeds=embeds).logits
        model(**kinds["image"]())
        assert torch.equal(model(inputs_embeds=embeds).logits, expected)
    assert model.model.rope_deltas is None


def test_two_threads_at_once(kinds, model):
    names = ["image, audio", "text", "mixed batch", "video, audio"]
    alone = {name: greedy(model, kinds[name](), steps=6) for name in names}
    inputs = {name: kinds[name]() for name in names}
    results, barrier = {name: [] for name in names}, threading.Barrier(len(names))

    def run(name):
        barrier.wait()
        for _ in range(3):
            results[name].append(greedy(model, inputs[name], steps=6))

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert len(results[name]) == 3
        assert all(torch.equal(result, alone[name]) for result in results[name]), name


def test_audio_with_inputs_embeds(kinds, model):
    inputs = kinds["two audios"]()
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        expected = model(input_ids=ids, **inputs, logits_to_keep=2).logits
        assert torch.equal(model(inputs_embeds=embeds, **inputs, logits_to_keep=2).logits, expected)
    expected = greedy(model, {"input_ids": ids, **inputs})
    tokens = model.generate(
        inputs_embeds=embeds,
        attention_mask=inputs["attention_mask"],
        **joined(AUDIO, inputs),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
    )
    assert torch.equal(tokens, expected)


def test_precomputed_audio_features(kinds, model):
    inputs = kinds["mixed batch of two audios"]()
    features = {name: inputs.pop(name) for name in AUDIO if name in inputs}
    with torch.no_grad():
        outputs = {"audio": model.get_audio_features(**features)}
        expected = model(**inputs, **features, logits_to_keep=1).logits
        assert torch.equal(model(**inputs, mm_encoder_outputs=outputs, logits_to_keep=1).logits, expected)
    for more in ({}, {"num_beams": 2}):
        expected = greedy(model, {**inputs, **features}, **more)
        assert torch.equal(greedy(model, inputs, mm_encoder_outputs=dict(outputs), **more), expected)
    with pytest.raises(ValueError, match="either input_features or mm_encoder_outputs"):
        model(**inputs, **features, mm_encoder_outputs=outputs)


def test_positions_count_audio_as_text(kinds, model):
    inputs = kinds["image, audio"]()
    ids = inputs["input_ids"][0].tolist()
    positions, deltas = model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    start = ids.index(model.config.audio_token_id)
    last_of_image = len(ids) - 1 - ids[::-1].index(model.config.image_token_id)
    after_image = positions[:, 0, : last_of_image + 1].max() + 1
    assert positions[:, 0, start].tolist() == [after_image + (start - last_of_image - 1)] * 3
    assert torch.equal(
        positions[:, 0, start : start + TOKENS], (positions[0, 0, start] + torch.arange(TOKENS)).expand(3, -1)
    )
    assert int(deltas) == int(positions.max()) + 1 - len(ids)


def test_bf16_model_with_float32_features(repo, kinds):
    model = AutoModel.from_pretrained(repo, trust_remote_code=True, dtype=torch.bfloat16)
    inputs = kinds["image, audio"]()
    assert inputs["input_features"].dtype == torch.float32
    assert greedy(model, inputs).shape == (1, 4)
    model.model.audio_projector.float()  # kept in full precision while it learns
    with torch.no_grad():
        assert model(**inputs, logits_to_keep=1).logits.dtype == torch.bfloat16


def test_parts_offloaded_by_accelerate(repo, kinds, model, tmp_path):
    inputs = kinds["image, audio"]()
    device_map = {
        "model.visual": "cpu",
        "model.language_model": "cpu",
        "lm_head": "cpu",
        "model.audio_projector": "disk",
    }
    device_map["model.audio_encoder"] = "disk"
    spread = AutoModel.from_pretrained(repo, trust_remote_code=True, device_map=device_map, offload_folder=tmp_path)
    assert spread.model.audio_projector.weight.is_meta
    assert torch.equal(greedy(spread, inputs), greedy(model, inputs))


def test_frozen_encoder_costs_nothing_in_training(fresh_model, kinds):
    model, inputs = fresh_model.train(), kinds["image, audio"]()
    encoder, projector = model.model.audio_encoder, model.model.audio_projector
    assert model.model.language_model.training and not any(module.training for module in encoder.modules())
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] != 0, -100)
    recorded = []
    hook = encoder.register_forward_hook(lambda _, __, output: recorded.append(output.last_hidden_state))
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    hook.remove()
    assert not recorded[0].requires_grad and recorded[0].grad_fn is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in encoder.parameters())
    assert projector.weight.grad.abs().sum() > 0

    encoder.requires_grad_(True)
    model.zero_grad()
    model.train()
    assert encoder.layers[0].training
    model(**inputs, labels=labels).loss.backward()
    assert encoder.conv1.weight.grad.abs().sum() > 0


def test_training_moves_only_what_learns(fresh_model, kinds):
    model, inputs = fresh_model.train(), kinds["audio"]()
    model.requires_grad_(False)
    model.model.audio_projector.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] == 3, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["model.audio_projector.weight"]


def test_gradient_checkpointing(fresh_model, kinds):
    model, inputs = fresh_model.train(), kinds["audio"]()
    labels, grads = inputs["input_ids"], []
    for enable in (lambda: None, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        grads.append(model.model.audio_projector.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_fine_tuned_model_reloads_with_the_auto_classes(fresh_model, processor, kinds, tmp_path):
    torch.nn.init.normal_(fresh_model.model.audio_projector.weight)
    inputs = kinds["image, audio"]()
    expected = greedy(fresh_model, inputs)
    fresh_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(reloaded.model.audio_projector.weight, fresh_model.model.audio_projector.weight)
    assert not any(parameter.requires_grad for parameter in reloaded.model.audio_encoder.parameters())
    assert torch.equal(greedy(reloaded, inputs), expected)


def test_backbone_alone(kinds, model, repo):
    backbone = type(model.model).from_pretrained(repo)
    assert not any(parameter.requires_grad for parameter in backbone.audio_encoder.parameters())
    inputs = kinds["image, audio"]()
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
        for each in (backbone, pickle.loads(pickle.dumps(backbone)), copy.deepcopy(backbone)):
            assert torch.equal(each(**inputs).last_hidden_state, expected)


def test_cache_made_by_the_caller(kinds, model):
    inputs = kinds["image, audio"]()
    cache = DynamicCache(config=model.config.get_text_config())
    assert torch.equal(greedy(model, inputs, past_key_values=cache), greedy(model, inputs))


def test_return_tuple(kinds, model):
    inputs = kinds["audio alone"]()
    with torch.no_grad():
        assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)
        features = model.get_audio_features(inputs["input_features"], return_dict=False)
    assert isinstance(features, tuple) and features[1].shape == (11, TOKENS, 64)


def test_vllm_is_handed_the_backbone(repo):
    """vLLM asks `AutoModel` for a model with its own attention, to put its own head on it."""
    config = AutoConfig.from_pretrained(repo, trust_remote_code=True)
    assert type(AutoModel.from_config(config, trust_remote_code=True)).__name__.endswith("ForConditionalGeneration")
    AttentionInterface.register("vllm", AttentionInterface()["sdpa"])  # vLLM registers its own under this name
    config.text_config._attn_implementation = "vllm"
    with torch.device("meta"):
        assert type(AutoModel.from_config(config, trust_remote_code=True)).__name__ == "Qwen2AudioVLModel"
