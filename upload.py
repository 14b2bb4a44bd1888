"""
Base weights -> repository folder -> Hub.

    upload.py build --base DIR_OR_ID --audio-encoder DIR_OR_ID [--projector FILE] [--adapter DIR_OR_ID] --output DIR
    upload.py build --checkpoint DIR_OR_ID --output DIR     a trained model, or a peft adapter of one, which is merged:
                                                            adds code, card and checksums
    upload.py check DIR_OR_ID       does it load and answer, are its files complete and unchanged
    upload.py push DIR REPO [--results DIR]     check, then upload in one commit
    upload.py smoke REPO            for CI: pull from the Hub into an empty cache, and ask about the examples
"""

import argparse
import fnmatch
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    GenerationConfig,
    PreTrainedConfig,
    ProcessorMixin,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from card import EVALUATION, add_results, check_results, check_sizes, make_card
from checkpoints import (
    CHECKSUMS,
    DTYPES,
    EMBEDDINGS,
    PROJECTOR,
    StoredTensor,
    check_content,
    files_of,
    find_problems,
    is_inside,
    plan_tensors,
    read_audio_tokens,
    read_bytes,
    read_checksums,
    read_projector,
    remove_abandoned,
    stored_tensors,
    write_checksums,
    write_weights,
)
from configuration_qwen2_audio_vl import AUTO_MAP, CODE_FILES, check_audio_tokens, find_folder, require_files


ROOT = Path(__file__).resolve().parent
EXAMPLES = {"examples/speech.mp3": "assets/audio/jfk.mp3", "examples/photo.png": "assets/images/chelsea.png"}
SHIPPED_FILES = {
    name: name
    for name in ("LICENSE", "requirements.txt", ".gitattributes", "handler.py", "app.py", "serve.py", "chat_data.py")
} | EXAMPLES
KNOWN_FILES = (
    *CODE_FILES,
    *SHIPPED_FILES,
    *("README.md", CHECKSUMS, "config.json", "generation_config.json", "processor_config.json"),
    *(f"{EVALUATION}/{name}" for name in ("manifest.json", "scores.json", "predictions*.jsonl")),
    *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "model*.safetensors", "model*.index.json"),
)
# For files that a base lacks; transformers has defaults for some, which fit no checkpoint.
COPY = "copy what the published checkpoint has"
ADAPTER_CONFIG = "adapter_config.json"  # of peft
AUDIO_TOKENS = ("<|audio_pad|>", "<|audio_bos|>", "<|audio_eos|>")  # in the order of their ids
MARKER_INIT = {"<|audio_bos|>": "<|vision_start|>", "<|audio_eos|>": "<|vision_end|>"}  # start from these embeddings


class Origin(NamedTuple):
    """A checkpoint on this disk, and where it came from as far as that is known."""

    folder: Path
    name: str  # Hub id, or the directory's name
    commit: str | None  # of the Hub


def resolve(source: str, needed: tuple[str, ...] = ()) -> Origin:
    """A directory, or a Hub id or ID@REVISION, of which the files that `build` reads are downloaded."""
    repo, _, revision = (str(source), "", "") if Path(source).is_dir() else str(source).partition("@")
    patterns = {"allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.jinja"], "ignore_patterns": ["*fp32*"]}
    folder = find_folder(repo, revision or None, needed, **patterns)
    cached = re.search(r"models--(.+)/snapshots/([0-9a-f]{40})$", folder.resolve().as_posix())
    if cached:
        return Origin(folder, cached[1].replace("--", "/"), cached[2])
    return Origin(folder, folder.resolve().name, None)


def own_class(reference: str) -> type:
    """A class of this checkout's remote code, loaded as transformers loads it."""
    return get_class_from_dynamic_module(reference, ROOT)


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
    described = origin.folder / "processor_config.json"  # which TRL and train.py save beside an adapter
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
        projector: What `train.py` wrote: a trained `audio_projector.weight` and perhaps the rows of the two markers,
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
        for name, source in ({name: name for name in CODE_FILES} | SHIPPED_FILES).items():
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


def ask(repo: str, revision: str | None = None) -> dict:
    """
    Loads a folder or a Hub id the way a user does and asks it about its own examples.

    Returns:
        What was found, for `check` and `smoke`: classes, token ids, dtype, size and the answers.
    """
    code = {"trust_remote_code": True, "revision": revision}
    processor = AutoProcessor.from_pretrained(repo, **code)
    model = AutoModel.from_pretrained(repo, dtype="auto", device_map="auto", **code)

    def local(name: str) -> Path:
        return Path(repo) / name if Path(repo).is_dir() else Path(hf_hub_download(repo, name, revision=revision))

    speech, photo = EXAMPLES
    clip, picture = {"type": "audio", "path": str(local(speech))}, {"type": "image", "path": str(local(photo))}
    answers = {}
    for name, content in {
        "audio and picture": [
            picture,
            clip,
            {"type": "text", "text": "Answer the spoken question about the photo."},
        ],
        speech: [clip],
        photo: [picture, {"type": "text", "text": "What is in the photo?"}],
    }.items():
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers[name] = processor.batch_decode(new, skip_special_tokens=True)[0].strip()

    return {
        "classes": [type(processor).__name__, type(model).__name__],
        "auto classes": {
            auto: get_class_from_dynamic_module(reference, repo, revision=revision).__name__
            for auto, reference in sorted(model.config.auto_map.items())
        },
        "token ids": {token: processor.tokenizer.convert_tokens_to_ids(token) for token in AUDIO_TOKENS},
        "ids of the configuration": [
            model.config.audio_token_id,
            model.config.audio_bos_token_id,
            model.config.audio_eos_token_id,
        ],
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "commit": None if Path(repo).is_dir() else local("config.json").parent.name,
        "answers": answers,
    }


def ask_in_a_fresh_process(repo: str, revision: str | None, environment: dict[str, str]) -> dict:
    """
    Raises:
        ValueError: with the last lines that the process wrote, if it could not load or answer.
    """
    command = [sys.executable, str(ROOT / "upload.py"), "ask", repo, *(["--revision", revision] if revision else [])]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError("it does not load or answer:\n" + "\n".join(done.stderr.strip().splitlines()[-5:]))
    return json.loads(done.stdout.splitlines()[-1])


def check_files(folder: Path, trust_code: bool = False) -> dict[str, str]:
    """Checks the files alone. Returns a row for each topic; a ValueError names what must not be pushed."""
    names = files_of(folder)
    links = [name for name in names if not is_inside(folder / name, folder)]
    if links:
        raise ValueError(f"links to files elsewhere: {', '.join(links)}")
    unexpected = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in KNOWN_FILES)]
    if unexpected:
        raise ValueError(f"unexpected files: {', '.join(unexpected)} (weights are safetensors, never pickle)")
    missing = {"README.md", "config.json", CHECKSUMS, *CODE_FILES} - set(names)
    if missing:
        raise ValueError(f"missing files: {', '.join(sorted(missing))}")
    check_sizes(folder)
    check_sizes(folder / EVALUATION)
    checksums = read_checksums(folder)
    if set(checksums) != set(names) - {CHECKSUMS}:
        differing = sorted(set(checksums) ^ (set(names) - {CHECKSUMS}))
        raise ValueError(f"{CHECKSUMS} and the folder differ in {', '.join(differing)}")
    check_content(folder, checksums)

    card = ModelCard.load(folder / "README.md")
    for field in ("library_name", "pipeline_tag", "license", "tags"):
        if not getattr(card.data, field, None):
            raise ValueError(f"README.md has no {field} in its metadata")
    for widget in card.data.to_dict().get("widget", []):
        if "src" in widget and widget["src"] not in names:
            raise ValueError(f"README.md shows {widget['src']}, which is not there")

    settings = json.loads((folder / "config.json").read_text())
    if settings.get("auto_map") != AUTO_MAP:
        raise ValueError(f"the auto_map of config.json is {settings.get('auto_map')}, expected {AUTO_MAP}")
    changed = [name for name in CODE_FILES if (folder / name).read_bytes() != (ROOT / name).read_bytes()]
    if changed and not trust_code:
        raise ValueError(f"the code in {', '.join(changed)} is not this checkout's; --trust-code runs it all the same")
    # By the class of this checkout, so that no code of the folder runs.
    config_class = own_class("configuration_qwen2_audio_vl.Qwen2AudioVLConfig")
    config = config_class.from_pretrained(folder)
    tensors = {tensor.name: tensor for tensor in stored_tensors(folder)}
    problems = find_problems(tensors, meta_state_dict(config))
    if problems:
        raise ValueError("the weights are not this model's:\n" + "\n".join(problems))
    size = sum((folder / name).stat().st_size for name in names)
    scores = check_results(folder)
    return {
        "files": f"{len(names)}, {size / 1e9:.2f} GB, none unexpected, no pickle",
        "checksums": "all equal",
        "card": f"{card.data.pipeline_tag}, {card.data.license}, base {card.data.to_dict().get('base_model', 'local')}",
        "weights": f"{len(tensors)} tensors, names and shapes are the model's",
        **({"scores": scores} if scores else {}),
    }


def check_answers(found: dict) -> dict[str, str]:
    """What a fresh process found, as rows of a table; raises ValueError if it contradicts itself."""
    tokens = found["token ids"]
    if list(tokens.values()) != found["ids of the configuration"]:
        raise ValueError(f"the tokenizer has {tokens}, the configuration {found['ids of the configuration']}")
    if found["classes"] != [found["auto classes"].get(name) for name in ("AutoProcessor", "AutoModel")]:
        raise ValueError(f"loaded {found['classes']}, which the configuration's auto_map does not name")
    return {
        **found["auto classes"],
        "token ids": ", ".join(f"{token} {number}" for token, number in tokens.items()),
        "size": f"{found['parameters']:,} parameters in {found['dtype']}",
        **{f"answer to {name}": repr(answer) for name, answer in found["answers"].items()},
    }


def check(repo: str, revision: str | None = None, trust_code: bool = False) -> tuple[dict[str, str], dict]:
    """
    Checks a folder or a Hub id by its files, and then by loading it in a fresh process, without the token of the Hub.

    Args:
        trust_code: Whether code that differs from this checkout's may run.

    Returns:
        The table of what was found, and what [`ask`] returned.

    Raises:
        ValueError: naming the first thing that is wrong.
    """
    folder = find_folder(repo, revision)
    table = check_files(folder, trust_code)
    secrets = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in secrets}
    environment |= {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_OFFLINE": "1"}
    found = ask_in_a_fresh_process(str(folder.absolute()), None, environment)
    return table | check_answers(found), found


def push(
    folder: str,
    repo: str,
    *,
    revision: str | None = None,
    pr: bool = False,
    public: bool = False,
    trust_code: bool = False,
    results: str | None = None,
) -> CommitInfo:
    """
    Adds what `eval.py` wrote to `results`, if that is given, and checks a folder, writes the answers of its examples
    into its card, and uploads it in one commit. What the Hub already has of an interrupted push is not sent again.

    Raises:
        ValueError: if `check` refuses the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; `upload.py build` makes one.")
    if results is not None:
        add_results(folder, Path(results))
    _, found = check(str(folder), trust_code=trust_code)
    card = ModelCard.load(folder / "README.md")
    for widget in getattr(card.data, "widget", None) or []:
        if widget.get("src") in found["answers"]:
            widget["output"] = {"text": found["answers"][widget["src"]]}
    imports = "from transformers.utils import cached_file\n"
    card.text = re.sub(rf'{imports}(REPO = ".*"\n)?', f'{imports}REPO = "{repo}"\n', card.text)
    card.save(folder / "README.md")
    write_checksums(folder, {name: sum for name, sum in read_checksums(folder).items() if name != "README.md"})

    api = HfApi()
    api.create_repo(repo, private=not public, exist_ok=True)
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    names = files_of(folder)
    operations = [CommitOperationAdd(name, folder / name) for name in names]
    for name in set(api.list_repo_files(repo, revision=revision)) - set(names):
        if name.endswith((".safetensors", ".safetensors.index.json", ".py")):  # of an earlier upload
            operations.append(CommitOperationDelete(name))
    return api.create_commit(
        repo,
        operations,
        commit_message=f"Upload qwen2-audio-vl: {found['parameters']:,} parameters in {found['dtype']}",
        revision=revision,
        create_pr=pr,
    )


def smoke(repo: str, revision: str | None = None) -> dict[str, str]:
    """
    Pulls from the Hub into an empty cache, in a fresh process, and asks.

    Raises:
        ValueError: if it does not load or answer, or if a downloaded file differs from the one that was built.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo} is no Hub id; `upload.py check` is for folders.") from error
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if not re.fullmatch("HF_.*_CACHE", name)}
        environment["HF_HOME"] = cache
        if token := get_token():  # the token may be stored in the HF_HOME that is replaced here
            environment["HF_TOKEN"] = token
        found = ask_in_a_fresh_process(repo, revision, environment)
        hub = str(Path(cache) / "hub")
        folder = Path(hf_hub_download(repo, CHECKSUMS, revision=found["commit"], cache_dir=hub)).parent
        check_content(folder, read_checksums(folder))
    return {"commit": found["commit"], **check_answers(found)}


COMMANDS = {"build": build, "check": check, "push": push, "smoke": smoke, "ask": ask}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="base weights -> repository folder")
    command.add_argument("--base", metavar="DIR_OR_ID", help="Qwen2-VL checkpoint, or ID@REVISION")
    command.add_argument("--audio-encoder", metavar="DIR_OR_ID", help="Whisper checkpoint")
    command.add_argument("--checkpoint", metavar="DIR_OR_ID", help="instead of these, a trained model or an adapter")
    command.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    command.add_argument("--projector", metavar="FILE", help="trained audio_projector.weight, safetensors or .pt")
    command.add_argument("--adapter", metavar="DIR_OR_ID", help="trained checkpoint of the whole model")
    command.add_argument("--audio-tokens", help="fixed or trimmed (default: what the model was trained with, or fixed)")
    command.add_argument("--seed", type=int, default=0, help="of an untrained projector (default: 0)")
    for name, help in (
        ("check", "does a folder or Hub id load and answer, are its files complete and unchanged"),
        ("smoke", "pull from the Hub into an empty cache, and ask about the examples"),
        ("ask", "what check and smoke run in a fresh process; prints JSON"),
    ):
        command = commands.add_parser(name, help=help)
        command.add_argument("repo", metavar="REPO")
        command.add_argument("--revision", help="branch, tag or commit of the Hub")
        if name == "check":
            command.add_argument("--trust-code", action="store_true", help="run code that is not this checkout's")
    command = commands.add_parser("push", help="check, then upload in one commit")
    command.add_argument("folder", metavar="DIR")
    command.add_argument("repo", metavar="REPO")
    command.add_argument("--revision", help="branch to commit to; made if it is not there")
    command.add_argument("--pr", action="store_true", help="open a pull request instead of committing")
    command.add_argument("--results", metavar="DIR", help="of eval.py: its scores go into the card")
    command.add_argument("--trust-code", action="store_true", help="push code that is not this checkout's")
    command.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    options = vars(parser.parse_args(arguments))
    name = options.pop("command")
    try:
        result = COMMANDS[name](**options)
    except (ValueError, OSError, HfHubHTTPError) as error:
        parser.exit(1, f"upload.py {name}: {error}\n")
    except Exception as error:  # hostile files run into many others, within the libraries that read them
        parser.exit(1, f"upload.py {name}: these files cannot be used: {type(error).__name__}: {error}\n")
    if name == "build":
        size = sum((result / file).stat().st_size for file in files_of(result))
        print(f"{options['output']} is ready: {size / 1e9:.2f} GB.")
    elif name == "push":
        print(f"{result.pr_url or result.commit_url}\ncommit {result.oid}")
    elif name == "ask":
        print(json.dumps(result))
    else:
        table = result[0] if name == "check" else result
        print("\n".join(f"{topic:<30} {what}" for topic, what in table.items()))


if __name__ == "__main__":
    main()
