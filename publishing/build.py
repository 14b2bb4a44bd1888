"""Base weights, or a trained model, -> a repository folder that loads with the Auto classes."""

import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import torch
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    GenerationConfig,
    PreTrainedConfig,
    ProcessorMixin,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from configuration_qwen2_audio_vl import EXAMPLES, SHIPPED_FILES, check_audio_tokens, require_files
from publishing.card import make_card
from publishing.checkpoints import (
    DTYPES,
    EMBEDDINGS,
    PROJECTOR,
    StoredTensor,
    find_problems,
    plan_tensors,
    read_audio_tokens,
    read_bytes,
    read_projector,
    stored_tensors,
    write_weights,
)
from publishing.paths import ROOT, Origin, is_inside, own_class, remove_abandoned, resolve, write_checksums


# For files that a base lacks; transformers has defaults for some, which fit no checkpoint.
COPY = "copy what the published checkpoint has"
ADAPTER_CONFIG = "adapter_config.json"  # of peft
AUDIO_TOKENS = ("<|audio_pad|>", "<|audio_bos|>", "<|audio_eos|>")  # in the order of their ids
MARKER_INIT = {"<|audio_bos|>": "<|vision_start|>", "<|audio_eos|>": "<|vision_end|>"}  # start from these embeddings


def build_config(base: Path, encoder: Path, tokenizer):
    """Joins the two configurations; contradictions between them are errors."""
    for folder in (base, encoder):
        require_files(folder, ("config.json",), COPY)
    base_config = AutoConfig.from_pretrained(base)
    if base_config.model_type != "qwen2_vl":
        raise ValueError(f"{base} holds a {base_config.model_type} model; --base has to be a Qwen2-VL checkpoint.")
    whisper = WhisperConfig.from_pretrained(encoder)
    audio_token_id, audio_bos_token_id, audio_eos_token_id = tokenizer.convert_tokens_to_ids(list(AUDIO_TOKENS))
    config_class = own_class("configuration_qwen2_audio_vl.Qwen2AudioVLConfig")
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


def build_processor(base: Path, encoder: Path, tokenizer, config, trained: Path | None = None):
    audio_tokens = read_audio_tokens(trained / "processor_config.json") if trained else ("fixed", None)
    processor_class = own_class("processing_qwen2_audio_vl.Qwen2AudioVLProcessor")
    processor = processor_class(
        image_processor=AutoImageProcessor.from_pretrained(base),
        tokenizer=tokenizer,
        video_processor=AutoVideoProcessor.from_pretrained(base),
        feature_extractor=WhisperFeatureExtractor.from_pretrained(encoder),
        chat_template=(ROOT / "chat_template.jinja").read_text(encoding="utf-8"),
        audio_tokens=audio_tokens[0],
        trained_audio_tokens=audio_tokens[1],
    )
    processor.check_config(config.to_dict())
    return processor


def build_tokenizer(base: Path, **kwargs):
    # Of a folder without them, transformers makes a tokenizer of no words.
    slow = ("vocab.json", "merges.txt")
    is_slow = not (base / "tokenizer.json").is_file() and all((base / name).is_file() for name in slow)
    require_files(base, ("tokenizer_config.json", *(slow if is_slow else ("tokenizer.json",))), COPY)
    # Generation continues the right end of every row. Of a base that does not name its padding side, `save_pretrained`
    # keeps the side only if it is given here.
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left", **kwargs)
    added = [AddedToken(token, special=True, normalized=False) for token in AUDIO_TOKENS]
    tokenizer.add_special_tokens({"extra_special_tokens": added}, replace_extra_special_tokens=False)
    tokenizer.chat_template = None  # Qwen2-VL's own drops audio silently; the processor has the right one
    return tokenizer


def random_projector(config, seed: int) -> torch.Tensor:
    projector = torch.empty(config.text_config.hidden_size, config.audio_config.d_model)
    return projector.normal_(std=config.text_config.initializer_range, generator=torch.Generator().manual_seed(seed))


def meta_state_dict(config) -> dict[str, torch.Tensor]:
    """The model's own tensors, on the meta device: names, shapes and dtypes without memory."""
    model_class = own_class("modeling_qwen2_audio_vl.Qwen2AudioVLForConditionalGeneration")
    with torch.device("meta"):
        tensors = model_class(config).to(config.dtype).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


class BuildParts(NamedTuple):
    """What a folder is made of, before any of it is written."""

    origins: dict[str, Origin]
    config: PreTrainedConfig
    processor: ProcessorMixin
    plan: dict[str, StoredTensor | torch.Tensor]  # where each tensor of the result comes from
    marker_rows: dict[int, bytes]  # rows of the embeddings that are not those of the plan
    is_trained: bool


def join_bases(base: str, audio_encoder: str, adapter: str | None, seed: int) -> BuildParts:
    origins = {"base": resolve(base), "audio encoder": resolve(audio_encoder)}
    if adapter is not None:
        origins["trained checkpoint"] = resolve(adapter)
    folders = [origin.folder for origin in origins.values()]
    tokenizer = build_tokenizer(folders[0])
    config = build_config(*folders[:2], tokenizer)
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    processor = build_processor(*folders[:2], tokenizer, config, folders[2] if adapter else None)
    plan = plan_tensors(*folders[:2], folders[2] if adapter else None, config)
    is_trained = PROJECTOR in plan
    if adapter is None:
        plan[PROJECTOR] = random_projector(config, seed)
    elif EMBEDDINGS in plan:
        config.dtype = DTYPES.get(plan[EMBEDDINGS].dtype, config.dtype)
    marker_rows = {}
    # Embeddings that come from a trained checkpoint hold trained markers already.
    if EMBEDDINGS in plan and plan[EMBEDDINGS].path.parent == folders[0]:
        for marker, init in MARKER_INIT.items():
            marker_id, init_id = tokenizer.convert_tokens_to_ids([marker, init])
            init_row = slice(init_id, init_id + 1)
            marker_rows[marker_id] = b"".join(read_bytes(plan[EMBEDDINGS], config.dtype, init_row))
    return BuildParts(origins, config, processor, plan, marker_rows, is_trained)


def read_model(origin: Origin) -> BuildParts:
    require_files(origin.folder, ("config.json",), COPY)
    config_class = own_class("configuration_qwen2_audio_vl.Qwen2AudioVLConfig")
    found = json.loads((origin.folder / "config.json").read_text()).get("model_type")
    if found != config_class.model_type:
        needed = config_class.model_type
        raise ValueError(f"{origin.folder} holds a {found} model; --checkpoint has to be one of type {needed}.")
    config = config_class.from_pretrained(origin.folder)
    tokenizer = build_tokenizer(origin.folder, config=config)  # without it, its own code would be asked for
    processor = build_processor(origin.folder, origin.folder, tokenizer, config, origin.folder)
    plan = {tensor.name: tensor for tensor in stored_tensors(origin.folder)}
    return BuildParts({"trained checkpoint": origin}, config, processor, plan, {}, is_trained=True)


def read_adapter(origin: Origin) -> BuildParts:
    """The model that a peft adapter names in its `adapter_config.json`, merged with it in memory."""
    model = json.loads((origin.folder / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
    if not model:
        raise ValueError(
            f"{origin.folder / ADAPTER_CONFIG} names no base_model_name_or_path; write the folder or Hub id of the "
            "model there that the adapter was trained on."
        )
    if not (origin.folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"{origin.folder} holds no adapter_model.safetensors; save the adapter as safetensors.")
    try:
        # peft imports bitsandbytes, which on a CPU warns about a kernel that it can do without.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        from peft import PeftModel
    except ImportError as error:
        raise ValueError("An adapter is merged by peft, which is not installed: pip install peft") from error

    parts = read_model(resolve(model))
    folder = parts.origins["trained checkpoint"].folder
    model_class = own_class("modeling_qwen2_audio_vl.Qwen2AudioVLForConditionalGeneration")
    with warnings.catch_warnings():  # the new name is not known to peft
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
        merged = PeftModel.from_pretrained(model_class.from_pretrained(folder, dtype="auto"), str(origin.folder))
        plan = merged.merge_and_unload().state_dict()
    if parts.config.tie_word_embeddings:
        del plan["lm_head.weight"]
    described = origin.folder / "processor_config.json"  # which TRL and training save beside an adapter
    if described.is_file():
        parts.processor.audio_tokens, parts.processor.trained_audio_tokens = read_audio_tokens(described)
    return parts._replace(origins={**parts.origins, "adapter": origin}, plan=plan)


def read_checkpoint(checkpoint: str) -> BuildParts:
    origin = resolve(checkpoint)
    return read_adapter(origin) if (origin.folder / ADAPTER_CONFIG).is_file() else read_model(origin)


def build(
    base: str | None = None,
    audio_encoder: str | None = None,
    output: str | None = None,
    *,
    checkpoint: str | None = None,
    projector: str | None = None,
    adapter: str | None = None,
    audio_tokens: str | None = None,
    seed: int = 0,
) -> Path:
    """
    Assembles a repository folder that loads with the Auto classes, in 4 MB of memory beside the libraries.

    Args:
        base: Qwen2-VL checkpoint, a directory, a Hub id or ID@REVISION; tensors named as published or as now.
        audio_encoder: Whisper checkpoint, likewise.
        output: The folder to make; it must not exist, or be empty. It appears when it is complete.
        checkpoint: Instead of `base` and `audio_encoder`, a whole model that was trained and saved: weights,
            configuration, tokenizer and processor files, perhaps examples. Code, card and checksums are added. Or a
            peft adapter of such a model, which is merged into it in memory.
        projector: What training wrote: a trained `audio_projector.weight` and perhaps the rows of the two markers,
            in a safetensors or `.pt` file.
        adapter: A trained checkpoint of the whole model, in its present or its first layout; its tensors go before
            those of the bases, and decide the dtype.
        audio_tokens: "fixed" or "trimmed". The default is what was trained, as far as that tells, or fixed.
        seed: Of an untrained projector, which starts as a normal with the base's `initializer_range`.

    Raises:
        ValueError: if the parts do not fit each other or the disk, before anything is written.
    """
    if output is None:
        raise ValueError("--output is missing: name the folder to make.")
    check_audio_tokens(audio_tokens or "fixed")
    is_from_bases = checkpoint is None and base is not None and audio_encoder is not None
    is_from_checkpoint = checkpoint is not None and base is None and audio_encoder is None and adapter is None
    if not (is_from_bases or is_from_checkpoint):
        raise ValueError("Give either --base and --audio-encoder, or --checkpoint.")
    target = Path(output).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{output} is not empty; name a new folder for --output.")
    parts = read_checkpoint(checkpoint) if is_from_checkpoint else join_bases(base, audio_encoder, adapter, seed)
    origins, config, processor, plan, marker_rows, is_trained = parts
    if projector is not None:
        is_trained = True
        plan[PROJECTOR], markers = read_projector(Path(projector))
        processor.audio_tokens, processor.trained_audio_tokens = read_audio_tokens(Path(projector))
        if markers:
            for marker, row in zip(MARKER_INIT, markers, strict=True):
                marker_id = processor.tokenizer.convert_tokens_to_ids(marker)
                marker_rows[marker_id] = b"".join(read_bytes(row, config.dtype))
    processor.audio_tokens = audio_tokens or processor.audio_tokens
    expected = meta_state_dict(config)
    if problems := find_problems(plan, expected):
        raise ValueError("The checkpoints do not make this model:\n" + "\n".join(problems))

    size = sum(tensor.nbytes for tensor in expected.values())
    free = shutil.disk_usage(next(parent for parent in target.parents if parent.exists())).free
    if size * 1.01 + 10**8 > free:
        raise ValueError(f"{output} needs {size / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free.")

    remove_abandoned(target)
    unfinished = target.with_name(f".{target.name}.{uuid4().hex}-{os.getpid()}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        config.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        first = next(iter(origins.values())).folder  # the base, or the checkpoint
        generation = first if (first / "generation_config.json").is_file() else ROOT
        GenerationConfig.from_pretrained(generation).save_pretrained(unfinished)
        for name, source in SHIPPED_FILES.items():
            has_own_example = checkpoint and name in EXAMPLES and (first / name).is_file()
            if has_own_example and not is_inside(first / name, first):
                raise ValueError(f"{first / name} is a link to a file outside of {first}.")
            (unfinished / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(first / name if has_own_example else ROOT / source, unfinished / name)
        card = make_card(origins, is_trained, expected, config, processor.feature_extractor)
        card.save(unfinished / "README.md")
        checksums = write_weights(unfinished, expected, plan, marker_rows)
        write_checksums(unfinished, checksums)
        try:
            unfinished.rename(target)
        except OSError as error:  # it is there and not empty
            raise ValueError(f"{output} was made by another build in the meantime.") from error
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target
