"""
A folder -> two files for an unpatched llama.cpp: the language model, and both towers (`mmproj`).

llama.cpp's projector `glma` computes Whisper's encoder, its last norm, linear, GELU, linear, between a first and a last
row that were learned. GELU(u) - GELU(-u) = u, so with the weights [I; -I] and [P, -P] it is our projector P, and the
rows are the embeddings of `<|audio_bos|>` and `<|audio_eos|>`. Names and sizes are those of `tools/mtmd/clip.cpp` in
https://github.com/ggml-org/llama.cpp.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import ModelCard
from transformers.utils import logging

from configuration_qwen2_audio_vl import FAMILIES
from publishing.build import meta_state_dict, read_config
from publishing.card import replace_section, save_card
from publishing.checkpoints import EMBEDDINGS, PROJECTOR, StoredTensor, find_problems, read_bytes, stored_tensors
from publishing.paths import CHECKSUMS, Origin, family_class, resolve, weights_of


try:
    import gguf
    from gguf import GGMLQuantizationType as Kind
except ImportError as error:
    raise ImportError("Files for llama.cpp need the package gguf: pip install gguf") from error


logger = logging.get_logger(__name__)

WEIGHTS = "qwen2_audio_vl.weights"  # the key of a checksum of the weights that a file was made of
KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
TOWERS = "mmproj-"  # begins the name of the second file
PROVED_BASE = "qwen2_vl"
LARGEST_F16 = 65504
SECONDS, POSITIONS = 30, 1500  # of a window; llama.cpp has no other
DIGITS = {"type": "Digits", "individual_digits": True}
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
QWEN2 += r"|\s+(?!\S)|\s+"
TEXT_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
AUDIO_NAMES = {
    "self_attn_layer_norm": "ln1",
    "final_layer_norm": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
}
VISION_NAMES = {"norm1": "ln1", "norm2": "ln2", "attn.proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}


class Tensor(NamedTuple):
    """A tensor of a GGUF file, which is read when it is written."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    source: StoredTensor | torch.Tensor
    rows: slice

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size


class Writer:
    """Collects the tensors of one file, and writes them a chunk at a time; the library's own writer holds them all."""

    def __init__(self, architecture: str, kind: Kind):
        self.file, self.kind, self.tensors = gguf.GGUFWriter(None, architecture), kind, []
        self.file.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(kind.name, f"MOSTLY_{kind.name}")])
        self.file.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def add(self, name: str, source: StoredTensor | torch.Tensor, rows: slice = slice(None), kind: Kind | None = None):
        """Adds a tensor, or some of its rows. Vectors are float32, as llama.cpp needs them."""
        shape = (len(range(*rows.indices(source.shape[0]))), *source.shape[1:])
        if kind is None:
            kind = Kind.F32 if len(shape) == 1 or name.endswith(".bias") else self.kind
        if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = Kind.F16  # its rows are no whole blocks
        self.tensors.append(Tensor(name, shape, kind, source, rows))

    def write(self, path: Path):
        for tensor in self.tensors:
            self.file.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind)
        unfinished = path.with_name(f"{path.name}.unfinished")
        try:
            self.write_file(unfinished)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        unfinished.replace(path)

    def write_file(self, path: Path):
        self.file.write_header_to_file(path)
        self.file.write_kv_data_to_file()
        self.file.write_ti_data_to_file()
        (output,) = self.file.fout
        self.file.write_padding(output, output.tell())
        for tensor in self.tensors:
            for chunk in read_bytes(tensor.source, torch.float32, tensor.rows):
                values = np.frombuffer(chunk, np.float32)
                if tensor.kind is Kind.F16 and (np.abs(values) > LARGEST_F16).any():
                    advice = "choose another --type" if self.kind is Kind.F16 else "llama.cpp needs this one in float16"
                    raise ValueError(f"{tensor.name} has values that float16 cannot hold; {advice}.")
                output.write(gguf.quants.quantize(values, tensor.kind).tobytes())
            self.file.write_padding(output, tensor.nbytes)
        self.file.close()


def find_pre_tokenizer(backend: dict) -> str:
    """
    llama.cpp's name of the rule by which a tokenizer splits texts before it merges; a ValueError names another rule.
    `backend` is the content of a `tokenizer.json`.
    """
    steps = (backend["pre_tokenizer"] or {}).get("pretokenizers") or [backend["pre_tokenizer"] or {}]
    first, last = steps[0], steps[-1]
    if backend["model"]["type"] == "BPE" and len(steps) == 2 and last["type"] == "ByteLevel":
        if first["type"] == "Split" and first["pattern"] == {"Regex": QWEN2}:
            return "qwen2"
        if first == DIGITS and last["use_regex"]:
            return "smollm"
    known = "expected Qwen2's or SmolLM's"
    raise ValueError(f"llama.cpp has no known name for this tokenizer's pre-tokenizer {json.dumps(steps)}; {known}.")


def find_refusal(config, processor) -> str | None:
    """Why llama.cpp would compute something else than this model, or None."""
    base = FAMILIES[config.model_type]
    if base.base_type != PROVED_BASE:
        return f"its base is {base.base_name}, and only files of Qwen2-VL were proved"
    text, audio, vision = config.text_config, config.audio_config, config.vision_config
    extractor = processor.feature_extractor
    window = f"{extractor.chunk_length} s and {audio.max_source_positions:,} positions"
    for is_wrong, problem in (
        (
            (extractor.chunk_length, audio.max_source_positions) != (SECONDS, POSITIONS),
            f"its windows have {window}, and those of llama.cpp {SECONDS} s and {POSITIONS:,}",
        ),
        (audio.activation_function != "gelu", f"its audio encoder has {audio.activation_function}, not gelu"),
        (audio.scale_embedding, "its audio encoder scales its input"),
        (vision.hidden_act != "quick_gelu", f"its vision tower has {vision.hidden_act}, not quick_gelu"),
        (text.use_sliding_window, "its language model attends within a sliding window"),
        (
            text.rope_parameters["rope_type"] not in ("default", "mrope"),
            f"its positions are scaled ({text.rope_parameters['rope_type']})",
        ),
    ):
        if is_wrong:
            return problem
    return None


def describe(file: gguf.GGUFWriter, kind: str, origin: Origin):
    """Writes down what a file is and where it comes from, as far as the card of the folder says it."""
    file.add_type(kind)
    file.add_name(origin.name.rpartition("/")[2])
    file.add_string(WEIGHTS, checksum_of_weights(origin.folder))
    if origin.commit:
        file.add_source_repo_url(f"https://huggingface.co/{origin.name}/tree/{origin.commit}")
    data = ModelCard.load(origin.folder / "README.md").data
    if data.license:
        file.add_license(data.license)
    bases = [data.base_model] if isinstance(data.base_model, str) else data.base_model or []
    if bases:
        file.add_base_model_count(len(bases))
    for number, base in enumerate(bases):
        organization, _, model = base.rpartition("/")
        file.add_base_model_name(number, model)
        file.add_base_model_organization(number, organization)
        file.add_base_model_repo_url(number, f"https://huggingface.co/{base}")


def checksum_of_weights(folder: Path) -> str:
    return hashlib.sha256(json.dumps(weights_of(folder), sort_keys=True).encode()).hexdigest()


def add_vocabulary(file: gguf.GGUFWriter, processor, size: int):
    """Adds the tokens with their ids; rows of the embeddings without a token are unused ones."""
    tokenizer = processor.tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in backend["added_tokens"]}
    words = {number: word for word, number in backend["model"]["vocab"].items()}
    tokens, types = [], []
    for number in range(size):
        if token := added.get(number):
            tokens.append(token["content"])
            types.append(gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED)
        else:
            tokens.append(words.get(number, f"[PAD{number}]"))
            types.append(gguf.TokenType.NORMAL if number in words else gguf.TokenType.UNUSED)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(find_pre_tokenizer(backend))
    file.add_token_list(tokens)
    file.add_token_types(types)
    file.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]])
    file.add_eos_token_id(tokenizer.eos_token_id)
    file.add_pad_token_id(tokenizer.pad_token_id)
    file.add_add_bos_token(False)
    file.add_chat_template(processor.chat_template)


def make_text_model(kind: Kind, tensors: dict[str, StoredTensor], config, processor, origin: Origin) -> Writer:
    writer, text = Writer("qwen2vl", kind), config.text_config
    file = writer.file
    describe(file, gguf.GGUFType.MODEL, origin)
    file.add_context_length(text.max_position_embeddings)
    file.add_embedding_length(text.hidden_size)
    file.add_block_count(text.num_hidden_layers)
    file.add_feed_forward_length(text.intermediate_size)
    file.add_head_count(text.num_attention_heads)
    file.add_head_count_kv(text.num_key_value_heads)
    file.add_layer_norm_rms_eps(text.rms_norm_eps)
    file.add_rope_freq_base(text.rope_parameters["rope_theta"])
    file.add_rope_dimension_sections([*text.rope_parameters["mrope_section"], 0])
    add_vocabulary(file, processor, text.vocab_size)
    names = {EMBEDDINGS: "token_embd.weight", "model.language_model.norm.weight": "output_norm.weight"}
    names["lm_head.weight"] = "output.weight"  # missing where it is tied, as llama.cpp expects
    for number in range(text.num_hidden_layers):
        names |= name_layer("model.language_model.layers", "blk", number, TEXT_NAMES)
    for name, new in names.items():
        if name in tensors:
            writer.add(new, tensors[name])
    return writer


def name_layer(old: str, new: str, number: int, names: dict[str, str]) -> dict[str, str]:
    return {
        f"{old}.{number}.{part}.{end}": f"{new}.{number}.{other}.{end}"
        for part, other in names.items()
        for end in ("weight", "bias")
    }


def make_towers(kind: Kind, tensors: dict[str, StoredTensor], config, processor, origin: Origin) -> Writer:
    writer = Writer("clip", kind)
    describe(writer.file, gguf.GGUFType.MMPROJ, origin)
    writer.file.add_clip_has_audio_encoder(True)
    writer.file.add_clip_has_vision_encoder(True)
    add_audio(writer, tensors, config)
    add_vision(writer, tensors, config, processor.image_processor)
    return writer


def add_audio(writer: Writer, tensors: dict[str, StoredTensor], config):
    file, audio, size = writer.file, config.audio_config, config.text_config.hidden_size
    file.add_string("clip.audio.projector_type", "glma")
    file.add_audio_projection_dim(size)
    file.add_audio_embedding_length(audio.d_model)
    file.add_audio_feed_forward_length(audio.encoder_ffn_dim)
    file.add_audio_block_count(audio.encoder_layers)
    file.add_audio_head_count(audio.encoder_attention_heads)
    file.add_audio_attention_layernorm_eps(1e-5)
    file.add_audio_num_mel_bins(audio.num_mel_bins)
    file.add_audio_stack_factor(1)

    old = "model.audio_encoder"
    for number in (1, 2):
        bias = read_whole(tensors[f"{old}.conv{number}.bias"])
        writer.add(f"a.conv1d.{number}.weight", tensors[f"{old}.conv{number}.weight"], kind=Kind.F16)
        writer.add(f"a.conv1d.{number}.bias", bias[:, None])
    writer.add("a.position_embd.weight", tensors[f"{old}.embed_positions.weight"], kind=Kind.F32)
    for number in range(audio.encoder_layers):
        for name, new in name_layer(f"{old}.layers", "a.blk", number, AUDIO_NAMES).items():
            if name in tensors:  # keys have no bias
                writer.add(new, tensors[name])
    for end in ("weight", "bias"):
        writer.add(f"mm.a.norm_pre.{end}", tensors[f"{old}.layer_norm.{end}"])
    projector, identity = read_whole(tensors[PROJECTOR]), torch.eye(audio.d_model)
    exact = Kind.F16 if writer.kind is Kind.Q8_0 else None
    for number, weight in ((1, torch.cat([identity, -identity])), (2, torch.cat([projector, -projector], dim=1))):
        writer.add(f"mm.a.mlp.{number}.weight", weight, kind=exact)
        writer.add(f"mm.a.mlp.{number}.bias", torch.zeros(len(weight)))
    for name, token_id in (("v.boi", config.audio_bos_token_id), ("v.eoi", config.audio_eos_token_id)):
        row = read_whole(tensors[EMBEDDINGS], slice(token_id, token_id + 1))
        writer.add(name, row[0])


def add_vision(writer: Writer, tensors: dict[str, StoredTensor], config, image_processor):
    file, vision, width = writer.file, config.vision_config, config.vision_config.embed_dim
    inner = int(width * vision.mlp_ratio)
    file.add_string("clip.vision.projector_type", "qwen2vl_merger")
    file.add_vision_projection_dim(config.text_config.hidden_size)
    file.add_vision_embedding_length(width)
    file.add_vision_feed_forward_length(inner)
    file.add_vision_block_count(vision.depth)
    file.add_vision_head_count(vision.num_heads)
    file.add_vision_attention_layernorm_eps(1e-6)
    file.add_vision_image_size(560)  # of the picture with which llama.cpp warms up
    file.add_vision_patch_size(vision.patch_size)
    file.add_vision_spatial_merge_size(vision.spatial_merge_size)
    file.add_vision_image_mean(image_processor.image_mean)
    file.add_vision_image_std(image_processor.image_std)
    file.add_uint32("clip.vision.image_min_pixels", image_processor.size["shortest_edge"])
    file.add_uint32("clip.vision.image_max_pixels", image_processor.size["longest_edge"])

    old, names = "model.visual", dict(VISION_NAMES)
    if inner == width:  # clip.cpp takes equal widths for a sign of files that have them swapped
        names |= {"mlp.fc1": "ffn_down", "mlp.fc2": "ffn_up"}
    patches = read_whole(tensors[f"{old}.patch_embed.proj.weight"])
    for number, end in enumerate(("", ".1")):  # two pictures in time
        writer.add(f"v.patch_embd.weight{end}", patches[:, :, number].contiguous(), kind=Kind.F32)
    for number in range(vision.depth):
        for name, new in name_layer(f"{old}.blocks", "v.blk", number, names).items():
            writer.add(new, tensors[name])
        for end in ("weight", "bias"):
            for part, letter in enumerate("qkv"):
                rows = slice(part * width, (part + 1) * width)
                stored = tensors[f"{old}.blocks.{number}.attn.qkv.{end}"]
                writer.add(f"v.blk.{number}.attn_{letter}.{end}", stored, rows)
    for name, new in (("ln_q", "v.post_ln"), ("mlp.0", "mm.0"), ("mlp.2", "mm.2")):
        for end in ("weight", "bias"):
            writer.add(f"{new}.{end}", tensors[f"{old}.merger.{name}.{end}"])


def read_whole(tensor: StoredTensor, rows: slice = slice(None)) -> torch.Tensor:
    """Reads a small tensor, or some of its rows, as float32."""
    content = bytearray(b"".join(read_bytes(tensor, torch.float32, rows)))
    return torch.frombuffer(content, dtype=torch.float32).view(-1, *tensor.shape[1:])


def export(source: str | Path, output: str | Path, kind: str = "f16") -> tuple[Path, Path]:
    """
    Writes `NAME-KIND.gguf` and `mmproj-NAME-KIND.gguf`, for the name of the source.

    Args:
        source: A folder that `build` made, a Hub id or ID@REVISION.
        output: The folder of the two files; it is made. Files of the same names are replaced.
        kind: "f32", "f16", "bf16" or "q8_0": the type of the matrices.

    Raises:
        ValueError: before anything is written, if llama.cpp would compute something else, or if tensors are missing;
            later, if float16 cannot hold a value.
    """
    if kind not in KINDS:
        raise ValueError(f"The type must be one of {', '.join(KINDS)}, got {kind!r}.")
    needed = ("config.json", "processor_config.json", "tokenizer.json", "README.md", CHECKSUMS)
    origin = resolve(source, needed, ("README.md", CHECKSUMS))
    config = read_config(origin.folder)
    processor_class = family_class(config.model_type, "AutoProcessor")
    processor = processor_class.from_pretrained(origin.folder, trust_remote_code=False)
    if problem := find_refusal(config, processor):
        raise ValueError(f"llama.cpp cannot run {source} as it is: {problem}.")
    tensors = {tensor.name: tensor for tensor in stored_tensors(origin.folder)}
    if problems := find_problems(tensors, meta_state_dict(config)):
        raise ValueError("the weights are not this model's:\n" + "\n".join(problems))
    writers = [make(KINDS[kind], tensors, config, processor, origin) for make in (make_text_model, make_towers)]
    if processor.trained_audio_tokens == "trimmed":
        logger.warning(
            "This model was trained with trimmed audio tokens, and llama.cpp gives it fixed ones: expect more wrong "
            "words. `python -m training --audio-tokens both` adapts it."
        )
    name, folder = f"{origin.name.rpartition('/')[2]}-{kind.upper()}.gguf", Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / name, folder / f"{TOWERS}{name}"
    for path, writer in zip(paths, writers, strict=True):
        writer.write(path)
    return paths


def add_files(folder: Path, files: Path, repo: str):
    """
    Puts what [`export`] wrote into a folder, and the commands for it into its card. A ValueError says that a file is
    missing, or was made of other weights.
    """
    names = sorted(path.name for path in files.glob("*.gguf"))
    models = [name for name in names if not name.startswith(TOWERS)]
    if not models or sorted(f"{TOWERS}{name}" for name in models) != sorted({*names} - {*models}):
        found = ", ".join(names) or "no .gguf file"
        expected = f"expected what `upload.py gguf` writes, NAME.gguf and {TOWERS}NAME.gguf"
        raise ValueError(f"{files} has {found}; {expected}.")
    weights = checksum_of_weights(folder)
    for name in names:
        field = gguf.GGUFReader(files / name).get_field(WEIGHTS)
        if field is None or field.contents() != weights:
            raise ValueError(f"{files / name} was not made of the weights in {folder}; run `upload.py gguf` again.")
    for path in folder.glob("*.gguf"):
        path.unlink()
    for name in names:
        try:
            os.link(files / name, folder / name)
        except OSError:  # another file system
            shutil.copyfile(files / name, folder / name)
    card = ModelCard.load(folder / "README.md")
    card.text = replace_section(card.text, "gguf", write_section(repo, models))
    save_card(folder, card)


def write_section(repo: str, models: list[str]) -> str:
    """What the card says about the files."""
    kinds = [name.removesuffix(".gguf").rpartition("-")[2] for name in models]
    kind = "F16" if "F16" in kinds else kinds[0]
    return f"""## llama.cpp

The `.gguf` files ({", ".join(kinds)}) are for llama.cpp, without a patch. It downloads the model and its `mmproj` file:

```
llama-server -hf {repo}:{kind}
llama-mtmd-cli -hf {repo}:{kind} --audio clip.mp3 -p "Transcribe the audio." --temp 0
```

llama.cpp takes windows of 30 s with fixed audio tokens.
"""
