"""make test ONLY=tests/test_processing.py: messages -> model inputs, with the processor of a built folder."""

import base64
import copy
import functools
import itertools
import json
import shutil

import numpy as np
import pytest
import qwen_vl_utils
import torch
import torchvision
from helpers import CHAT, TOKENS, audio, image, text, video
from PIL import Image
from serving import serve_by_path
from sounds import encode
from transformers import CONFIG_MAPPING, AutoProcessor, AutoTokenizer, WhisperFeatureExtractor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.video_utils import VideoMetadata

from audio_utils import AudioError, process_audio_info
from collator import ChatCollator
from configuration_qwen2_audio_vl import ASSISTANT, FAMILIES
from demo.bases import ASSETS


PAD, BOS, EOS = "<|audio_pad|>", "<|audio_bos|>", "<|audio_eos|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"


SYSTEM = f"<|im_start|>system\n{ASSISTANT}<|im_end|>\n"


@pytest.fixture
def system(model_type) -> str:
    """What the template puts before a conversation that has no system message."""
    return SYSTEM if FAMILIES[model_type].system else ""


@pytest.fixture(scope="session")
def processor_30s(repo_30s):
    return AutoProcessor.from_pretrained(repo_30s, trust_remote_code=True)


@pytest.fixture
def render(processor):
    """`render(messages, ...)` or `render([item, ...], ...)`, which are a user's: model inputs as tensors."""

    def make(messages, **settings):
        messages = messages if "role" in messages[0] else [{"role": "user", "content": messages}]
        return processor.apply_chat_template(messages, **CHAT, **settings)

    return make


@pytest.fixture
def runs(processor):
    """`runs(ids)`: tokens with their run lengths, of audio and vision only."""

    def find(ids) -> list[tuple[str, int]]:
        tokens = processor.tokenizer.convert_ids_to_tokens(np.asarray(ids).tolist())
        tokens = [token for token in tokens if token in (PAD, BOS, EOS, IMAGE, VIDEO)]
        return [(token, len(list(run))) for token, run in itertools.groupby(tokens)]

    return find


def clip_runs(windows: int = 1) -> list[tuple[str, int]]:
    return [(BOS, 1), (PAD, windows * TOKENS), (EOS, 1)]


def test_one_window_of_whisper_is_1500_tokens(processor_30s, speech):
    inputs = processor_30s(text="<|audio_pad|>What is said?", audio=str(speech), return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    tokens = processor_30s.tokenizer.convert_ids_to_tokens(ids[:1502])
    assert tokens[0] == BOS and tokens[1:1501] == [PAD] * 1500 and tokens[1501] == EOS
    assert processor_30s.tokenizer.decode(ids[1502:]) == "What is said?"
    assert inputs["mm_token_type_ids"][0].tolist() == [0] + [3] * 1500 + [0] * (len(ids) - 1501)


@pytest.mark.parametrize(
    "samples, windows", [(1, 1), (479_999, 1), (480_000, 1), (480_001, 2), (560_000, 2), (960_000, 2), (960_001, 3)]
)
def test_long_clips_become_windows_in_one_pair_of_markers(samples, windows, processor_30s, runs):
    clip = np.linspace(-0.5, 0.5, samples, dtype=np.float32)
    inputs = processor_30s(text="<|audio_pad|>", audio=clip, return_tensors="pt")
    assert runs(inputs["input_ids"][0]) == [(BOS, 1), (PAD, windows * 1500), (EOS, 1)]
    assert inputs["input_features"].shape == (windows, 128, 3000)
    extractor = WhisperFeatureExtractor(feature_size=128)
    pieces = [clip[start : start + 480_000] for start in range(0, samples, 480_000)]
    expected = extractor(pieces, sampling_rate=16000, return_tensors="pt")["input_features"]
    torch.testing.assert_close(inputs["input_features"], expected, atol=1e-5, rtol=0)


def test_prompt_longer_than_the_model_is_an_error(processor_30s):
    with pytest.raises(ValueError, match=r"33000 tokens of text and audio, but the model has 32768 positions"):
        processor_30s(text="<|audio_pad|>", audio=np.zeros(22 * 480_000, np.float32))
    eleven = np.zeros(11 * 480_000, np.float32)
    with pytest.raises(ValueError, match=r"33005 tokens of text and audio, but the model has 32768 positions"):
        processor_30s(text="<|audio_pad|><|audio_pad|>!", audio=[eleven, eleven])


@pytest.mark.parametrize("before", ["", "<|audio_bos|>"])
@pytest.mark.parametrize("after", ["", "<|audio_eos|>"])
def test_markers_are_not_doubled(before, after, processor, sound, runs):
    written = f"{before}<|audio_pad|>{after}"
    ids = processor(text=f"a{written}b", audio=sound(0.5))["input_ids"][0]
    assert runs(ids) == clip_runs() and processor.decode(ids, skip_special_tokens=True) == "ab"
    twice = processor(text=written * 2, audio=[sound(0.5), sound(1.5)])["input_ids"][0]
    assert runs(twice) == clip_runs() + clip_runs(2)


def test_reading_order(processor, ask, photo, sound, runs):
    picture = Image.open(photo).resize((56, 56))
    frames = np.zeros((4, 56, 56, 3), np.uint8)
    inputs = ask(image(picture), audio(sound(1.5, 1)), video(frames), audio(sound(0.5, 2)), image(picture), text("?"))
    assert runs(inputs["input_ids"][0]) == [(IMAGE, 4), *clip_runs(2), (VIDEO, 8), *clip_runs(), (IMAGE, 4)]
    for token_type, token in ((1, IMAGE), (2, VIDEO), (3, PAD)):
        token = processor.tokenizer.convert_tokens_to_ids(token)
        assert torch.equal(inputs["mm_token_type_ids"] == token_type, inputs["input_ids"] == token)


def test_batch_is_left_padded_and_windows_follow_reading_order(ask, processor, sound):
    rows = [[audio(sound(0.5, 1)), text("Hm?")], [text("No sound here.")], [audio(sound(1.5, 2)), audio(sound(0.5, 3))]]
    inputs = ask(*rows)
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1, 1] and inputs["attention_mask"][1, 0] == 0
    alone = [ask(*row) for row in rows]
    for ids, mask, own in zip(inputs["input_ids"], inputs["attention_mask"], alone, strict=True):
        assert torch.equal(ids[mask.bool()], own["input_ids"][0])
    features = [own["input_features"] for own in alone if "input_features" in own]
    assert torch.equal(inputs["input_features"], torch.cat(features))


def test_audio_flat_or_one_list_per_text(processor, sound):
    clips = [sound(0.5, seed) for seed in range(3)]
    texts = ["<|audio_pad|> and <|audio_pad|>", "", "<|audio_pad|>"]
    rows = [clips[:2], [], clips[2:]]
    before = copy.deepcopy((texts, rows))
    flat = processor(text=texts, audio=clips, padding=True, return_tensors="pt")
    nested = processor(text=texts, audio=rows, padding=True, return_tensors="pt")
    assert all(torch.equal(flat[name], nested[name]) for name in flat)
    np.testing.assert_equal((texts, rows), before)


@pytest.mark.parametrize(
    "texts, clips, message",
    [
        (["<|audio_pad|>"], ["x.wav"] * 2, r"the prompts have \[1\] .* `audio` has 2\."),
        (["<|audio_pad|><|audio_pad|>"], ["x.wav"], r"the prompts have \[2\] .* `audio` has 1\."),
        (["<|audio_pad|>"] * 2, [["x.wav"] * 2, []], r"the prompts have \[1, 1\] .* `audio` has \[2, 0\]\."),
        (["none"], ["x.wav"], r"the prompts have \[0\] .* `audio` has 1\."),
        (["<|audio_pad|>"], None, r"the prompts have \[1\] .* `audio` has 0\."),
    ],
)
def test_counts_must_agree(texts, clips, message, processor):
    """They are compared before a clip is opened."""
    with pytest.raises(ValueError, match=message):
        processor(text=texts, audio=clips)


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_never_cuts_a_clip(side, processor, sound, monkeypatch, runs):
    monkeypatch.setattr(processor.tokenizer, "truncation_side", side)
    clip, words = sound(0.5), {"left": "one two three<|audio_pad|>", "right": "<|audio_pad|>one two three"}[side]
    for max_length in (20, 50, 51):  # the clip takes 52 tokens, two of which are its markers
        with pytest.raises(ValueError, match="max_length"):
            processor(text=words, audio=clip, truncation=True, max_length=max_length)
    ids = processor(text=words, audio=clip, truncation=True, max_length=53)["input_ids"][0]
    assert len(ids) == 53 and runs(ids) == clip_runs()


def test_text_arguments_stay_with_the_text(processor, sound):
    """`padding` and `max_length` must not reach the feature extractor, where they would change the number of frames."""
    plain = processor(text="<|audio_pad|>", audio=sound(0.5))
    for arguments in (
        {"padding": "max_length", "max_length": 80},
        {"padding": True, "truncation": True, "max_length": 700},
        {"text_kwargs": {"padding": "max_length", "max_length": 80}},
        {"padding": "longest", "pad_to_multiple_of": 16, "return_attention_mask": True},
    ):
        inputs = processor(text="<|audio_pad|>", audio=sound(0.5), **arguments)
        assert torch.equal(inputs["input_features"], plain["input_features"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"audios": []}, "unexpected keyword argument 'audios'; did you mean 'audio'"),
        ({"samplingrate": 8000}, "did you mean 'sampling_rate'"),
        ({"audio_kwargs": {"padding": True}}, "'padding'"),
        ({"images_kwargs": {"max_pixel": 5}}, "'max_pixel'"),
        ({"raw_speech": []}, "'raw_speech'"),
    ],
)
def test_misspelt_arguments_are_errors(arguments, message, processor, render, sound):
    with pytest.raises(TypeError, match=message):
        processor(text="<|audio_pad|>", audio=sound(0.5), **arguments)
    with pytest.raises(TypeError, match=message):
        render([audio(sound(0.5))], processor_kwargs=arguments)


def test_sampling_rate_is_honoured_everywhere(processor, render, sound):
    """8 kHz samples that are read as 16 kHz are half as long (seen in the wild)."""
    clip = sound(1.6)[::2].copy()  # 0.8 s of samples at 16 kHz, 1.6 s at 8 kHz
    row = {"array": clip, "sampling_rate": 8000}
    ways = [
        processor(text="<|audio_pad|>", audio=clip, sampling_rate=8000),
        processor(text="<|audio_pad|>", audio=clip, audio_kwargs={"sampling_rate": 8000}),
        processor(text="<|audio_pad|>", audio=[(clip, 8000)]),
        processor(text="<|audio_pad|>", audio=row, sampling_rate=44100),
        render([audio(clip, sampling_rate=8000)]),
        render([audio(row, sampling_rate=44100)]),
        render([audio(clip)], processor_kwargs={"sampling_rate": 8000}),
        render([audio(clip)], sampling_rate=8000),
    ]
    for inputs in ways:
        assert inputs["input_features"].shape[0] == 2
        torch.testing.assert_close(inputs["input_features"], ways[0]["input_features"])
    assert processor(text="<|audio_pad|>", audio=clip)["input_features"].shape[0] == 1


def test_limits_reach_fetch_audio(processor, render, speech):
    for limits in ({"max_seconds": 5}, {"audio_kwargs": {"max_seconds": 5}}):
        with pytest.raises(ValueError, match="limit of 5 s"):
            processor(text="<|audio_pad|>", audio=str(speech), **limits)
        with pytest.raises(ValueError, match="limit of 5 s"):
            render([audio(str(speech))], processor_kwargs=limits)
    with pytest.raises(ValueError, match="local files are not opened here"):
        render([audio(str(speech))], processor_kwargs={"audio_kwargs": {"public_only": True}})


def test_sound_stays_on_the_device_asked_for(processor, render, runs):
    """Tensors on the meta device hold no data, so any copy to the host raises an error."""
    clip = str(ASSETS / "audio" / "english.wav")  # 44.1 kHz, resampled there
    content = [audio(clip), audio(clip), text("?")]
    for inputs in (
        processor(text="<|audio_pad|><|audio_pad|>?", audio=[clip, clip], device="meta", return_tensors="pt"),
        render(content, device="meta"),
        render(content, processor_kwargs={"audio_kwargs": {"device": "meta"}}),
    ):
        assert inputs["input_features"].device.type == "meta" and inputs["input_features"].shape == (6, 128, 100)
        assert runs(inputs["input_ids"][0]) == 2 * clip_runs(3)


def test_apply_chat_template_takes_sound_from_anywhere(processor, render, runs):
    path = ASSETS / "audio" / "english.wav"  # 44.1 kHz
    encoded = base64.b64encode(path.read_bytes()).decode()
    with serve_by_path() as address:
        url = f"{address}english.wav"
        items = [
            {"type": "audio", "audio": str(path)},
            {"type": "audio", "path": str(path)},
            {"type": "audio", "url": url},
            {"type": "audio", "audio_url": url},
            {"type": "audio_url", "audio_url": {"url": url}},
            {"type": "audio_url", "audio_url": url},
            {"type": "audio", "bytes": path.read_bytes()},
            {"type": "audio", "base64": encoded},
            {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
            {"type": None, "text": None, "audio": str(path)},
        ]
        messages = [{"role": "user", "content": [*items, text("?")]}]
        before = copy.deepcopy(messages)
        inputs = render(messages)
    assert messages == before
    assert runs(inputs["input_ids"][0]) == clip_runs(3) * len(items)
    expected = processor(audio=str(path))["input_features"]
    assert expected.shape == (3, 128, 100)  # 2.74 s
    for features in inputs["input_features"].split(3):
        assert torch.equal(features, expected)


def test_messages_with_pictures_in_any_form(render, photo, sound):
    encoded = f"data:image/png;base64,{base64.b64encode(photo.read_bytes()).decode()}"
    first, *others = (
        render([picture, audio(sound(0.5))])
        for picture in (
            image(Image.open(photo)),
            {"type": "image", "path": str(photo), "url": None},
            {"image": str(photo)},
            {"type": "image_url", "image_url": {"url": encoded}},
            {"type": "image", "image_url": encoded},
        )
    )
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize(
    "item, message",
    [
        ({"type": "sound", "sound": "x.wav"}, r"type 'sound' and keys \['type', 'sound'\] is not supported: expected"),
        ({"speech": "x.wav"}, r"type None and keys \['speech'\]"),
        ("just words", "Python type str"),
        ({"type": "text", "content": "words"}, "needs a string under 'text'"),
        ({"type": "text", "text": "words", "audio": "x.wav"}, "has audio as well"),
        ({"type": "image", "image": "x.png", "audio_url": "x.wav"}, "has audio_url as well"),
        ({"type": "audio", "file": "x.wav"}, r"the prompts have \[1\] .* `audio` has 0\."),
        ({"type": "audio", "path": "x", "url": "y"}, r'^messages.0.."content"..0.: .*exactly one.*has url, path'),
        ({"type": "image", "path": "x", "url": "y"}, r'^messages.0.."content"..0.: .*exactly one.*has url, path'),
        ({"type": "image_url", "image_url": {"detail": "low"}}, "exactly one source"),
    ],
)
def test_content_that_cannot_be_taken_is_an_error(item, message, render):
    with pytest.raises(ValueError, match=message):
        render([{"role": "user", "content": [item]}])


def test_template_alone_drops_nothing(processor, system, sound):
    """What other servers render without our code: one placeholder per item, in order, and errors in words, where
    Qwen2-VL's own template drops audio silently."""
    tokenizer = processor.tokenizer
    render = functools.partial(tokenizer.apply_chat_template, chat_template=processor.chat_template, tokenize=False)
    content = [{"type": "image"}, {"type": "input_audio"}, {"type": "video_url"}, {"type": "audio_url"}, text("Hm?")]
    expected = (
        f"{system}<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|><|audio_pad|><|vision_start|><|video_pad|><|vision_end|>"
        "<|audio_pad|>Hm?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render([{"role": "user", "content": content}], add_generation_prompt=True) == expected
    with pytest.raises(Exception, match="Content of type sound is not supported"):
        render([{"role": "user", "content": [{"type": "sound"}]}])
    with pytest.raises(Exception, match="calls no tools"):
        render([{"role": "user", "content": "Hi"}], tools=[{"type": "function", "function": {"name": "f"}}])
    numbered = render([{"role": "user", "content": content}], add_vision_id=True, add_audio_id=True)
    assert "Picture 1: <|vision_start|>" in numbered and "Audio 2: <|audio_pad|>" in numbered


@pytest.mark.parametrize("first", [[], [{"role": "system", "content": "Be brief."}]])
def test_template_equals_the_base_without_audio(first, processor, base_type):
    published = "qwen3-vl-4b" if base_type == "qwen3_vl" else "qwen2-vl-7b"  # Qwen2.5-VL has Qwen2-VL's, and of tools
    published = json.loads((ASSETS / published / "chat_template.json").read_text())["chat_template"]
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "qwen2-vl-7b")
    messages = [
        *first,
        {"role": "user", "content": [{"type": "image"}, text("What\nis this? "), {"type": "video"}]},
        {"role": "assistant", "content": "A cat.\n"},
        {"role": "user", "content": "  Sure?"},
    ]
    for options in ({}, {"add_generation_prompt": True}, {"add_vision_id": True}):
        ours = processor.apply_chat_template(messages, **options)
        assert ours == tokenizer.apply_chat_template(messages, chat_template=published, tokenize=False, **options)


def test_without_audio_equals_the_processor_of_the_base(processor, base_type, photo):
    stock_class = PROCESSOR_MAPPING[CONFIG_MAPPING[base_type]]
    stock = stock_class(processor.image_processor, processor.tokenizer, processor.video_processor)
    frames = np.stack([np.asarray(Image.open(photo).resize((84, 56)))] * 6)
    film = {"videos": [frames], "video_metadata": [VideoMetadata(6, fps=2.0, frames_indices=list(range(6)))]}
    arguments = {"text": "<|vision_start|><|image_pad|><|vision_end|>What?<|vision_start|><|video_pad|><|vision_end|>"}
    arguments |= {"images": Image.open(photo), "return_tensors": "pt", **film}
    ours, theirs = processor(**arguments), stock(**arguments)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name]))


@pytest.mark.parametrize("sampling", [{}, {"fps": 2, "do_sample_frames": True}])
def test_sound_track_of_a_video(sampling, processor, render, sound, tmp_path, runs):
    """Frames and sound of one file, without torchcodec or where it finds no FFmpeg (as here)."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode(sound(1.9), "aac.m4a", video=True))
    samples = sampling or processor.video_processor.do_sample_frames  # as Qwen3-VL does by itself, and others do not
    film, grid = {"type": "video", "path": str(path)}, 2 if samples else 8  # in time, two frames each: 4, or 16 frames
    for slot in ([], [{"type": "audio"}]):
        messages = [{"role": "user", "content": [film, *slot, text("?")]}]
        assert "<|vision_end|><|audio_pad|>?" in processor.apply_chat_template(messages, load_audio_from_video=True)
        inputs = render(messages, load_audio_from_video=True, processor_kwargs=sampling)
        assert runs(inputs["input_ids"][0]) == [(VIDEO, 4 * grid), *clip_runs(2)]
        assert inputs["video_grid_thw"].tolist() == [[grid, 4, 4]]
        brightness = inputs["pixel_values_videos"].reshape(grid, -1).mean(dim=1)
        assert bool((brightness.diff() > 0).all())  # as the frames were written
        direct = processor(text="<|audio_pad|>", audio=str(path), return_tensors="pt")
        assert torch.equal(inputs["input_features"], direct["input_features"])
    assert "input_features" not in render([film, text("?")])


def test_videos_that_cannot_be_read(processor, render, sound, tmp_path):
    path = tmp_path / "clip.webm"
    path.write_bytes(encode(sound(1), "opus.webm", video=True))
    if not hasattr(torchvision.io, "read_video"):  # before 0.26 it reads this
        with pytest.raises(ValueError, match="does not say how many frames it has"):
            processor(text="<|video_pad|>", videos=[str(path)], return_tensors="pt")
    with pytest.raises(ValueError, match="could be .channels, samples.|is not audio"):
        render([video(np.zeros((4, 56, 56, 3), np.uint8))], load_audio_from_video=True)


def test_sounds_and_pictures_of_messages_beside_qwen_vl_utils(processor, render, photo, sound, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode(sound(0.9), "aac.m4a", video=True))
    messages = [
        {"role": "system", "content": "Listen."},
        {"role": "user", "content": [image(str(photo)), audio(sound(0.5, seed=1)), text("?")]},
        {"role": "assistant", "content": [text("!")]},
        {"role": "user", "content": [{"audio_url": {"url": (ASSETS / "audio" / "jfk.wav").as_uri()}}, text("?")]},
    ]
    images, _ = qwen_vl_utils.process_vision_info(messages, image_patch_size=processor.image_processor.patch_size)
    sounds = process_audio_info(messages)
    prompt = processor.apply_chat_template(messages)
    inputs = processor(text=[prompt], images=images, audio=sounds, return_tensors="pt")
    assert [len(samples) for samples in sounds] == [8000, 176_000]
    whole = render(messages)
    assert torch.equal(inputs["input_ids"], whole["input_ids"])
    assert torch.equal(inputs["input_features"], whole["input_features"])

    clip = [{"role": "user", "content": [{"type": "video", "video": str(path)}, audio(sound(0.25)), text("?")]}]
    assert [len(samples) for samples in process_audio_info([clip, messages])] == [4000, 8000, 176_000]
    track, spoken = process_audio_info(clip, load_audio_from_video=True)
    assert len(track) > 14_000 and len(spoken) == 4000
    assert process_audio_info(messages[:1]) is None
    with pytest.raises(AudioError, match="limit of 5 s"):
        process_audio_info(messages, max_seconds=5)


def test_other_arguments_of_the_template_pass_through(processor, sound, runs):
    question = {"role": "user", "content": [audio(sound(0.5)), text("Say hi.")]}
    messages = [question, {"role": "assistant", "content": "Hi."}]
    prompt = processor.apply_chat_template(messages)
    assert prompt.endswith("<|audio_pad|>Say hi.<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n")
    continued = processor.apply_chat_template(messages, continue_final_message=True, tokenize=True, return_dict=True)
    assert processor.decode(continued["input_ids"][0]).endswith("<|im_start|>assistant\nHi.")
    ids = processor.apply_chat_template(messages, tokenize=True)
    assert runs(ids[0]) == clip_runs()


def test_rows_are_checked_without_rendering_them(processor, photo, monkeypatch):
    """A batch renders each row once, when it is made. Files are found beside the row, whatever names them."""
    monkeypatch.setattr(processor, "apply_chat_template", None)
    pictures = [{"type": "image", "path": photo.name}, {"type": "image_url", "image_url": {"url": photo.name}}]
    pictures += [{"type": "image", "image": {"bytes": photo.read_bytes(), "path": None}, "audio": None}]
    messages = [{"role": "user", "content": pictures}, {"role": "assistant", "content": "A cat."}]
    asked, answer = ChatCollator(processor).messages({"messages": messages, "place": f"{photo.parent}/rows.jsonl:1"})
    assert [item["image"] for item in asked["content"][:2]] == [str(photo)] * 2
    assert asked["content"][2]["image"].size == Image.open(photo).size and answer == messages[1]


def test_saved_processor_reloads_itself(processor_30s, tmp_path):
    """Whisper's preprocessor_config.json must not overwrite the image one, nor 80 mels come back."""
    processor_30s.save_pretrained(tmp_path)
    reloaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(reloaded.image_processor) is type(processor_30s.image_processor)
    assert reloaded.feature_extractor.feature_size == 128
    assert reloaded.image_processor.to_dict() == processor_30s.image_processor.to_dict()
    assert reloaded.chat_template == processor_30s.chat_template


def test_processor_of_another_model_is_refused(processor, repo, repo_30s, tmp_path):
    shutil.copytree(repo_30s, tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["audio_config"]["num_mel_bins"] = 80
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="feature_extractor.feature_size is 128, but the model's num_mel_bins is 80"):
        AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    (tmp_path / "config.json").write_bytes((repo / "config.json").read_bytes())
    with pytest.raises(ValueError, match="tokens per window is 1500, but the model's max_source_positions is 50"):
        AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "qwen2-vl-7b")
    with pytest.raises(ValueError, match=r"no <\|audio_pad\|> token"):
        type(processor)(processor.image_processor, tokenizer, processor.video_processor, processor.feature_extractor)


def test_audio_without_text_as_numpy(processor, sound):
    features = processor(audio=[sound(0.5), sound(1.5)], return_tensors="np")["input_features"]
    assert isinstance(features, np.ndarray) and features.dtype == np.float32 and features.shape == (3, 128, 100)
