"""Model inputs -> logits: a vision-language model with a Whisper encoder and a projector beside its vision tower."""

import contextlib
import copy
import inspect
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    GenerationMixin,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import can_return_tuple
from transformers.utils.versions import require_version

from .configuration_qwen2_audio_vl import (
    ENCODER_STRIDE,
    Qwen2_5AudioVLConfig,
    Qwen2AudioVLConfig,
    Qwen3AudioVLConfig,
)
from .mrope_positions import GRIDS, MRopePositions, cached_length


# transformers 5.24 renamed `past_key_values` to `cache` and takes both; older releases take the old name alone.
CACHE = "cache" if "cache" in inspect.signature(Qwen2VLModel.forward).parameters else "past_key_values"


# The ids of the call of a backbone, for bases that refuse ids beside embeddings; a thread has its own.
CALL_IDS = ContextVar("call_ids", default=None)


class AudioInputs(NamedTuple):
    """Log-mel windows with an optional mask, or the outputs of the encoder for them."""

    features: torch.Tensor | None
    mask: torch.Tensor | None
    outputs: BaseModelOutputWithPooling | None


class FrozenAudioEncoder:
    """Keeps the audio encoder frozen until its user calls `audio_encoder.requires_grad_(True)`."""

    input_modalities = ("image", "video", "audio", "text")

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with `output_loading_info=True`
        # Loading replaces the frozen parameters by new ones that learn.
        model.base_model.audio_encoder.requires_grad_(False)
        return loaded


class AudioBackbone(FrozenAudioEncoder, MRopePositions):
    """Adds audio to a vision-language model without its head, which follows it among the bases. It keeps no state."""

    takes_ids_beside_embeddings = True  # whether the `forward` of the base does

    def __init__(self, config):
        super().__init__(config)
        self.audio_encoder = WhisperEncoder._from_config(config.audio_config).requires_grad_(False)
        self.audio_encoder._no_split_modules = {"WhisperEncoderLayer"}  # FSDP fails on the decoder's, which is not here
        self.audio_projector = nn.Linear(config.audio_config.d_model, config.text_config.hidden_size, bias=False)
        self.post_init()

    @property
    def audio_encoder_learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.audio_encoder.parameters())

    def train(self, mode: bool = True):
        super().train(mode)
        if not self.audio_encoder_learns:
            self.audio_encoder.eval()
        return self

    @can_return_tuple
    def get_audio_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Encodes and projects log-mel windows.

        Args:
            input_features: Log-mel spectrograms `(windows, mel bins, frames)` of any float dtype. From vLLM a row has
                several windows, joined along the frames.
            input_features_mask: Tensor or list `(windows, frames)` of the shape of the features, not 0 where a frame
                belongs to a clip. Other frames get no embedding.
            kwargs: Those of [`WhisperEncoder`], such as `output_hidden_states`.

        Returns:
            `last_hidden_state` `(windows, tokens, d_model)` of the encoder, and `pooler_output`, the embeddings of the
            audio tokens: `(windows, tokens, hidden size)`, 1500 tokens per window in Whisper's own sizes, or with a
            mask `(kept tokens, hidden size)`. A compiled graph does not know their number and returns the others, too,
            after them.

        Raises:
            ValueError: if the mel bins or frames differ from the encoder's, or the mask from the features.
        """
        encoder = self.audio_encoder
        input_features, mask = self.separate_windows(input_features, input_features_mask)
        input_features, is_kept = match_weight(input_features, encoder.conv1.weight), None
        if mask is not None:
            mask = mask.to(input_features.device)
            is_kept = mask[:, ::ENCODER_STRIDE]
            if not is_traced():
                input_features, mask, is_kept = (part[is_kept.any(1)] for part in (input_features, mask, is_kept))
        # Whisper ignores the mask, but an encoder that stores its outputs can skip what lies outside it.
        kwargs["attention_mask"] = mask
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.audio_encoder_learns):
            outputs = encoder(input_features, return_dict=True, **kwargs)
        rows = outputs.last_hidden_state
        if is_kept is not None:
            is_kept = is_kept.to(rows.device)
            kept_first = (~is_kept.flatten()).int().argsort(stable=True) if is_traced() else None
            rows = rows[is_kept] if kept_first is None else rows.flatten(0, 1)[kept_first]
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.audio_projector(match_weight(rows, self.audio_projector.weight)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def separate_windows(self, input_features, input_features_mask) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns windows `(windows, mel bins, frames)` and their mask, bool `(windows, frames)` or None."""
        config = self.config.audio_config
        bins, frames = config.num_mel_bins, config.max_source_positions * ENCODER_STRIDE
        if input_features.ndim == 3 and input_features.shape[2] and input_features.shape[2] % frames == 0:
            input_features = input_features.unflatten(2, (-1, frames)).transpose(1, 2).flatten(0, 1)
        if input_features.ndim != 3 or input_features.shape[1:] != (bins, frames):
            raise ValueError(
                f"input_features has shape {tuple(input_features.shape)}, but the audio encoder takes (windows, {bins} "
                f"mel bins, {frames} frames). Use the processor of this model."
            )
        if input_features_mask is None:
            return input_features, None
        if isinstance(input_features_mask, list):  # as vLLM gives it
            input_features_mask = torch.stack(input_features_mask)
        shape = input_features_mask.shape
        if shape[-1] % frames or shape.numel() != len(input_features) * frames:
            raise ValueError(
                f"input_features_mask has shape {tuple(shape)}, but the features are {len(input_features)} windows of "
                f"{frames} frames. Pass both as the processor returned them."
            )
        return input_features, input_features_mask.reshape(-1, frames).bool()

    def count_rows(self, audio: AudioInputs) -> torch.Tensor:
        """Returns the number of embeddings of each window, int64 `(windows,)`, or one sum where windows are unknown."""
        if audio.outputs is None:
            windows, mask = self.separate_windows(audio.features, audio.mask)
        else:
            windows, mask = audio.outputs.pooler_output, None
            if windows.ndim == 2 or audio.outputs.last_hidden_state is None:  # selected by a mask or by `generate`
                return torch.tensor(windows[..., 0].numel())
        if mask is None:
            return torch.full((len(windows),), self.config.audio_config.max_source_positions, device=windows.device)
        if not is_traced() and (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("input_features_mask must mark the first frames of each window, without a gap.")
        return mask[:, ::ENCODER_STRIDE].sum(1)

    def find_audio(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Returns where the audio tokens are, bool `(batch, sequence)`, by their ids or else by their embedding."""
        if input_ids is not None and input_ids.numel():
            return input_ids == self.config.audio_token_id
        token = torch.tensor(self.config.audio_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def check_audio(self, is_audio: torch.Tensor, rows: torch.Tensor):
        """
        Compares the audio tokens, bool `(batch, sequence)`, with the numbers of embeddings that `count_rows` returns.

        Raises:
            ValueError: if their numbers differ, or a run of audio tokens does not end with a window. A compiled graph
                fails on the device instead.
        """
        rows, num_tokens = rows.to(is_audio.device), is_audio.sum()
        fits = num_tokens == rows.sum()
        if rows.ndim:
            is_last, tokens_so_far = is_audio & ~F.pad(is_audio, (-1, 1)), is_audio.flatten().cumsum(0)
            fits = fits & (~is_last.flatten() | torch.isin(tokens_so_far, rows.cumsum(0))).all()
        if is_traced():
            torch._assert_async(fits, "Audio tokens and audio features do not match.")
        elif not fits:
            raise ValueError(
                f"Audio tokens and audio features do not match: the prompt has {int(num_tokens)} audio tokens, but "
                f"{int(rows.sum())} audio embeddings were given (by window: {rows.reshape(-1).tolist()[:10]}). Every "
                "audio token needs its embedding, every embedding its token, and every clip ends with a window. The "
                "processor makes all from one call; with trimmed audio tokens pass its input_features_mask as well."
            )

    def insert_audio(
        self, input_ids, inputs_embeds, audio: AudioInputs
    ) -> tuple[torch.Tensor, BaseModelOutputWithPooling]:
        """Returns `inputs_embeds` with the embeddings of the audio at its tokens, and the outputs of the encoder."""
        is_audio = self.find_audio(input_ids, inputs_embeds)
        self.check_audio(is_audio, self.count_rows(audio))
        outputs = audio.outputs
        if outputs is None:
            outputs = self.get_audio_features(audio.features, audio.mask, return_dict=True)
        embeddings = outputs.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(is_audio[..., None].to(inputs_embeds.device), embeddings), outputs

    def run_idle_encoders(self, inputs_embeds, encodes_audio: bool, pixel_values=None, pixel_values_videos=None, **_):
        """
        Runs a silent window and black pictures through the encoders that the inputs do not use, and returns
        `inputs_embeds` with equal values. Under FSDP the layers gather their weights from all processes, so every
        process must call the same layers. Trained weights of these encoders get a gradient of 0.
        """
        audio, vision, unused = self.config.audio_config, self.config.vision_config, []
        if not encodes_audio:
            window = inputs_embeds.new_zeros(1, audio.num_mel_bins, audio.max_source_positions * ENCODER_STRIDE)
            unused.append(self.get_audio_features(window, return_dict=True).pooler_output)
        side, values = vision.spatial_merge_size, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        for pixels in (pixel_values, pixel_values_videos):  # upstream calls the vision tower for each of the two
            if pixels is None:
                grid = torch.tensor([[1, side, side]], device=inputs_embeds.device)
                patches = inputs_embeds.new_zeros(side**2, values)
                outputs = self.visual(patches, grid_thw=grid, return_dict=True)
                unused += [outputs.pooler_output, *(getattr(outputs, "deepstack_features", None) or ())]
        for embeddings in unused:  # the sum of no values is 0, also where an embedding is not finite
            inputs_embeds = inputs_embeds + embeddings[..., :0].sum().to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds

    def get_placeholder_mask(self, input_ids, inputs_embeds, **kwargs):
        # Without ids upstream finds pictures by their embeddings, which noise and equal rows of the vocabulary break.
        return super().get_placeholder_mask(CALL_IDS.get() if input_ids is None else input_ids, inputs_embeds, **kwargs)

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, **kwargs
    ) -> BaseModelOutputWithPast:
        """Takes what [`AudioHead.forward`] takes, and returns the last hidden state."""
        cache = kwargs.pop("cache", None)
        cache = past_key_values if cache is None else cache
        is_embedded = inputs_embeds is not None
        if not is_embedded:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        is_prefill = inputs_embeds.shape[1] > 1
        encoder_outputs, audio_outputs = kwargs.get("mm_encoder_outputs") or {}, None
        audio = pop_audio(kwargs)
        if audio is not None:
            inputs_embeds, audio_outputs = self.insert_audio(input_ids, inputs_embeds, audio)
            if "audio" in encoder_outputs:  # the caller reads them from there, as upstream does those of pictures
                encoder_outputs["audio"] = audio_outputs
        elif is_prefill and not is_embedded:  # a decode step must not wait for the device
            self.check_audio(self.find_audio(input_ids, None), torch.tensor(0))
        if is_prefill and getattr(self, "_is_fsdp_managed_module", False):  # which torch sets when it shards
            inputs_embeds = self.run_idle_encoders(inputs_embeds, audio is not None and audio.outputs is None, **kwargs)

        if position_ids is None:
            vision = {name: kwargs.get(name) for name in (*GRIDS, "mm_token_type_ids")}
            position_ids = self.compute_3d_position_ids(
                input_ids, inputs_embeds, attention_mask=attention_mask, cache=cache, **vision
            )
        passed_ids = input_ids if self.takes_ids_beside_embeddings else None
        # A compiled graph has no variables of its call.
        with contextlib.nullcontext() if is_traced() or passed_ids is input_ids else call_ids(input_ids):
            # The cache is passed by its place, because its name depends on the release.
            outputs = super().forward(
                passed_ids, attention_mask, position_ids, cache, inputs_embeds, return_dict=True, **kwargs
            )
        if audio_outputs is not None and hasattr(outputs, "audio_outputs"):  # since transformers 5.24
            outputs["audio_outputs"] = audio_outputs
        cache = getattr(outputs, CACHE)
        if is_prefill and isinstance(cache, Cache):  # not the paged cache of `generate_batch`, which takes text alone
            self.keep_positions(cache, position_ids, inputs_embeds.shape[:2], attention_mask)
        return outputs


class AudioHead(FrozenAudioEncoder):
    """Adds audio to a vision-language model with its head, which follows it among the bases."""

    backbone_class: type[AudioBackbone]
    accepts_loss_kwargs = True  # so that accumulated parts of a batch count by their tokens

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)  # not that of the base, which would build its backbone first
        self.model = self.backbone_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _from_config(cls, config, **kwargs):
        # vLLM asks `AutoModel` for the backbone and adds its own head; for others `AutoModel` gives the whole model.
        if config.text_config._attn_implementation == "vllm":
            return cls.backbone_class._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    def get_audio_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """See [`AudioBackbone.get_audio_features`]."""
        return self.model.get_audio_features(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple | CausalLMOutputWithPast:
        """
        The `forward` of the base with audio:

        Args:
            input_features, input_features_mask: Those of [`AudioBackbone.get_audio_features`], in the order of their
                placeholders, row after row of the batch.
            inputs_embeds: Float `(batch, sequence, hidden size)`. With `input_features`, those of the audio tokens are
                replaced. Without, they are complete.
            mm_token_type_ids: Int `(batch, sequence)`, 0 text, 1 image, 2 video, 3 audio; by default from `input_ids`.
            mm_encoder_outputs: Under "audio" what `get_audio_features` returned, instead of `input_features`, so that a
                clip with many questions is encoded once. On transformers >= 5.18 also "image" and "video".
            second_per_grid_ts: Seconds from a grid of a video to the next, float `(videos,)`, for Qwen2.5-VL.
            cache: The name of `past_key_values` since transformers 5.24. All releases take both names.

        Raises:
            ValueError: if the audio tokens and the audio features do not match.
        """
        # Upstream handles `return_dict` in a decorator, whose signature has no names: steps would be compiled anew.
        return_dict = kwargs.pop("return_dict", None)
        encoder_outputs = {"audio": None, **(mm_encoder_outputs or {})}
        kwargs["mm_encoder_outputs"] = encoder_outputs  # releases before 5.18 do not name this argument
        if second_per_grid_ts is not None:  # which one base alone names
            kwargs["second_per_grid_ts"] = second_per_grid_ts
        # All arguments are named, because `generate` and `Trainer` refuse or drop what this signature does not name.
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            logits_to_keep=logits_to_keep,
            input_features=input_features,
            input_features_mask=input_features_mask,
            **{CACHE: past_key_values if cache is None else cache},
            **kwargs,
            return_dict=True,
        )
        if encoder_outputs["audio"] is not None and hasattr(outputs, "audio_outputs"):  # since transformers 5.24
            outputs["audio_outputs"] = encoder_outputs["audio"]
        return outputs if (self.config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()

    def generate(self, *args, **kwargs):
        """[`GenerationMixin.generate`], which takes `cache` and `past_key_values` on all releases."""
        if CACHE != "cache" and "cache" in kwargs:
            kwargs[CACHE] = kwargs.pop("cache")
        config = kwargs.get("generation_config") or self.generation_config
        lookup = kwargs.get("prompt_lookup_num_tokens", config.prompt_lookup_num_tokens)
        drafts = kwargs.get("assistant_model") is not None or lookup
        if drafts and (cached_length(kwargs.get("cache")) or cached_length(kwargs.get("past_key_values"))):
            raise ValueError("Assisted decoding computes cached tokens again. Start it without a filled cache.")
        if lookup:
            # Drafts are copied from the prompt, and the copy of a placeholder would need a clip or a picture.
            suppressed = kwargs.get("suppress_tokens", config.suppress_tokens) or ()
            kwargs["suppress_tokens"] = [*suppressed, *self.placeholders]
        return super().generate(*args, **kwargs)

    @property
    def placeholders(self) -> tuple[int, int, int]:
        """The ids of the tokens that stand for audio, images and video."""
        return self.config.audio_token_id, self.config.image_token_id, self.config.video_token_id

    def generate_batch(self, inputs: list[list[int]], *args, **kwargs):
        """
        [`GenerationMixin.generate_batch`], continuous batching, for prompts of text.

        Raises:
            ValueError: if a prompt has tokens of audio, images or video, because this engine takes ids alone.
            ImportError: before transformers 5.24, the first release whose engine runs Qwen2-VL.
        """
        require_version("transformers>=5.24", "generate_batch needs it.")
        placeholders = set(self.placeholders)
        if refused := [index for index, ids in enumerate(inputs) if not placeholders.isdisjoint(ids)]:
            raise ValueError(
                f"generate_batch takes text alone, but prompts {refused[:10]} have tokens of audio, images or video. "
                "Use generate, or a server such as vLLM."
            )
        return super().generate_batch(inputs, *args, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        # Upstream's version keeps `rope_deltas` on the model, and this model keeps no state.
        text_positions = GenerationMixin._prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs)
        input_ids, inputs_embeds = model_kwargs.get("input_ids"), model_kwargs.get("inputs_embeds")
        if inputs_embeds is None:
            input_ids = inputs_tensor
        elif not input_ids.numel():
            input_ids = None
        cache, types = model_kwargs.get(CACHE), model_kwargs.get("mm_token_type_ids")
        past_length = cached_length(cache)
        num_new = text_positions.shape[1] - past_length
        if num_new <= 0:
            raise ValueError(
                f"The cache holds {past_length} tokens but the prompt only {text_positions.shape[1]}. Give the "
                "input_ids of the whole conversation, or the new input_ids with the attention_mask of the whole."
            )
        if past_length and input_ids is not None:
            self.model.check_cached_pictures(cache, input_ids[:, :-num_new])
        new_positions = self.model.compute_3d_position_ids(
            None if input_ids is None else input_ids[:, -num_new:],
            None if inputs_embeds is None else inputs_embeds[:, -num_new:],
            mm_token_type_ids=None if types is None else types[:, -num_new:],
            cache=cache,
            **{name: model_kwargs.get(name) for name in (*GRIDS, "attention_mask")},
        )
        positions = text_positions.expand(4, -1, -1).clone()  # text positions come first, for the attention mask
        if new_positions is not None:
            positions[1:, :, -num_new:] = new_positions
        return positions

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # `generate` calls this before it repeats the prompt for beams and returned sequences. Every clip is encoded
        # here, once, and its embeddings are repeated with its row. Upstream would repeat each window and mix up rows.
        num_new = model_kwargs["position_ids"].shape[-1] - cached_length(model_kwargs.get(CACHE))
        audio_outputs = self._encode_new_audio(input_ids, model_kwargs, expand_size, num_new)
        # Upstream counts the pictures of each row by its tokens, and `model_kwargs` has only new pictures.
        new_ids = input_ids.clone()
        new_ids[:, :-num_new] = 0
        if outputs := model_kwargs.get("mm_encoder_outputs"):  # which upstream would repeat in place
            model_kwargs["mm_encoder_outputs"] = {name: copy.copy(output) for name, output in outputs.items()}
        _, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=new_ids, **model_kwargs
        )
        if audio_outputs is not None:
            outputs = model_kwargs.get("mm_encoder_outputs") or {}
            model_kwargs["mm_encoder_outputs"] = {**outputs, "audio": audio_outputs}
        return input_ids.repeat_interleave(expand_size, dim=0), model_kwargs

    def _encode_new_audio(self, input_ids, model_kwargs: dict, expand_size: int, num_new: int):
        """Takes the audio out of `model_kwargs`; returns the outputs for the `num_new` tokens that the cache lacks."""
        audio = pop_audio(model_kwargs)
        is_audio = self.model.find_audio(input_ids, model_kwargs.get("inputs_embeds"))
        is_new = is_audio[:, -num_new:]
        if audio is None:
            if model_kwargs.get("inputs_embeds") is None:
                self.model.check_audio(is_new, torch.tensor(0))
            return None

        rows = self.model.count_rows(audio)
        # The audio is that of the whole conversation or that of its new turn, whichever has as many tokens.
        is_covered = is_audio if int(is_audio.sum()) == int(rows.sum()) else is_new
        self.model.check_audio(is_covered, rows)
        tokens = is_new.sum(1).tolist()
        if not any(tokens):
            return None
        is_needed = torch.arange(-is_covered.shape[1], 0, device=is_covered.device) >= -is_new.shape[1]
        is_needed = is_needed.expand_as(is_covered)[is_covered]  # one value for each embedding: its token is not cached
        if audio.outputs is not None:
            embeddings = audio.outputs.pooler_output
            embeddings = embeddings.flatten(0, -2)[is_needed.to(embeddings.device)]
        else:
            features, mask = self.model.separate_windows(audio.features, audio.mask)
            if not is_needed.all():
                is_kept = torch.ones_like(features[:, 0]).bool() if mask is None else mask
                is_kept = is_kept[:, ::ENCODER_STRIDE].clone()
                is_kept[is_kept.clone()] = is_needed.to(is_kept.device)
                mask = is_kept.repeat_interleave(ENCODER_STRIDE, dim=1)
            embeddings = self.model.get_audio_features(features, mask, return_dict=True).pooler_output.flatten(0, -2)
        repeated = [row for row in embeddings.split(tokens) for _ in range(expand_size)]
        return BaseModelOutputWithPooling(pooler_output=torch.cat(repeated)[None])

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        cache = kwargs.get(CACHE)
        if not is_first_iteration and cache is not None and not cache.is_compileable:
            # `generate` announces the prefill of an assistant model as a later step, without images and audio.
            is_first_iteration = cache.get_seq_length() == 0
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs.pop("mm_encoder_outputs", None)  # releases before 5.18 keep it after the prefill
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )


def match_weight(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns `tensor` in the dtype and on the device of `weight`. accelerate moves it where weights are offloaded."""
    dtype = weight.dtype if weight.is_floating_point() else tensor.dtype
    return tensor.to(dtype) if weight.is_meta else tensor.to(weight.device, dtype)


def pop_audio(kwargs: dict) -> AudioInputs | None:
    """Removes the audio from `kwargs` and returns it, None if there is none."""
    encoder_outputs = dict(kwargs.pop("mm_encoder_outputs", None) or {})
    audio = AudioInputs(
        kwargs.pop("input_features", None), kwargs.pop("input_features_mask", None), encoder_outputs.pop("audio", None)
    )
    if audio.features is not None and audio.outputs is not None:
        raise ValueError("Give either input_features or mm_encoder_outputs['audio'], not both.")
    if audio.features is None and audio.mask is not None:
        raise ValueError("Give input_features_mask only together with the input_features that it belongs to.")
    if any(outputs is not None for outputs in encoder_outputs.values()):
        require_version("transformers>=5.18", "mm_encoder_outputs of images and videos needs it.")
    if encoder_outputs:
        kwargs["mm_encoder_outputs"] = encoder_outputs  # releases before 5.18 do not name this argument
    return audio if audio.features is not None or audio.outputs is not None else None


def is_traced() -> bool:
    """Tells whether this call is traced to a graph. A graph cannot read values of tensors, and checks on the device."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


@contextlib.contextmanager
def call_ids(input_ids: torch.Tensor | None):
    """Keeps ids for [`AudioBackbone.get_placeholder_mask`] while a backbone runs."""
    token = CALL_IDS.set(input_ids)
    try:
        yield
    finally:
        CALL_IDS.reset(token)


class Qwen2AudioVLModel(AudioBackbone, Qwen2VLModel):
    config: Qwen2AudioVLConfig


class Qwen2_5AudioVLModel(AudioBackbone, Qwen2_5_VLModel):
    config: Qwen2_5AudioVLConfig


class Qwen3AudioVLModel(AudioBackbone, Qwen3VLModel):
    config: Qwen3AudioVLConfig
    takes_ids_beside_embeddings = False


# Without GenerationMixin among its own bases, transformers makes a new class of remote code at every loading.
class Qwen2AudioVLForConditionalGeneration(AudioHead, Qwen2VLForConditionalGeneration, GenerationMixin):
    config: Qwen2AudioVLConfig
    backbone_class = Qwen2AudioVLModel


class Qwen2_5AudioVLForConditionalGeneration(AudioHead, Qwen2_5_VLForConditionalGeneration, GenerationMixin):
    config: Qwen2_5AudioVLConfig
    backbone_class = Qwen2_5AudioVLModel


class Qwen3AudioVLForConditionalGeneration(AudioHead, Qwen3VLForConditionalGeneration, GenerationMixin):
    config: Qwen3AudioVLConfig
    backbone_class = Qwen3AudioVLModel


Qwen2AudioVLForConditionalGeneration.register_for_auto_class("AutoModel")
Qwen2_5AudioVLForConditionalGeneration.register_for_auto_class("AutoModel")
Qwen3AudioVLForConditionalGeneration.register_for_auto_class("AutoModel")
