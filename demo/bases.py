"""
Writes base checkpoints with random weights in the published layouts: small ones with the real Qwen2-VL tokenizer, for
tests and benchmarks, and those from which the demo checkpoint is trained, with a tokenizer of its own.
"""

import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from demo.clips import BUILD, WINDOW
from demo.world import PHRASES, QUESTIONS, SKILLS, WORLD
from evaluation.generate import load
from publishing.build import build
from publishing.paths import ROOT, write_json


ASSETS = ROOT / "assets"
PICTURE_TOKENS = 16
STD = 0.08  # of the first weights; with the usual 0.02 so small a model hardly starts to learn


class Small(NamedTuple):
    """What a small checkpoint of a base has of its own."""

    vision: dict  # settings of the vision tower that other bases lack
    text: dict | None = None
    rope: dict | None = None
    more_tokens: int = 0  # how many tokens after those of Qwen2-VL its tokenizer has, in the order of Qwen3-VL's
    processors: str = "qwen2-vl-7b"  # the folder of the settings of its processors
    files: tuple[str, ...] = ("preprocessor_config.json",)  # of these settings
    picture: int = 112  # pixels a side, which become PICTURE_TOKENS
    demo: dict | None = None  # settings of the vision tower with which a demo checkpoint has at most 6 MB


SMALL = {
    "qwen2_vl": Small({}),
    "qwen2_5_vl": Small({"fullatt_block_indexes": [1], "tokens_per_second": 2}, more_tokens=8),
    "qwen3_vl": Small(
        {"deepstack_visual_indexes": [0, 1]},
        text={"head_dim": 32},
        rope={"mrope_section": [6, 5, 5], "mrope_interleaved": True},
        more_tokens=12,
        processors="qwen3-vl-4b",
        files=("preprocessor_config.json", "video_preprocessor_config.json"),
        picture=128,
        demo={"depth": 3, "deepstack_visual_indexes": [1], "num_position_embeddings": 64},
    ),
}


def small_config(base_type: str, text: dict, width: int, ffn: int, layers: int, heads: int, **settings):
    """Returns the configuration of a small base; the sizes are those of the vision tower, whose output is as wide."""
    small, vision = SMALL[base_type], {"depth": layers, "num_heads": heads, "hidden_size": width}
    if base_type == "qwen2_vl":
        vision |= {"embed_dim": width, "mlp_ratio": ffn // width}
    else:
        vision |= {"out_hidden_size": width, "intermediate_size": ffn}
    text = {**text, **(small.text or {}), "rope_parameters": {**text["rope_parameters"], **(small.rope or {})}}
    vision |= small.vision
    return transformers.AutoConfig.for_model(base_type, text_config=text, vision_config=vision, **settings)


def sharpen(model: torch.nn.Module, std: float) -> torch.nn.Module:
    """Random weights of the usual 0.02 hardly react to their input; these do, so that tests can tell inputs apart."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def text_config(width: int, ffn: int, layers: int, heads: int, groups: int, positions: int, words: int, rope_theta):
    """Returns the settings of a small language model; `groups` is its number of key and value heads."""
    return {
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": positions,
        "vocab_size": words,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, "mrope_section": [4, 6, 6]},
    }


def make_base(
    folder: Path,
    base_type: str = "qwen2_vl",
    dtype: torch.dtype = torch.float32,
    tie_word_embeddings: bool = False,
) -> Path:
    """Writes a checkpoint of a base with few layers; its tokenizer and its embeddings are of full size."""
    torch.manual_seed(0)
    text = text_config(64, 128, layers=2, heads=2, groups=1, positions=32768, words=152064, rope_theta=1e6)
    config = small_config(
        base_type, text, width=64, ffn=256, layers=2, heads=2, tie_word_embeddings=tie_word_embeddings
    )
    model = sharpen(transformers.AutoModelForImageTextToText.from_config(config), std=0.1)
    model.to(dtype).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(ASSETS / "qwen2-vl-7b" / file, folder / file)
    write_image_processors(folder, base_type)
    if SMALL[base_type].more_tokens:
        published = json.loads((ASSETS / "qwen3-vl-4b" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        first = len(tokenizer)
        for token_id in range(first, first + SMALL[base_type].more_tokens):
            tokenizer.add_tokens([transformers.AddedToken(**published[str(token_id)])])
        tokenizer.save_pretrained(folder)
    return folder


def small_whisper(window_seconds: int, width: int, heads: int, ffn: int, layers: dict[str, int], **settings):
    """Returns a Whisper model with random weights; `layers` has the numbers for "encoder" and "decoder"."""
    sizes = {"d_model": width, "num_mel_bins": 128, "max_source_positions": 50 * window_seconds, "vocab_size": 64}
    for half, number in layers.items():
        sizes |= {f"{half}_layers": number, f"{half}_attention_heads": heads, f"{half}_ffn_dim": ffn}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes, **ids, **settings))


def make_whisper(folder: Path, window_seconds: int = 30, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a Whisper checkpoint of 2 layers; windows shorter than Whisper's own 30 s make for short prompts."""
    torch.manual_seed(1)
    model = small_whisper(window_seconds, width=64, heads=2, ffn=128, layers={"encoder": 2, "decoder": 2})
    sharpen(model, std=0.2).to(dtype).save_pretrained(folder)
    write_feature_extractor(folder, window_seconds)
    return folder


def write_feature_extractor(folder: Path, window_seconds: int):
    """Writes Whisper's own, with windows of another length."""
    transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=window_seconds).save_pretrained(folder)


def write_image_processors(folder: Path, base_type: str = "qwen2_vl", pixels: tuple[int, int] | None = None):
    """Writes the base's own, with other bounds of pixels; Qwen3-VL's own would make long prompts of small pictures."""
    small = SMALL[base_type]
    for file in small.files:
        settings = json.loads((ASSETS / small.processors / file).read_text())
        if "size" not in settings:
            settings |= {"min_pixels": pixels[0], "max_pixels": pixels[1]} if pixels else {}
        elif file == "preprocessor_config.json":  # that of video bounds the pixels of all frames together
            shortest, longest = pixels or (56**2, 4096**2)
            settings["size"] = {"shortest_edge": shortest, "longest_edge": longest}
        write_json(folder / file, settings)


def make_bases(folder: Path, base_type: str = "qwen2_vl") -> tuple[Path, Path]:
    """Writes checkpoints of a base and of Whisper of the demo's size."""
    corpus = [skill["instruction"] for skill in SKILLS.values()] + PHRASES + QUESTIONS
    corpus += [word for words in WORLD["words"].values() for word in words] + ["yes", "no"]
    corpus += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    full = transformers.AutoTokenizer.from_pretrained(ASSETS / "qwen2-vl-7b")
    tokenizer = full.train_new_from_iterator(corpus * 10, vocab_size=440)
    base, encoder = folder / "base", folder / "whisper"
    tokenizer.save_pretrained(base)

    def token_id(name: str) -> int:
        return tokenizer.convert_tokens_to_ids(f"<|{name}|>")

    torch.manual_seed(0)
    words = 64 * math.ceil((len(tokenizer) + 3) / 64)
    sizes = text_config(128, 384, layers=4, heads=4, groups=2, positions=4096, words=words, rope_theta=10_000.0)
    ends = {"bos_token_id": token_id("endoftext"), "eos_token_id": token_id("im_end")}
    config = small_config(
        base_type,
        {**sizes, **ends, "initializer_range": STD},
        **{"width": 128, "ffn": 256, "layers": 4, "heads": 4},
        tie_word_embeddings=False,
        initializer_range=STD,
        **{f"{name}_token_id": token_id(f"{name}_pad") for name in ("image", "video")},
        **{f"vision_{name}_token_id": token_id(f"vision_{name}") for name in ("start", "end")},
    )
    config.vision_config.update(SMALL[base_type].demo or {})
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(base)
    end, pad = ends["eos_token_id"], ends["bos_token_id"]
    generation = {"eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": False}
    write_json(base / "generation_config.json", generation)
    write_image_processors(base, base_type, (SMALL[base_type].picture ** 2,) * 2)

    whisper = small_whisper(WINDOW, width=128, heads=4, ffn=512, layers={"encoder": 3, "decoder": 1}, init_std=STD)
    whisper.save_pretrained(encoder)
    write_feature_extractor(encoder, WINDOW)
    return base, encoder


def load_untrained(base_type: str = "qwen2_vl"):
    """Loads `(processor, model)` in float32; builds the folder at the first call."""
    repo = BUILD / base_type / "untrained"
    if not repo.exists():
        build(*make_bases(BUILD / base_type, base_type), repo)
    return load(repo, torch.float32)
