"""Messages -> model inputs: the processor of a vision-language model with audio beside images and video."""

from transformers.utils.versions import require_version


# First, as the imports below fail on older releases without naming the reason. The configuration file repeats it.
require_version("transformers>=5.16.1,<6", "Install one with: pip install 'transformers>=5.16.1,<6'")

import difflib
import functools
import inspect
import re
import sys
from typing import ClassVar

import numpy as np
import torch
from jinja2 import TemplateError
from torch.nn import functional as F
from transformers import BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.processing_utils import AudioKwargs
from transformers.utils import logging
from transformers.video_utils import load_video, make_batched_videos

from .audio_decoding import AudioError  # every file is named here: several processes may fill an empty cache at once
from .audio_download import FETCH_LIMITS
from .audio_utils import fetch_all, log_mel, open_item, split_windows
from .configuration_qwen2_audio_vl import (
    ENCODER_STRIDE,
    IGNORED_LABEL,
    LONGER,
    TRAINED_AUDIO_TOKENS,
    AudioCount,
    ask_for_words,
    check_audio_tokens,
    check_piece_seconds,
    check_tasks,
    count_audio,
    tokens_per_window,
)
from .content_items import join_texts, normalize_conversations, take_audio


logger = logging.get_logger(__name__)

MODALITIES = {
    "text_kwargs": "tokenizer",
    "images_kwargs": "image_processor",
    "videos_kwargs": "video_processor",
    "audio_kwargs": "feature_extractor",
}
OWN_KWARGS = (*FETCH_LIMITS, "load_audio_backend")  # not passed on to transformers
# A clip is never padded, truncated or resized: it becomes whole windows.
AUDIO_KWARGS = ("sampling_rate", "device", "audio_tokens", *OWN_KWARGS)
ANSWER_START = "<|im_start|>assistant\n"


class OwnAudioKwargs(AudioKwargs, total=False):
    audio_tokens: str


def with_audio(base: type[ProcessorMixin]) -> type:
    """Returns the arguments that a base's processor takes, with those of audio."""

    class OwnProcessorKwargs(base.valid_processor_kwargs, total=False):
        audio_kwargs: OwnAudioKwargs
        _defaults = getattr(base.valid_processor_kwargs, "_defaults", {})  # releases before 5.24 need it

    return OwnProcessorKwargs


class AudioProcessing:
    """
    Adds [`WhisperFeatureExtractor`] to the image processor, video processor and tokenizer of the processor of a base,
    which follows it among the bases of a class.

    One `<|audio_pad|>` in the text stands for one clip. It becomes `<|audio_bos|>`, as many `<|audio_pad|>` as
    `count_audio` returns (1500 for each window of 30 s in Whisper's own sizes), and `<|audio_eos|>`.

    Args:
        audio_tokens (`str`, defaults to "fixed"): "fixed" or "trimmed" tokens for each clip, see `count_audio`.
        trained_audio_tokens (`str`, *optional*): The tokens that the model was trained with: "fixed", "trimmed" or
            "both". The default is unknown.
        piece_seconds (`float`, *optional*): The longest clip of which the model drops nothing, in seconds, and so the
            longest piece into which `transcribe.py` cuts a recording. The default is unknown.
        trained_tasks (`list[dict]`, *optional*): What the model was trained to do: `instruction`, `answers` ("text",
            "classes" or "json") and, where they were measured, `metric`, `before` and `after`. The default is unknown.

    Raises:
        ValueError: if the tokenizer lacks a token, or if one of the last four arguments has another value.
    """

    dropped_by_vllm: ClassVar[dict[str, str]] = {}  # what the answers need, by argument

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        feature_extractor=None,
        chat_template=None,
        audio_tokens: str = "fixed",
        trained_audio_tokens: str | None = None,
        piece_seconds: float | None = None,
        trained_tasks: list[dict] | None = None,
    ):
        check_audio_tokens(audio_tokens)
        if trained_audio_tokens is not None:
            check_audio_tokens(trained_audio_tokens, TRAINED_AUDIO_TOKENS)
        if piece_seconds is not None:
            check_piece_seconds(piece_seconds)
        self.audio_tokens, self.trained_audio_tokens = audio_tokens, trained_audio_tokens
        if trained_tasks is not None:
            check_tasks(trained_tasks)
        self.piece_seconds, self.trained_tasks = piece_seconds, trained_tasks
        # The base's `__init__` is skipped: it passes three parts by position and has no place for the fourth.
        ProcessorMixin.__init__(
            self, image_processor, tokenizer, video_processor, feature_extractor, chat_template=chat_template
        )
        for name in ("image", "video", "vision_start", "vision_end", "audio", "audio_bos", "audio_eos"):
            token = f"<|{name}|>" if "_" in name else f"<|{name}_pad|>"
            token_id = tokenizer.convert_tokens_to_ids(token)
            if token_id is None or token_id == tokenizer.unk_token_id:
                raise ValueError(f"The tokenizer has no {token} token. It has to be Qwen-VL's, with the audio tokens.")
            setattr(self, f"{name}_token", token)
            setattr(self, f"{name}_token_id", token_id)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in [`ProcessorMixin`]. A `config.json` beside the processor's files must describe the same audio path."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        kwargs.pop("trust_remote_code", None)  # the values alone are read here, not the code
        try:
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        except OSError:
            return processor  # saved on its own, without a model
        processor.check_config(config)
        return processor

    def check_config(self, config: dict):
        """Raises ValueError if the model of this `config` takes other windows or tokens than the processor makes."""
        audio_config = config.get("audio_config") or {}
        for part, own_value, field, fields in (
            ("feature_extractor.feature_size", self.feature_extractor.feature_size, "num_mel_bins", audio_config),
            ("audio tokens per window", self.tokens_per_window, "max_source_positions", audio_config),
            ("id of <|audio_pad|>", self.audio_token_id, "audio_token_id", config),
            ("id of <|audio_bos|>", self.audio_bos_token_id, "audio_bos_token_id", config),
            ("id of <|audio_eos|>", self.audio_eos_token_id, "audio_eos_token_id", config),
        ):
            if fields.get(field, own_value) != own_value:
                raise ValueError(
                    f"The processor's {part} is {own_value}, but the model's {field} is {fields[field]}: their files "
                    "come from different models."
                )

    @property
    def tokens_per_window(self) -> int:
        return tokens_per_window(self.feature_extractor)

    def __call__(self, images=None, text=None, videos=None, audio=None, chat_audio=None, **kwargs) -> BatchFeature:
        """
        Args:
            images, text, videos: As in the base's processor; one `<|image_pad|>` or `<|video_pad|>` each in the text.
            audio: One clip, or a list of clips in reading order, or one list of clips per text; each is anything that
                `audio_utils.fetch_audio` takes.
            chat_audio: The same; `apply_chat_template` passes the clips of the messages here.
            sampling_rate, max_bytes, max_seconds, timeout, public_only: As in `audio_utils.fetch_audio`. Like the
                next two they may be given in `audio_kwargs`.
            device (`str` or `torch.device`, *optional*): Where features are computed, and where they lie.
            audio_tokens (`str`, *optional*): "fixed" or "trimmed". The default is the processor's.
            load_audio_backend: Accepted for compatibility, without effect: PyAV decodes.
            kwargs: Arguments of the tokenizer, the image processor and the video processor, flat or in `text_kwargs`,
                `images_kwargs`, `videos_kwargs`.

        Returns:
            [`BatchFeature`] with `input_ids`, `attention_mask`, `mm_token_type_ids` (0 text, 1 image, 2 video,
            3 audio), the pixels and grids of images and videos, and `input_features`, float32 `(windows, mel bins,
            frames)` in the order of their placeholders; with trimmed audio tokens also `input_features_mask`, int64
            `(windows, frames)`, 1 where a frame belongs to a clip.

        Raises:
            TypeError: on arguments that no part knows.
            ValueError: if placeholders and data differ in number, if truncation would cut a clip, if a prompt passes
                the model's positions, or, as its subclass [`AudioError`], if a clip cannot be opened.
        """
        self._refuse_unknown(kwargs)
        is_vllm = "vllm" in sys.modules and kwargs.get("return_text_replacement_offsets")
        for name, value in (("images", images), ("videos", videos)):
            if is_vllm and value is not None and name in self.dropped_by_vllm:
                reason = f"vLLM drops {self.dropped_by_vllm[name]}, so its answers about {name} would be wrong. "
                reason += "Serve them with serve.py."
                logger.error(reason)  # vLLM answers with HTTP 400 alone
                raise ValueError(reason)
        audio_kwargs, kwargs = self._split_kwargs(kwargs)
        audio = chat_audio if audio is None else audio
        clips = audio if isinstance(audio, list) else [] if audio is None else [audio]
        if text is not None and not kwargs.get("sanitize_control_tokens"):
            self._check_counts([text] if isinstance(text, str) else text, clips)
        clips = self._open_clips(clips, audio_kwargs)
        inputs = super().__call__(images=images, text=text, videos=videos, audio=clips or None, **kwargs)
        if clips and text is not None:
            self._check_prompts(inputs["input_ids"])
        # With both offsets transformers masks the answers, and the features stay as they are.
        if clips and kwargs.get("return_text_replacement_offsets") and not kwargs.get("return_offsets_mapping"):
            self._split_features(inputs, [self._count(len(clip), audio_kwargs.get("audio_tokens")) for clip in clips])
        return inputs

    def _split_kwargs(self, kwargs: dict) -> tuple[dict, dict]:
        """Returns the arguments of audio, and all arguments except those that transformers does not know."""
        audio_kwargs = {**kwargs, **kwargs.get("audio_kwargs", {})}
        if audio_kwargs.get("load_audio_backend") not in (None, "auto"):
            logger.warning_once("load_audio_backend has no effect: this processor decodes audio with PyAV.")
        passed = {name: value for name, value in kwargs.items() if name not in OWN_KWARGS}
        if "audio_kwargs" in passed:
            passed["audio_kwargs"] = {n: v for n, v in passed["audio_kwargs"].items() if n not in OWN_KWARGS}
        return audio_kwargs, passed

    def _check_counts(self, texts: list[str], clips: list):
        """Compares placeholders with clips before any clip is opened."""
        is_nested = any(isinstance(clip, list) for clip in clips)
        placeholders = [sample.count(self.audio_token) for sample in texts]
        num_clips = [len(clip) if isinstance(clip, list) else 1 for clip in clips] if is_nested else len(clips)
        if num_clips != (placeholders if is_nested else sum(placeholders)):
            raise ValueError(
                f"The number of {self.audio_token} tokens in the prompts should be the same as the number of clips in "
                f"`audio`: the prompts have {placeholders} (one number per prompt), `audio` has {num_clips}. Give the "
                "clips in reading order, as one flat list or as one list per prompt."
            )

    def _open_clips(self, clips: list, audio_kwargs: dict) -> list[torch.Tensor]:
        """Returns the samples of each clip, float32 `[samples]`; `clips` may be one list per text."""
        clips = [clip for row in clips for clip in (row if isinstance(row, list) else [row])]
        audio_tokens = audio_kwargs.get("audio_tokens") or self.audio_tokens
        check_audio_tokens(audio_tokens)
        if clips and self.trained_audio_tokens not in (None, "both", audio_tokens):
            logger.warning_once(
                f"This model was trained with {self.trained_audio_tokens} audio tokens; with {audio_tokens} ones it "
                "may not understand most of the audio. `python -m training --audio-tokens both` adapts it."
            )
        limits = {name: audio_kwargs[name] for name in ("sampling_rate", *FETCH_LIMITS) if name in audio_kwargs}
        sr, device = self.feature_extractor.sampling_rate, audio_kwargs.get("device")
        opened = fetch_all(clips, sr, device, **limits)
        longest = max(map(len, opened), default=0) / sr
        if self.piece_seconds is not None and longest > LONGER * self.piece_seconds:
            logger.warning_once(
                f"A clip lasts {longest:.1f} s, but this model may leave out words of clips longer than "
                f"{self.piece_seconds:g} s (`piece_seconds`). `transcribe.py` transcribes recordings of any length."
            )
        return opened

    def _split_features(self, inputs: BatchFeature, counts: list[AudioCount]):
        """Splits the features by clips, because vLLM takes each entry for one clip, and would pad or cut it."""
        windows = inputs["input_features"].split([count.windows for count in counts])
        inputs["input_features"] = [torch.cat(list(clip), dim=1) for clip in windows]
        masks = [self.mask_frames(count).flatten() for count in counts]
        inputs["input_features_mask"] = [mask.to(inputs["input_features"][0]) for mask in masks]

    def _count(self, num_samples: int, audio_tokens: str | None) -> AudioCount:
        return count_audio(num_samples, self.tokens_per_window, audio_tokens or self.audio_tokens)

    def mask_frames(self, count: AudioCount) -> torch.Tensor:
        """Returns the mask of one clip, int64 `(windows, frames)`: 1 for the frames that become its tokens."""
        places = torch.arange(count.windows * self.feature_extractor.nb_max_frames)
        return (places < ENCODER_STRIDE * count.tokens).long().view(count.windows, -1)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        images, text, videos, _ = super().prepare_inputs_layout(images=images, text=text, videos=videos, **kwargs)
        if text is not None:
            # The expansion adds the markers, so those in the text are removed first.
            bos, pad, eos = map(re.escape, (self.audio_bos_token, self.audio_token, self.audio_eos_token))
            text = [re.sub(f"(?:{bos})?{pad}(?:{eos})?", self.audio_token, sample) for sample in text]
        return images, text, videos, audio

    def _process_videos(self, videos, **kwargs):
        try:
            return super()._process_videos(videos, **kwargs)
        except (ImportError, RuntimeError):  # torchcodec is not installed, or does not find FFmpeg
            paths = make_batched_videos(videos)
            if not all(isinstance(path, str) for path in paths):
                raise
        is_sampled = kwargs.get("do_sample_frames", self.video_processor.do_sample_frames)
        sample = functools.partial(self.video_processor.sample_frames, **kwargs) if is_sampled else None
        try:
            loaded = [load_video(path, backend="pyav", sample_indices_fn=sample) for path in paths]
        except IndexError as error:
            raise ValueError(
                f"One of {paths} does not say how many frames it has (webm often does not), which PyAV needs. Install "
                "torchcodec with FFmpeg, or give the frames as an array."
            ) from error
        frames, metadata = map(list, zip(*loaded, strict=True))
        return super()._process_videos(frames, **{**kwargs, "do_sample_frames": False, "video_metadata": metadata})

    def _process_audio(self, audio, **kwargs):
        counts = [self._count(len(samples), kwargs.get("audio_tokens")) for samples in audio]
        for count in counts:  # checked before the spectrogram is computed
            self._check_length(count.tokens)
        windows = [window for samples in audio for window in split_windows(samples, self.feature_extractor)]
        data = {"input_features": log_mel(windows, self.feature_extractor)}
        if (kwargs.get("audio_tokens") or self.audio_tokens) == "trimmed":
            masks = [self.mask_frames(count) for count in counts]
            data["input_features_mask"] = torch.cat(masks).to(data["input_features"].device)
        data["tokens_per_clip"] = [count.tokens for count in counts]
        return data, [self.replace_audio_token(data, idx) for idx in range(len(audio))]

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs) -> str:
        num_tokens = audio_inputs["tokens_per_clip"][audio_idx]
        return self.audio_bos_token + self.audio_token * num_tokens + self.audio_eos_token

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, audio_lengths=None, **kwargs):
        """As in the base; `audio_lengths` are samples at 16 kHz, and their tokens do not count markers."""
        counted = super()._get_num_multimodal_tokens(image_sizes=image_sizes, video_sizes=video_sizes, **kwargs)
        if audio_lengths is not None:
            counted.num_audio_tokens = [self._count(n, kwargs.get("audio_tokens")).tokens for n in audio_lengths]
        return counted

    @property
    def unused_input_names(self) -> list[str]:
        return [*super().unused_input_names, "tokens_per_clip"]

    def apply_chat_template(self, conversation, chat_template=None, *, processor_kwargs=None, **kwargs):
        """
        As in [`ProcessorMixin`], with audio: content items of type `audio` (source under `audio`, `url`, `path`,
        `base64`, `bytes` or `array`, and its `sampling_rate`), `audio_url` and OpenAI's `input_audio`. A message is a
        dict, another mapping, or an object such as OpenAI's `ChatCompletionMessage`, and is not changed. With
        `load_audio_from_video=True` the audio track of each video follows it. With `sanitize_control_tokens=True`
        (transformers 5.23 and later) control tokens in texts are encoded as text, also those that adjacent texts spell.

        Raises:
            TypeError: on arguments that neither the template nor any part knows.
            ImportError: on `return_assistant_tokens_mask` before transformers 5.18.
            ValueError: on content that the model cannot take, naming it.
        """
        processor_kwargs = dict(processor_kwargs or {})
        own_parameters = inspect.signature(super().apply_chat_template).parameters
        for name in [name for name in kwargs if name in self._known_kwargs() and name not in own_parameters]:
            processor_kwargs[name] = kwargs.pop(name)
        if kwargs.get("return_assistant_tokens_mask"):
            require_version("transformers>=5.18", "return_assistant_tokens_mask needs it, as it marks others before.")
        normalized, is_batch = normalize_conversations(conversation)
        load_audio_from_video = kwargs.pop("load_audio_from_video", False)
        pairs = [take_audio(messages, load_audio_from_video) for messages in normalized]
        conversations = [messages for messages, _ in pairs]
        clips = [clip for _, clips in pairs for clip in clips]
        if clips and kwargs.get("tokenize"):
            processor_kwargs["chat_audio"] = clips
        if kwargs.get("sanitize_control_tokens"):
            for message in (message for messages in conversations for message in messages):
                if isinstance(message.get("content"), list):
                    message["content"] = join_texts(message["content"])
        try:
            return super().apply_chat_template(
                conversations if is_batch else conversations[0],
                chat_template=chat_template,
                processor_kwargs=processor_kwargs,
                **kwargs,
            )
        except torch.OutOfMemoryError:
            raise
        except (LookupError, AttributeError, RuntimeError, TemplateError) as error:  # RecursionError is a RuntimeError
            raise ValueError(f"The conversation cannot be processed: {str(error) or type(error).__name__}") from error

    def make_inputs(self, conversations: list, **kwargs) -> BatchFeature:
        """Calls [`apply_chat_template`] for `generate`: with a generation prompt, as tensors, padded on the left."""
        settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        settings["processor_kwargs"] = {"padding": True, **(kwargs.pop("processor_kwargs", None) or {})}
        return self.apply_chat_template(conversations, **{**settings, **kwargs})

    def answer(self, model, conversations: list[list[dict]], max_new_tokens: int = 256, **kwargs) -> list[str]:
        """
        Returns the answers of a model to conversations that end with a user's message, in one batch of at most
        `max_new_tokens` tokens each. `kwargs` are those of `generate`; the default is greedy.
        """
        inputs = self.make_inputs(conversations).to(model.device)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, **{"do_sample": False, **kwargs})
        return self.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def join_rows(self, rows: list[dict[str, torch.Tensor]], pad_to_multiple_of: int = 1) -> BatchFeature:
        """
        Joins the inputs of single prompts, perhaps with `labels`, to a batch that is padded on the left to a multiple
        of `pad_to_multiple_of`. Pictures and windows of audio follow row after row.
        """
        length = max(row["input_ids"].shape[1] for row in rows)
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
        fillers = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}
        fillers["labels"] = IGNORED_LABEL
        joined = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            tensors = [row[name] for row in rows if name in row]
            if name in fillers:
                tensors = [F.pad(tensor, (length - tensor.shape[1], 0), value=fillers[name]) for tensor in tensors]
            joined[name] = torch.cat(tensors)
        return BatchFeature(joined)

    @staticmethod
    def normalize_conversations(conversation) -> tuple[list[list[dict]], bool]:
        """See `content_items.normalize_conversations`."""
        return normalize_conversations(conversation)

    def open_item(self, item: dict, **kwargs) -> dict:
        """See `audio_utils.open_item`; the sampling rate is the feature extractor's."""
        return open_item(item, self.feature_extractor.sampling_rate, **kwargs)

    def apply_transcription_request(self, audio, language=None, prompt=None, tokenize: bool = True, **kwargs):
        """
        Returns inputs of `generate` that ask for the words of a clip. What is generated after them is the transcript:
        `processor.decode(output, return_format="transcription_only")`.

        Args:
            audio: A clip, anything that `audio_utils.fetch_audio` takes, or a list of clips, which makes a batch.
            language (`str` or list, *optional*): Whisper's code ("en") or name ("English") of the language; one for
                all clips, or one (or None) for each.
            prompt (`str` or list, *optional*): The instruction, instead of "Transcribe the audio."; likewise.
            tokenize: False returns the prompts as text, for `processor(text=prompts, audio=audio)`.
            kwargs: Arguments of [`apply_chat_template`].

        Raises:
            ValueError: if there is no clip, if lists differ in length, if the language is unknown; on
                `return_timestamps`.
        """
        refuse_timestamps(kwargs)
        clips = list(audio) if isinstance(audio, list) else [audio]
        if not clips:
            raise AudioError("There is no clip to transcribe: audio is an empty list.")
        columns = []
        for name, value in (("language", language), ("prompt", prompt)):
            columns.append(list(value) if isinstance(value, (list, tuple)) else [value] * len(clips))
            if len(columns[-1]) != len(clips):
                raise ValueError(f"{name} has {len(columns[-1])} entries for {len(clips)} clips; give one for each.")
        conversations = []
        for clip, code, instruction in zip(clips, *columns, strict=True):
            content = [{"type": "audio", "audio": clip}, {"type": "text", "text": ask_for_words(code, instruction)}]
            conversations.append([{"role": "user", "content": content}])
        return self.make_inputs(conversations, tokenize=tokenize, **kwargs)

    def decode(self, *args, return_format: str = "raw", **kwargs):
        """
        As in [`ProcessorMixin`], for ids of one answer or of a batch. `return_format` is "raw", or
        "transcription_only": the answer alone, without control tokens, and without its prompt, if the ids have it.
        Raises a ValueError on another format, and on `return_timestamps`.
        """
        refuse_timestamps(kwargs)
        if return_format not in ("raw", "transcription_only"):
            raise ValueError(f'return_format must be "raw" or "transcription_only", got {return_format!r}.')
        if return_format == "raw":
            return super().decode(*args, **kwargs)
        decoded = super().decode(*args, **{**kwargs, "skip_special_tokens": False})
        answers = [text.rpartition(ANSWER_START)[2] for text in ([decoded] if isinstance(decoded, str) else decoded)]
        ends = "|".join(map(re.escape, self.tokenizer.all_special_tokens))
        answers = [re.split(ends, text, maxsplit=1)[0].strip() for text in answers]
        return answers[0] if isinstance(decoded, str) else answers

    def _known_kwargs(self, modality: str | None = None) -> set[str]:
        """Returns the names of the arguments that `modality`, one of `MODALITIES`, may hold, or that may be flat."""
        if modality == "audio_kwargs":
            return {*AUDIO_KWARGS}
        annotations = self.valid_processor_kwargs.__annotations__
        if modality is None:
            return {"common_kwargs", *annotations}.union(*map(self._known_kwargs, MODALITIES))
        part = getattr(self, MODALITIES[modality])
        own = getattr(getattr(part, "valid_kwargs", None), "__annotations__", {})
        return {*annotations[modality].__annotations__, *own}

    def _refuse_unknown(self, kwargs: dict):
        groups = [(kwargs, None), *((kwargs[modality], modality) for modality in MODALITIES if modality in kwargs)]
        for arguments, modality in groups:
            known = self._known_kwargs(modality)
            for name in [name for name in arguments if name not in known]:
                likely = difflib.get_close_matches(name, [*known, "text", "images", "videos", "audio"], n=1)
                end = f"; did you mean {likely[0]!r}?" if likely else "."
                raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {name!r}{end}")

    def _check_prompts(self, input_ids):
        """Refuses truncated markers, and prompts that pass the positions of the model (images and video take few)."""
        for ids in map(np.asarray, input_ids):
            starts, ends = (int((ids == marker).sum()) for marker in (self.audio_bos_token_id, self.audio_eos_token_id))
            if starts != ends:
                raise ValueError(
                    f"The prompt has {starts} {self.audio_bos_token} but {ends} {self.audio_eos_token}: truncation cut "
                    "a clip. Raise max_length, or leave truncation off."
                )
            elsewhere = (self.image_token_id, self.video_token_id, self.tokenizer.pad_token_id)
            self._check_length(int(np.isin(ids, elsewhere, invert=True).sum()))

    def _check_length(self, num_tokens: int):
        limit = self.tokenizer.model_max_length  # the model's max_position_embeddings
        if num_tokens > limit:
            raise ValueError(
                f"The prompt has {num_tokens} tokens of text and audio, but the model has {limit} positions "
                f"(max_position_embeddings); {self.tokens_per_window} tokens are "
                f"{self.feature_extractor.chunk_length} s of audio. Shorten the audio or split the conversation."
            )


def refuse_timestamps(kwargs: dict):
    """Raises a ValueError on `return_timestamps`, which users of Whisper know; False and None are taken out."""
    if kwargs.pop("return_timestamps", None):
        raise ValueError(
            "The tokens of this model have no times, so return_timestamps cannot be given here. `transcribe.py` of "
            "this repository finds the times of segments and words: transcribe(model, processor, audio, aligner=...)."
        )


# transformers looks for these by the names of the processors.
Qwen2AudioVLProcessorKwargs = with_audio(Qwen2VLProcessor)
Qwen2_5AudioVLProcessorKwargs = with_audio(Qwen2_5_VLProcessor)
Qwen3AudioVLProcessorKwargs = with_audio(Qwen3VLProcessor)


class Qwen2AudioVLProcessor(AudioProcessing, Qwen2VLProcessor):
    valid_processor_kwargs = Qwen2AudioVLProcessorKwargs


class Qwen2_5AudioVLProcessor(AudioProcessing, Qwen2_5_VLProcessor):
    valid_processor_kwargs = Qwen2_5AudioVLProcessorKwargs
    dropped_by_vllm: ClassVar = {"videos": "the times of frames"}


class Qwen3AudioVLProcessor(AudioProcessing, Qwen3VLProcessor):
    valid_processor_kwargs = Qwen3AudioVLProcessorKwargs
    dropped_by_vllm: ClassVar = dict.fromkeys(("images", "videos"), "the deepstack")


Qwen2AudioVLProcessor.register_for_auto_class()
Qwen2_5AudioVLProcessor.register_for_auto_class()
Qwen3AudioVLProcessor.register_for_auto_class()
