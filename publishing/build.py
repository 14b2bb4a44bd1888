"""Base weights, or a trained model, -> a repository folder that loads with the Auto classes."""

import glob
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from uuid import uuid4

import torch
import transformers

from configuration_qwen2_audio_vl import (
    ASSISTANT,
    AUDIO_TOKEN_IDS,
    FAMILIES,
    VISION_TOKEN_IDS,
    Family,
    check_audio_tokens,
)
from publishing import checkpoints
from publishing.arguments import check_build
from publishing.card import make_card
from publishing.paths import ROOT, Origin, family_class, is_inside, resolve, silence_peft, type_on, write_checksums
from shipped_files import EXAMPLES, SHIPPED_FILES, require_files


# The advice for a file that a base lacks. transformers has defaults for some files, but they fit no checkpoint.
COPY = "copy what the published checkpoint has"
ADAPTER_CONFIG = "adapter_config.json"  # of peft
AUDIO_TOKENS = ("<|audio_pad|>", "<|audio_bos|>", "<|audio_eos|>")  # in the order of `AUDIO_TOKEN_IDS`
MARKER_INIT = {"<|audio_bos|>": "<|vision_start|>", "<|audio_eos|>": "<|vision_end|>"}  # start from these embeddings
WHISPER_FIELDS = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "encoder_layerdrop")
WHISPER_FIELDS += ("num_mel_bins", "max_source_positions", "activation_function", "scale_embedding")
WHISPER_FIELDS += ("dropout", "attention_dropout", "activation_dropout", "init_std")


@dataclass
class BuildParts:
    """What a folder is made of, before any of it is written."""

    origins: dict[str, Origin]  # by role
    config: transformers.PreTrainedConfig
    processor: transformers.ProcessorMixin
    plan: dict[str, checkpoints.StoredTensor | torch.Tensor]  # where each tensor of the result comes from
    marker_rows: dict[int, bytes]  # rows of the embeddings that are not those of the plan
    is_trained: bool = True

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The model's own tensors by name, on the meta device."""
        return meta_state_dict(self.config)


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
        base: A checkpoint of Qwen2-VL, Qwen2.5-VL or Qwen3-VL, a directory, a Hub id or ID@REVISION; its tensors are
            named as published or as now.
        audio_encoder: Whisper checkpoint, likewise.
        output: The folder to make; it must not exist, or be empty. It appears when it is complete.
        checkpoint: Instead of `base` and `audio_encoder`, a whole model that was trained and saved: weights,
            configuration, tokenizer and processor files, perhaps examples. Code, card and checksums are added. Or a
            peft adapter of such a model, which is merged into it in memory.
        projector: What training wrote: a trained `audio_projector.weight` and perhaps the rows of the two markers,
            in a safetensors or `.pt` file.
        adapter: A trained checkpoint of the whole model, in its present or its first layout; its tensors replace those
            of the bases, and decide the dtype.
        audio_tokens: "fixed" or "trimmed". The default is what was trained, as far as that is known, or fixed.
        seed: The seed of an untrained projector, which starts as a normal with the base's `initializer_range`.

    Raises a ValueError if the parts do not fit each other or the disk, before anything is written.
    """
    check_build(base, audio_encoder, output, checkpoint, adapter)
    parts = plan_folder(base, audio_encoder, checkpoint, adapter, projector, audio_tokens, seed)
    return write_folder(parts, Path(output).absolute())


def plan_folder(base, audio_encoder, checkpoint, adapter, projector, audio_tokens, seed) -> BuildParts:
    """Reads the parts, and compares their tensors with the model's. The arguments are those of [`build`]."""
    check_audio_tokens(audio_tokens or "fixed")
    if checkpoint:
        origin = resolve(checkpoint)
        parts = merge_adapter(origin) if (origin.folder / ADAPTER_CONFIG).is_file() else read_model(origin)
    else:
        parts = join_bases(base, audio_encoder, adapter, seed)
    if projector is not None:
        take_projector(parts, Path(projector))
    parts.processor.audio_tokens = audio_tokens or parts.processor.audio_tokens
    if problems := checkpoints.find_problems(parts.plan, parts.tensors):
        raise ValueError("The checkpoints do not make this model:\n" + "\n".join(problems))
    return parts


def write_folder(parts: BuildParts, target: Path) -> Path:
    """Writes a folder beside its target, if the disk has space, and renames it when it is complete."""
    size = sum(tensor.nbytes for tensor in parts.tensors.values())
    free = shutil.disk_usage(next(parent for parent in target.parents if parent.exists())).free
    if size * 1.01 + 10**8 > free:
        raise ValueError(f"{target} needs {size / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free.")
    remove_abandoned(target)
    unfinished = target.with_name(f".{target.name}.{uuid4().hex}-{os.getpid()}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        write_small_files(parts, unfinished)
        checksums = checkpoints.write_weights(unfinished, parts.tensors, parts.plan, parts.marker_rows)
        write_checksums(unfinished, checksums)
        try:
            return unfinished.rename(target)
        except OSError as error:  # the target has files by now
            raise ValueError(f"{target} was made by another build in the meantime.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # what is left after an error


def write_small_files(parts: BuildParts, folder: Path):
    """Writes all files except the weights and the checksums."""
    parts.config.save_pretrained(folder)
    parts.processor.save_pretrained(folder)
    source = next(iter(parts.origins.values())).folder  # it may have settings of generation, and examples
    generation = source if (source / "generation_config.json").is_file() else ROOT
    transformers.GenerationConfig.from_pretrained(generation).save_pretrained(folder)
    for name, path in SHIPPED_FILES.items():
        own_example = name in EXAMPLES and (source / name).is_file()
        if own_example and not is_inside(source / name, source):
            raise ValueError(f"{source / name} is a link to a file outside of {source}.")
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name if own_example else ROOT / path, folder / name)
    make_card(parts.origins, parts.is_trained, parts.tensors, parts.config, parts.processor).save(folder / "README.md")


def remove_abandoned(target: Path):
    """Removes the unfinished folders of builds of this target that were killed."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.*.unfinished"):
        process = folder.name.removesuffix(".unfinished").rpartition("-")[2]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, OverflowError, PermissionError):  # the folder is not from a build, or is another user's
            continue


def read_config(folder: Path) -> transformers.PreTrainedConfig:
    """Reads the configuration of a model of ours. Raises ValueError if it is of another type."""
    model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{folder} holds a {model_type} model; expected one of {', '.join(FAMILIES)}.")
    return family_class(model_type, "AutoConfig").from_pretrained(folder)


def build_config(base: Path, encoder: Path, tokenizer):
    """Joins the two configurations; contradictions between them are errors."""
    for folder in (base, encoder):
        require_files(folder, ("config.json",), COPY)
    base_config = transformers.AutoConfig.from_pretrained(base)
    model_type = type_on(base_config.model_type)
    if model_type is None:
        names = ", ".join(family.base_name for family in FAMILIES.values())
        raise ValueError(f"{base} holds a {base_config.model_type} model; --base has to be one of {names}.")
    whisper = transformers.WhisperConfig.from_pretrained(encoder)
    audio_ids = tokenizer.convert_tokens_to_ids(list(AUDIO_TOKENS))
    return family_class(model_type, "AutoConfig")(
        text_config=base_config.text_config.to_dict(),
        vision_config=base_config.vision_config.to_dict(),
        audio_config={name: getattr(whisper, name) for name in WHISPER_FIELDS},
        **{name: getattr(base_config, name) for name in VISION_TOKEN_IDS},
        **dict(zip(AUDIO_TOKEN_IDS, audio_ids, strict=True)),
        tie_word_embeddings=base_config.tie_word_embeddings,
        vision_is_trained=getattr(base_config, "vision_is_trained", True),
        dtype=base_config.dtype or torch.float32,
        architectures=[family_class(model_type, "AutoModel").__name__],
    )


def build_processor(base: Path, encoder: Path, tokenizer, config, trained: Path | None = None):
    """Joins the two processors. A trained checkpoint decides between fixed and trimmed audio tokens."""
    untrained = {"audio_tokens": "fixed", "trained_audio_tokens": None}
    rules = checkpoints.read_rules(trained / "processor_config.json") if trained else untrained
    processor = family_class(config.model_type, "AutoProcessor")(
        image_processor=transformers.AutoImageProcessor.from_pretrained(base),
        tokenizer=tokenizer,
        video_processor=transformers.AutoVideoProcessor.from_pretrained(base),
        feature_extractor=transformers.WhisperFeatureExtractor.from_pretrained(encoder),
        chat_template=make_chat_template(FAMILIES[config.model_type]),
        **rules,
    )
    processor.check_config(config.to_dict())
    return processor


def make_chat_template(family: Family) -> str:
    """Returns the template of this repository with the default system message of a base."""
    template = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
    return template.replace(f"'{ASSISTANT}'", repr(family.system or ""), 1)


def build_tokenizer(base: Path, **kwargs):
    """Loads the tokenizer of a base and adds the audio tokens."""
    # transformers would make a tokenizer of no words from a folder without these files.
    slow = ("vocab.json", "merges.txt")
    is_slow = not (base / "tokenizer.json").is_file() and all((base / name).is_file() for name in slow)
    require_files(base, ("tokenizer_config.json", *(slow if is_slow else ("tokenizer.json",))), COPY)
    # Generation continues the right end of every row. Without this argument `save_pretrained` would not keep the
    # padding side if the base does not name it.
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, padding_side="left", **kwargs)
    added = [transformers.AddedToken(token, special=True, normalized=False) for token in AUDIO_TOKENS]
    tokenizer.add_special_tokens({"extra_special_tokens": added}, replace_extra_special_tokens=False)
    templates = [tokenizer.chat_template or "", *(path.read_text("utf-8") for path in base.glob("chat_template.*"))]
    if any("<think>" in template.rpartition("add_generation_prompt")[2] for template in templates):
        raise ValueError(f"{base} begins its answers with <think>; take the Instruct checkpoint of this base instead.")
    tokenizer.chat_template = None  # the base's own drops audio silently; the processor has the right one
    return tokenizer


def meta_state_dict(config) -> dict[str, torch.Tensor]:
    """Returns the model's own tensors on the meta device, which have names, shapes and dtypes but no memory."""
    with torch.device("meta"):
        tensors = family_class(config.model_type, "AutoModel")(config).to(config.dtype).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def join_bases(base: str, audio_encoder: str, adapter: str | None, seed: int) -> BuildParts:
    """Joins a vision-language model, Whisper's encoder, and the projector of a trained checkpoint or a random one."""
    sources = {"base": base, "audio encoder": audio_encoder, "trained checkpoint": adapter}
    origins = {role: resolve(source) for role, source in sources.items() if source is not None}
    folders = [origins[role].folder if role in origins else None for role in sources]
    base_folder, encoder_folder, adapter_folder = folders
    tokenizer = build_tokenizer(base_folder)
    config = build_config(base_folder, encoder_folder, tokenizer)
    _, name, commit = origins["audio encoder"]
    config.audio_encoder_origin = f"{name}@{commit}" if commit else None  # a folder here is none for others
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    processor = build_processor(base_folder, encoder_folder, tokenizer, config, adapter_folder)
    plan = checkpoints.plan_tensors(base_folder, encoder_folder, adapter_folder, config)
    is_trained = checkpoints.PROJECTOR in plan
    if adapter is None:
        text, generator = config.text_config, torch.Generator().manual_seed(seed)
        weight = torch.empty(text.hidden_size, config.audio_config.d_model)
        plan[checkpoints.PROJECTOR] = weight.normal_(std=text.initializer_range, generator=generator)
    elif checkpoints.EMBEDDINGS in plan:
        config.dtype = checkpoints.DTYPES.get(plan[checkpoints.EMBEDDINGS].dtype, config.dtype)
    marker_rows = {}
    # Embeddings that come from a trained checkpoint hold trained markers already.
    if checkpoints.EMBEDDINGS in plan and plan[checkpoints.EMBEDDINGS].path.parent == base_folder:
        for marker, init in MARKER_INIT.items():
            marker_id, init_id = tokenizer.convert_tokens_to_ids([marker, init])
            row = checkpoints.read_bytes(plan[checkpoints.EMBEDDINGS], config.dtype, slice(init_id, init_id + 1))
            marker_rows[marker_id] = b"".join(row)
    return BuildParts(origins, config, processor, plan, marker_rows, is_trained)


def read_model(origin: Origin) -> BuildParts:
    """Reads a model that was trained and saved, or built."""
    folder = origin.folder
    require_files(folder, ("config.json",), COPY)
    config = read_config(folder)
    tokenizer = build_tokenizer(folder, config=config)  # without it, the folder's own code would be asked for
    processor = build_processor(folder, folder, tokenizer, config, folder)
    plan = {tensor.name: tensor for tensor in checkpoints.stored_tensors(folder)}
    return BuildParts({"trained checkpoint": origin}, config, processor, plan, {})


def merge_adapter(origin: Origin) -> BuildParts:
    """Reads the model that a peft adapter names in its `adapter_config.json`, and merges both in memory."""
    settings = origin.folder / ADAPTER_CONFIG
    model = json.loads(settings.read_text()).get("base_model_name_or_path")
    if not model:
        advice = "write the folder or Hub id of the model there that the adapter was trained on"
        raise ValueError(f"{settings} names no base_model_name_or_path; {advice}.")
    if not (origin.folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"{origin.folder} holds no adapter_model.safetensors; save the adapter as safetensors.")
    silence_peft()
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError("An adapter is merged by peft, which is not installed: pip install peft") from error

    parts = read_model(resolve(model))
    model_class = family_class(parts.config.model_type, "AutoModel")
    whole = model_class.from_pretrained(parts.origins["trained checkpoint"].folder, dtype="auto")
    parts.plan = PeftModel.from_pretrained(whole, str(origin.folder)).merge_and_unload().state_dict()
    if parts.config.tie_word_embeddings:
        del parts.plan["lm_head.weight"]
    processor_config = origin.folder / "processor_config.json"  # which TRL and training save beside an adapter
    if processor_config.is_file():
        vars(parts.processor).update(checkpoints.read_rules(processor_config))
    parts.origins["adapter"] = origin
    return parts


def take_projector(parts: BuildParts, path: Path):
    """Replaces the projector, and the rows of the markers if the file has them, by what training wrote."""
    parts.is_trained = True
    parts.plan[checkpoints.PROJECTOR], markers = checkpoints.read_projector(path)
    vars(parts.processor).update(checkpoints.read_rules(path))
    for marker, row in zip(MARKER_INIT if markers else (), markers, strict=True):
        marker_id = parts.processor.tokenizer.convert_tokens_to_ids(marker)
        parts.marker_rows[marker_id] = b"".join(checkpoints.read_bytes(row, parts.config.dtype))
