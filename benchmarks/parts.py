"""This model with random weights, and the parts that it is made of on the very same weights."""

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from configuration_qwen2_audio_vl import ENCODER_STRIDE
from publishing.paths import ROOT


PICTURE = 28  # patches a side of a picture of 384 x 384, which are 14 x 14 tokens
DROPPED = 146_000  # words of the vocabulary that a small model does without
SPECIAL_TOKEN_IDS = (
    *("audio_token_id", "audio_bos_token_id", "audio_eos_token_id", "image_token_id", "video_token_id"),
    *("vision_start_token_id", "vision_end_token_id"),
)


def full_config():
    """The configuration of this repository: Qwen2-VL-7B-Instruct with the encoder of whisper-large-v3-turbo."""
    return AutoConfig.from_pretrained(ROOT, trust_remote_code=True)


def small_config(window_tokens: int = 1500, layers: int = 8):
    """
    A small model at the proportions of the full size: encoder and head have a tenth of the language model's parameters.

    Args:
        window_tokens (`int`): Audio tokens of a window, 50 for each second.
        layers (`int`): Of the language model; the encoder has about half as many.
    """
    config = full_config()
    config.text_config.update(
        {
            "hidden_size": 512,
            "intermediate_size": 2688,
            "num_hidden_layers": layers,
            "layer_types": config.text_config.layer_types[:layers],
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "vocab_size": config.text_config.vocab_size - DROPPED,
            "bos_token_id": config.text_config.bos_token_id - DROPPED,
            "eos_token_id": config.text_config.eos_token_id - DROPPED,
        }
    )
    config.audio_config.update(
        {
            "d_model": 256,
            "encoder_layers": 1 + layers // 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 1024,
            "max_source_positions": window_tokens,
        }
    )
    config.vision_config.update({"depth": 1, "embed_dim": 64, "num_heads": 2, "hidden_size": 512})
    for name in SPECIAL_TOKEN_IDS:
        setattr(config, name, getattr(config, name) - DROPPED)
    return config


def make_model(config, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModel.from_config(config, trust_remote_code=True, dtype=dtype).eval()


class Parts:
    """Stock Qwen2-VL, stock Whisper encoder and a matrix, which hold the tensors of a model of ours."""

    def __init__(self, model: PreTrainedModel):
        config = Qwen2VLConfig(
            text_config=model.config.text_config.to_dict(), vision_config=model.config.vision_config.to_dict()
        )
        with torch.device("meta"):
            self.qwen = Qwen2VLForConditionalGeneration._from_config(config, dtype=model.dtype).eval()
        self.qwen.model.visual, self.qwen.model.language_model = model.model.visual, model.model.language_model
        self.qwen.lm_head = model.lm_head
        self.encoder, self.projector = model.model.audio_encoder, model.model.audio_projector

    def embed_audio(self, input_features: torch.Tensor) -> torch.Tensor:
        """`(windows, mel bins, frames)` -> `(windows, tokens, hidden size)`."""
        return self.encoder(input_features).last_hidden_state @ self.projector.weight.T


def make_prompt(
    model: PreTrainedModel,
    clips: int = 1,
    windows: int = 1,
    text: int = 64,
    batch: int = 1,
    audio_tokens: int | None = None,
    pictures: int = 0,
) -> tuple:
    """
    Args:
        clips (`int`): Clips of each row, of `windows` windows each, every clip followed by `text` tokens of text.
        audio_tokens (`int`, *optional*): Of each clip; the default is those of whole windows.
        pictures (`int`): Grey pictures before each clip, of `PICTURE` patches a side.

    Returns:
        What the processor would give for random noise and random text, and for random text alone of as many tokens.
    """
    config, device = model.config, model.device
    audio = config.audio_config
    generator = torch.Generator().manual_seed(0)
    is_trimmed = audio_tokens is not None
    if not is_trimmed:
        audio_tokens = windows * audio.max_source_positions
    image_tokens = [config.image_token_id] * (PICTURE // config.vision_config.spatial_merge_size) ** 2
    clip = torch.tensor(
        [
            *[config.vision_start_token_id, *image_tokens, config.vision_end_token_id] * pictures,
            *[config.audio_bos_token_id, *[config.audio_token_id] * audio_tokens, config.audio_eos_token_id],
        ]
    )
    words = torch.randint(0, 5_000, (batch, clips, len(clip) + text), generator=generator)
    ids = words.clone()
    ids[:, :, : len(clip)] = clip
    features = torch.randn(
        batch * clips * windows, audio.num_mel_bins, 2 * audio.max_source_positions, generator=generator
    )
    ids, words = ids.flatten(1), words.flatten(1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int() + 3 * (ids == config.audio_token_id),
        "input_features": features.to(model.dtype),
    }
    if is_trimmed:
        frames = torch.arange(windows * features.shape[-1]) < ENCODER_STRIDE * audio_tokens
        inputs["input_features_mask"] = frames.long().view(windows, -1).repeat(batch * clips, 1)
    if pictures:
        vision, count = config.vision_config, batch * clips * pictures
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        inputs["image_grid_thw"] = torch.tensor([[1, PICTURE, PICTURE]] * count)
        inputs["pixel_values"] = torch.zeros(count * PICTURE**2, width, dtype=model.dtype)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    return inputs, {"input_ids": words.to(device), "attention_mask": inputs["attention_mask"]}
