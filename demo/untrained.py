"""The demo checkpoint before its training: sizes, a tokenizer of its own, random weights."""

import math
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from demo.bases import ASSETS, small_whisper, text_config, write_feature_extractor, write_image_processor
from demo.clips import BUILD, WINDOW
from demo.world import PHRASES, QUESTIONS, SKILLS, WORLD
from evaluation.generate import load
from publishing.build import build
from publishing.paths import write_json


PICTURE = 112  # pixels a side, which become 16 tokens
STD = 0.08  # of the first weights; with the usual 0.02 so small a model hardly starts to learn


def make_bases(folder: Path) -> tuple[Path, Path]:
    """Writes a Qwen2-VL and a Whisper checkpoint of the demo's size."""
    corpus = [skill["instruction"] for skill in SKILLS.values()] + PHRASES + QUESTIONS
    corpus += [word for words in WORLD["words"].values() for word in words] + ["yes", "no"]
    corpus += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    full = AutoTokenizer.from_pretrained(ASSETS / "qwen2-vl-7b")
    tokenizer = full.train_new_from_iterator(corpus * 10, vocab_size=440)
    base, encoder = folder / "qwen2-vl", folder / "whisper"
    tokenizer.save_pretrained(base)

    def token_id(name: str) -> int:
        return tokenizer.convert_tokens_to_ids(f"<|{name}|>")

    torch.manual_seed(0)
    words = 64 * math.ceil((len(tokenizer) + 3) / 64)
    sizes = text_config(128, 384, layers=4, heads=4, groups=2, positions=4096, words=words, rope_theta=10_000.0)
    ends = {"bos_token_id": token_id("endoftext"), "eos_token_id": token_id("im_end")}
    config = Qwen2VLConfig(
        text_config={**sizes, **ends, "initializer_range": STD},
        vision_config={"depth": 4, "embed_dim": 128, "num_heads": 4, "hidden_size": 128, "mlp_ratio": 2},
        tie_word_embeddings=False,
        initializer_range=STD,
        **{f"{name}_token_id": token_id(f"{name}_pad") for name in ("image", "video")},
        **{f"vision_{name}_token_id": token_id(f"vision_{name}") for name in ("start", "end")},
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(base)
    end, pad = ends["eos_token_id"], ends["bos_token_id"]
    generation = {"eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": False}
    write_json(base / "generation_config.json", generation)
    write_image_processor(base, PICTURE**2, PICTURE**2)

    whisper = small_whisper(WINDOW, width=128, heads=4, ffn=512, layers={"encoder": 3, "decoder": 1}, init_std=STD)
    whisper.save_pretrained(encoder)
    write_feature_extractor(encoder, WINDOW)
    return base, encoder


def load_untrained():
    """Loads `(processor, model)` in float32; builds the folder at the first call."""
    repo = BUILD / "untrained"
    if not repo.exists():
        build(*make_bases(BUILD), repo)
    return load(repo, torch.float32)
