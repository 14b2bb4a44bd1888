"""Models to measure: this model with random weights, the parts that it is made of on the same weights."""

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from configuration_qwen2_audio_vl import AUDIO_TOKEN_IDS, ENCODER_STRIDE, FAMILIES, VISION_TOKEN_IDS
from publishing.paths import ROOT, family_class


TEXT = 64  # tokens beside a clip
PICTURE = 28  # patches a side of a picture of 384 x 384, which are 14 x 14 tokens
DROPPED = 146_000  # words of the vocabulary that a small model does without


def full_config(model_type: str = "qwen2_audio_vl"):
    """
    Returns a configuration with the encoder of whisper-large-v3-turbo: that of this repository, with
    Qwen2-VL-7B-Instruct, or the defaults of another type.
    """
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    return config if config.model_type == model_type else family_class(model_type, "AutoConfig")()


def small_config(window_tokens: int = 1500, layers: int = 8, model_type: str = "qwen2_audio_vl"):
    """
    Returns a small model at the proportions of the full size: encoder and head have a tenth of the parameters of the
    language model, and the encoder has about half of its `layers`. A window has 50 audio tokens for each second.
    """
    config = full_config(model_type)
    text = {"hidden_size": 512, "intermediate_size": 2688, "num_attention_heads": 4, "num_key_value_heads": 1}
    text |= {"num_hidden_layers": layers}
    if layer_types := getattr(config.text_config, "layer_types", None):
        text["layer_types"] = layer_types[:layers]
    audio = {"d_model": 256, "encoder_attention_heads": 4, "encoder_ffn_dim": 1024}
    audio |= {"encoder_layers": 1 + layers // 2, "max_source_positions": window_tokens}
    config.text_config.update(text)
    config.audio_config.update(audio)
    vision = {"depth": 1, "embed_dim": 64, "num_heads": 2, "hidden_size": 512}
    if hasattr(config.vision_config, "out_hidden_size"):
        vision = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": 512}
        indexes = {"fullatt_block_indexes", "deepstack_visual_indexes"} & config.vision_config.to_dict().keys()
        vision |= {name: [0] for name in indexes}
    config.vision_config.update(vision)
    for name in ("vocab_size", "bos_token_id", "eos_token_id"):
        if (value := getattr(config.text_config, name, None)) is not None:
            setattr(config.text_config, name, value - DROPPED)
    for name in (*AUDIO_TOKEN_IDS, *VISION_TOKEN_IDS):
        setattr(config, name, getattr(config, name) - DROPPED)
    return config


def make_model(config, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        model_class = family_class(config.model_type, "AutoModel")
        return model_class._from_config(config, dtype=dtype).eval()


def count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def prefill(model: PreTrainedModel, **inputs):
    """Computes the logits and the cache that follow a prompt."""
    return model(**inputs, use_cache=True, logits_to_keep=1)


class Parts:
    """A stock base, a stock Whisper encoder and a matrix, which hold the tensors of a model of ours."""

    def __init__(self, model: PreTrainedModel):
        text, vision = model.config.text_config.to_dict(), model.config.vision_config.to_dict()
        base_type = FAMILIES[model.config.model_type].base_type
        config = AutoConfig.for_model(base_type, text_config=text, vision_config=vision)
        with torch.device("meta"):
            self.qwen = AutoModelForImageTextToText.from_config(config, dtype=model.dtype).eval()
        self.qwen.model.visual, self.qwen.model.language_model = model.model.visual, model.model.language_model
        self.qwen.lm_head = model.lm_head
        self.encoder, self.projector = model.model.audio_encoder, model.model.audio_projector

    def embed_audio(self, input_features: torch.Tensor) -> torch.Tensor:
        """`(windows, mel bins, frames)` -> `(windows, tokens, hidden size)`."""
        return self.encoder(input_features).last_hidden_state @ self.projector.weight.T

    @torch.no_grad()
    def prefill(self, input_features: torch.Tensor, **text_inputs):
        """Encodes the audio, and prefills the stock base with a prompt of text."""
        self.embed_audio(input_features)
        return prefill(self.qwen, **text_inputs)

    @torch.no_grad()
    def generate(self, input_features: torch.Tensor, **text_inputs) -> torch.Tensor:
        """Encodes the audio, and answers a prompt of text by the stock base."""
        self.embed_audio(input_features)
        return self.qwen.generate(**text_inputs)


def make_prompt(
    model: PreTrainedModel,
    clips: int = 1,
    windows: int = 1,
    batch: int = 1,
    audio_tokens: int | None = None,
    pictures: int = 0,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    Returns the inputs that a processor would make of random noise and random text, and inputs of the parts: the same
    features, and random text of as many tokens.

    Args:
        clips: Clips in each row, of `windows` windows each; `TEXT` tokens of text follow each clip.
        audio_tokens: Trimmed tokens of each clip. The default is fixed tokens, those of whole windows.
        pictures: Grey pictures before each clip, of `PICTURE` patches a side.
    """
    config, audio, vision = model.config, model.config.audio_config, model.config.vision_config
    generator = torch.Generator().manual_seed(0)
    frames = 2 * audio.max_source_positions  # of a window
    picture = [config.image_token_id] * (PICTURE // vision.spatial_merge_size) ** 2
    clip = [config.audio_token_id] * (audio_tokens or windows * audio.max_source_positions)
    media = [config.vision_start_token_id, *picture, config.vision_end_token_id] * pictures
    media += [config.audio_bos_token_id, *clip, config.audio_eos_token_id]
    words = torch.randint(0, 5_000, (batch, clips, len(media) + TEXT), generator=generator)
    ids = words.clone()
    ids[:, :, : len(media)] = torch.tensor(media)
    ids, words = ids.flatten(1), words.flatten(1)
    features = torch.randn(batch * clips * windows, audio.num_mel_bins, frames, generator=generator)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int() + 3 * (ids == config.audio_token_id),
        "input_features": features.to(model.dtype),
    }
    if audio_tokens is not None:
        mask = torch.arange(windows * frames) < ENCODER_STRIDE * audio_tokens
        inputs["input_features_mask"] = mask.long().view(windows, -1).repeat(batch * clips, 1)
    if pictures:
        count, width = batch * clips * pictures, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        inputs["image_grid_thw"] = torch.tensor([[1, PICTURE, PICTURE]] * count)
        inputs["pixel_values"] = torch.zeros(count * PICTURE**2, width, dtype=model.dtype)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    shared = {name: inputs[name] for name in ("attention_mask", "input_features")}
    return inputs, {"input_ids": words.to(model.device), **shared}
