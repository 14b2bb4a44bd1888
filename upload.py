"""Base weights -> repository folder: `upload.py build --base DIR_OR_ID --audio-encoder DIR_OR_ID --output DIR`."""

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module


HERE = Path(__file__).resolve().parent
CODE_FILES = (
    "configuration_qwen2_audio_vl.py",
    "modeling_qwen2_audio_vl.py",
    "processing_qwen2_audio_vl.py",
    "audio_utils.py",
)
SHIPPED_FILES = ("README.md", "LICENSE", "requirements.txt", ".gitattributes")
AUDIO_TOKENS = ("<|audio_pad|>", "<|audio_bos|>", "<|audio_eos|>")  # in the order of their ids
MARKER_TEACHERS = {"<|audio_bos|>": "<|vision_start|>", "<|audio_eos|>": "<|vision_end|>"}
EMBEDDINGS = "model.language_model.embed_tokens.weight"
PROJECTOR = "model.audio_projector.weight"
MAX_SHARD_SIZE = "2GB"  # also what a build holds in memory

# Published checkpoints name their tensors as the class of their day did; the current names pass unchanged.
BASE_NAMES = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "model.language_model."),
)
# Of Whisper only the encoder is heard.
ENCODER_NAMES = ((r"^(?:model\.)?encoder\.", "model.audio_encoder."),)


def resolve(source: str) -> Path:
    """A local directory as it is; a Hub id downloaded, without the formats and copies that are not read."""
    if Path(source).is_dir():
        return Path(source)
    patterns = {"allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.jinja"], "ignore_patterns": ["*fp32*"]}
    return Path(snapshot_download(source, **patterns))


def tensor_files(folder: Path) -> dict[str, Path]:
    """The name of every tensor of a checkpoint, and the safetensors file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json.")
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def build_config(base: Path, encoder: Path, tokenizer):
    """Joins the two configurations; contradictions between them are errors."""
    base_config = AutoConfig.from_pretrained(base)
    if base_config.model_type != "qwen2_vl":
        raise ValueError(f"{base} holds a {base_config.model_type} model; --base has to be a Qwen2-VL checkpoint.")
    whisper = WhisperConfig.from_pretrained(encoder)
    audio_token_id, audio_bos_token_id, audio_eos_token_id = tokenizer.convert_tokens_to_ids(list(AUDIO_TOKENS))
    config_class = get_class_from_dynamic_module("configuration_qwen2_audio_vl.Qwen2AudioVLConfig", HERE)
    return config_class(
        text_config=base_config.text_config.to_dict(),
        vision_config=base_config.vision_config.to_dict(),
        audio_config={
            name: getattr(whisper, name)
            for name in (
                *("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "encoder_layerdrop"),
                *("num_mel_bins", "max_source_positions", "activation_function", "scale_embedding"),
                *("dropout", "attention_dropout", "activation_dropout", "init_std"),
            )
        },
        **{
            name: getattr(base_config, name)
            for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        },
        audio_token_id=audio_token_id,
        audio_bos_token_id=audio_bos_token_id,
        audio_eos_token_id=audio_eos_token_id,
        tie_word_embeddings=base_config.tie_word_embeddings,
        dtype=base_config.dtype or torch.float32,
        architectures=["Qwen2AudioVLForConditionalGeneration"],
    )


def build_processor(base: Path, encoder: Path, tokenizer, config):
    processor_class = get_class_from_dynamic_module("processing_qwen2_audio_vl.Qwen2AudioVLProcessor", HERE)
    processor = processor_class(
        image_processor=AutoImageProcessor.from_pretrained(base),
        tokenizer=tokenizer,
        video_processor=AutoVideoProcessor.from_pretrained(base),
        feature_extractor=WhisperFeatureExtractor.from_pretrained(encoder),
        chat_template=(HERE / "chat_template.jinja").read_text(encoding="utf-8"),
    )
    processor.check_config(config.to_dict())
    return processor


def build_tokenizer(base: Path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    added = [AddedToken(token, special=True, normalized=False) for token in AUDIO_TOKENS]
    tokenizer.add_special_tokens({"extra_special_tokens": added}, replace_extra_special_tokens=False)
    tokenizer.padding_side = "left"  # generation continues the right end of every row
    tokenizer.chat_template = None  # Qwen2-VL's own drops audio silently; the processor's is the one
    return tokenizer


def plan_tensors(base: Path, encoder: Path, config) -> dict[str, tuple[Path, str]]:
    """Where each tensor of the result comes from: its name in the model -> file and name there."""
    plan = {}
    for folder, rules in ((base, BASE_NAMES), (encoder, ENCODER_NAMES)):
        for source_name, path in tensor_files(folder).items():
            name = rename(source_name, rules)
            if folder == encoder and not name.startswith("model.audio_encoder."):
                continue  # Whisper's decoder
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            plan[name] = (path, source_name)
    return plan


def meta_state_dict(config) -> dict[str, torch.Tensor]:
    """The model's own tensors, on the meta device: names, shapes and dtypes without memory."""
    model_class = get_class_from_dynamic_module("modeling_qwen2_audio_vl.Qwen2AudioVLForConditionalGeneration", HERE)
    with torch.device("meta"):
        tensors = model_class(config).to(config.dtype).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def check_plan(plan: dict[str, tuple[Path, str]], expected: dict[str, torch.Tensor]):
    """Compares the plan with the model before a byte is written, by the headers of the files alone."""
    problems = [f"missing: {name}" for name in expected if name not in plan and name != PROJECTOR]
    problems += [f"unexpected: {name} (from {plan[name][1]})" for name in plan if name not in expected]
    for path in {path for path, _ in plan.values()}:
        with safe_open(path, framework="pt") as file:
            for name, (source, source_name) in plan.items():
                if source == path and name in expected:
                    shape = tuple(file.get_slice(source_name).get_shape())
                    if shape != tuple(expected[name].shape):
                        problems.append(f"misshapen: {name} is {shape}, the model's is {tuple(expected[name].shape)}")
    if problems:
        raise ValueError("The checkpoints do not make this model:\n" + "\n".join(sorted(problems)))


def read_tensor(name: str, plan: dict[str, tuple[Path, str]], config, tokenizer, seed: int) -> torch.Tensor:
    """One tensor of the result, in the model's dtype."""
    if name == PROJECTOR:
        projector = torch.empty(config.text_config.hidden_size, config.audio_config.d_model)
        generator = torch.Generator().manual_seed(seed)
        return projector.normal_(std=config.text_config.initializer_range, generator=generator).to(config.dtype)
    path, source_name = plan[name]
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor(source_name).to(config.dtype)
    if name == EMBEDDINGS:
        for marker, teacher in MARKER_TEACHERS.items():
            marker_id, teacher_id = tokenizer.convert_tokens_to_ids([marker, teacher])
            tensor[marker_id] = tensor[teacher_id]
    return tensor


def build(base: str, audio_encoder: str, output: str, seed: int = 0) -> Path:
    """
    Assembles a repository folder that loads with the Auto classes.

    Args:
        base: Qwen2-VL checkpoint, a directory or a Hub id, with tensor names as published or as transformers has now.
        audio_encoder: Whisper checkpoint, a directory or a Hub id.
        output: The folder to make; it must not exist, or be empty.
        seed: Of the projector, which starts as a normal with the base's `initializer_range`.

    Raises:
        ValueError: if the parts do not fit each other, before anything is written.
    """
    target = Path(output)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; name a new folder for --output.")
    base_folder, encoder_folder = resolve(base), resolve(audio_encoder)

    tokenizer = build_tokenizer(base_folder)
    config = build_config(base_folder, encoder_folder, tokenizer)
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    processor = build_processor(base_folder, encoder_folder, tokenizer, config)
    plan, expected = plan_tensors(base_folder, encoder_folder, config), meta_state_dict(config)
    check_plan(plan, expected)

    target.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(target)
    processor.save_pretrained(target)
    generation = base_folder if (base_folder / "generation_config.json").is_file() else HERE
    GenerationConfig.from_pretrained(generation).save_pretrained(target)
    for name in (*CODE_FILES, *SHIPPED_FILES):
        shutil.copyfile(HERE / name, target / name)

    split = split_torch_state_dict_into_shards(expected, max_shard_size=MAX_SHARD_SIZE)
    for file, names in tqdm(split.filename_to_tensors.items(), desc="weights", unit="file"):
        tensors = {name: read_tensor(name, plan, config, tokenizer, seed) for name in names}
        save_file(tensors, target / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return target


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="base weights -> repository folder")
    command.add_argument("--base", required=True, metavar="DIR_OR_ID", help="Qwen2-VL checkpoint")
    command.add_argument("--audio-encoder", required=True, metavar="DIR_OR_ID", help="Whisper checkpoint")
    command.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    command.add_argument("--seed", type=int, default=0, help="of the untrained projector (default: 0)")
    options = parser.parse_args(arguments)
    try:
        folder = build(options.base, options.audio_encoder, options.output, options.seed)
    except ValueError as error:
        parser.exit(1, f"upload.py {options.command}: {error}\n")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder} is ready: {size / 1e9:.2f} GB. Its projector is random: train it before you ask it about sound.")


if __name__ == "__main__":
    main()
