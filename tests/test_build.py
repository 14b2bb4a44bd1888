"""make test ONLY=tests/test_build.py: base weights -> repository folder."""

import hashlib
import json
import os
import re
import shutil
import types
from pathlib import Path

import pytest
import torch
from helpers import BASE, finish, start_python
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoTokenizer, WhisperForConditionalGeneration

from configuration_qwen2_audio_vl import AUDIO_TOKEN_IDS
from demo.bases import make_base, make_whisper
from publishing import check as checking
from publishing import checkpoints, paths
from publishing.build import build, build_tokenizer
from publishing.card import replace_section
from shipped_files import EXAMPLES, SHIPPED_FILES


# The names of tensors in published checkpoints: Qwen3-VL's are the present ones.
HOME, VISION = ("model.language_model", "model.visual") if BASE == "qwen3_vl" else ("model", "visual")
EMBEDDINGS, NORM = f"{HOME}.embed_tokens.weight", f"{HOME}.norm.weight"


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def copy_base(folder: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Copies a checkpoint with other tensors."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


# The tokenizers of the newer bases have other tokens at the ids that Qwen2-VL leaves free.
AUDIO_IDS = {"qwen2_vl": [151657, 151658, 151659], "qwen2_5_vl": [151665, 151666, 151667]}
AUDIO_IDS |= {"qwen3_vl": [151669, 151670, 151671]}


@pytest.fixture
def refuse(bases, tmp_path):
    """Expects an error of a build, which writes nothing. The bases are the small ones unless others are given."""

    def check(message: str, **sources):
        if "checkpoint" not in sources:
            sources = {"base": bases["base"], "audio_encoder": bases["whisper"], **sources}
        with pytest.raises(ValueError, match=message):
            build(output=tmp_path / "out", **sources)
        assert not (tmp_path / "out").exists()

    return check


def test_folder_holds_all_that_a_user_loads(repo):
    assert set(paths.files_of(repo)) == {
        *(".gitattributes", "LICENSE", "README.md", "SHA256SUMS", "requirements.txt", "model.safetensors"),
        *("app.py", "collator.py", "handler.py", "serve.py", "audio_decoding.py", "audio_download.py"),
        *("shipped_files.py", "audio_streaming.py", "transcribe.py", "transcripts.py", "word_times.py"),
        "openai_requests.py",
        *("audio_utils.py", "content_items.py", "mrope_positions.py"),
        *(
            "configuration_qwen2_audio_vl.py",
            "modeling_qwen2_audio_vl.py",
        ),
        *("processing_qwen2_audio_vl.py", "chat_template.jinja", "config.json", "generation_config.json"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("examples/photo.png", "examples/speech.mp3"),
    }
    for name, source in SHIPPED_FILES.items():
        assert (repo / name).read_bytes() == (paths.ROOT / source).read_bytes()
    template = (repo / "chat_template.jinja").read_text()
    if BASE == "qwen3_vl":
        template = template.replace("system = ''", "system = 'You are a helpful assistant.'")
    assert template == (paths.ROOT / "chat_template.jinja").read_text()
    sums = [line.split("  ") for line in (repo / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in sums} == set(paths.files_of(repo)) - {"SHA256SUMS"}
    assert all(hashlib.sha256((repo / name).read_bytes()).hexdigest() == checksum for checksum, name in sums)
    tensors = {"qwen2_vl": 96, "qwen2_5_vl": 95, "qwen3_vl": 108}[BASE]
    assert checking.check_files(repo)["weights"] == f"{tensors} tensors, names and shapes are the model's"


def test_weights_are_those_of_the_bases(repo, bases):
    built, base = load(repo), load(bases["base"])
    stock = AutoModelForImageTextToText.from_pretrained(bases["base"]).state_dict()
    whisper = WhisperForConditionalGeneration.from_pretrained(bases["whisper"]).model.encoder.state_dict()
    assert any(name.startswith(f"{VISION}.") for name in base)  # the base has the names of published checkpoints
    for marker, teacher in zip(AUDIO_IDS[BASE][1:], (151652, 151653), strict=True):
        stock[checkpoints.EMBEDDINGS][marker] = stock[checkpoints.EMBEDDINGS][teacher]
    projector = built.pop("model.audio_projector.weight")
    expected = stock | {f"model.audio_encoder.{name}": tensor for name, tensor in whisper.items()}
    assert built.keys() == expected.keys()
    assert [name for name in built if not torch.equal(built[name], expected[name])] == []
    assert projector.shape == (64, 64) and abs(projector.std() - 0.02) < 0.002 and abs(projector.mean()) < 0.002


def test_tokens(repo):
    tokenizer = AutoTokenizer.from_pretrained(repo)
    tokens = ["<|audio_pad|>", "<|audio_bos|>", "<|audio_eos|>"]
    assert tokenizer.convert_tokens_to_ids(tokens) == AUDIO_IDS[BASE]
    config = json.loads((repo / "config.json").read_text())
    assert [config[name] for name in AUDIO_TOKEN_IDS] == AUDIO_IDS[BASE]
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 32768
    assert set(tokens) <= set(tokenizer.all_special_tokens)


def test_the_left_is_padded_also_if_the_base_names_no_side(bases, tmp_path):
    base = shutil.copytree(bases["base"], tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("padding_side", None)
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "TokenizersBackend"}))
    assert build_tokenizer(base).padding_side == "left"


@pytest.mark.parametrize("names", ["tokenizer.json", "tokenizer_config.json, tokenizer.json", "config.json"])
@pytest.mark.parametrize("part", ["base", "audio_encoder", "checkpoint"])
def test_missing_files_of_the_bases_are_named(part, names, bases, repo, tmp_path, refuse):
    """transformers would make a tokenizer of no words, or a configuration of its own defaults."""
    folder = {"base": bases["base"], "audio_encoder": bases["whisper"], "checkpoint": repo}[part]
    if part != "audio_encoder" or names == "config.json":  # an encoder has no tokenizer
        copy = shutil.copytree(folder, tmp_path / part, ignore=shutil.ignore_patterns(*names.split(", ")))
        refuse(f"^{re.escape(str(copy))} lacks {names}; copy what", **{part: copy})


def test_current_tensor_names_give_the_same_folder(bases, repo, tmp_path):
    renamed = {checkpoints.rename(name, checkpoints.BASE_NAMES): t for name, t in load(bases["base"]).items()}
    base = copy_base(bases["base"], tmp_path / "base", renamed)
    renamed = {name.removeprefix("model."): tensor for name, tensor in load(bases["whisper"]).items()}
    encoder = copy_base(bases["whisper"], tmp_path / "encoder", renamed)
    built = build(base, encoder, tmp_path / "out")
    assert (built / "model.safetensors").read_bytes() == (repo / "model.safetensors").read_bytes()


def test_card(repo):
    card = ModelCard.load(repo / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "any-to-any"
    assert card.data.license == "apache-2.0" and "custom_code" in card.data.tags
    assert [widget["src"] for widget in card.data.widget] == list(EXAMPLES)
    assert card.text.strip().startswith("# qwen2-audio-vl\n")
    facts = re.search(r"<!-- facts of the build -->\n(.*)<!-- end of the facts -->\n", card.text, re.DOTALL)[1]
    assert "untrained" in facts and re.search(r"\n- [0-9,]{10} parameters in float32, 0.08 GB\n", facts)


def test_a_section_is_replaced_between_its_marks():
    first = replace_section("# Card\n", "results", "one\n")
    assert first == "# Card\n\n<!-- results -->\none\n<!-- end of results -->\n"
    assert replace_section(f"{first}\n## Limits\n", "results", "two\n") == first.replace("one", "two") + "\n## Limits\n"
    assert replace_section("# Card\n", "results", "") == "# Card\n"


def test_tied_embeddings(bases, tmp_path):
    base = make_base(tmp_path / "base", BASE, tie_word_embeddings=True)
    built = build(base, bases["whisper"], tmp_path / "out")
    assert "lm_head.weight" not in load(built)
    model, info = AutoModel.from_pretrained(built, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_bf16_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_SHARD_SIZE", "25MB")
    base = make_base(tmp_path / "base", BASE, dtype=torch.bfloat16)
    encoder = make_whisper(tmp_path / "encoder", window_seconds=1, dtype=torch.float16)
    built = build(base, encoder, tmp_path / "out")
    index = json.loads((built / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    tensors = load(built)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    model, info = AutoModel.from_pretrained(built, trust_remote_code=True, dtype="auto", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not info["missing_keys"] and not info["unexpected_keys"]


def test_seed_decides_the_projector(bases, repo, tmp_path):
    """That a seed always gives the same one is seen where a folder is built again."""
    built = build(bases["base"], bases["whisper"], tmp_path / "out", seed=1)
    assert not torch.equal(load(built)[checkpoints.PROJECTOR], load(repo)[checkpoints.PROJECTOR])


@pytest.mark.parametrize("chunk", [24, 1000, 2**24])
def test_weights_do_not_depend_on_the_chunks_they_are_copied_in(chunk, bases, tmp_path, monkeypatch):
    """Rows of the markers lie across chunks, and float32 becomes bfloat16."""
    tensors = load(bases["base"])
    tensors[EMBEDDINGS] = embeddings = tensors[EMBEDDINGS][151_600:151_700].clone()
    base = copy_base(bases["base"], tmp_path / "base", tensors)
    plan = {tensor.name: tensor for tensor in checkpoints.stored_tensors(base)}
    monkeypatch.setattr(checkpoints, "CHUNK", chunk)
    for name in (EMBEDDINGS, NORM, f"{VISION}.patch_embed.proj.weight"):
        for dtype in (torch.float32, torch.bfloat16):
            content = b"".join(checkpoints.read_bytes(plan[name], dtype))
            assert content == tensors[name].to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    stored = plan[EMBEDDINGS]
    row = b"".join(checkpoints.read_bytes(stored, torch.float32, slice(3, 4)))
    chunks = checkpoints.replace_rows(checkpoints.read_bytes(stored, torch.float32), {7: row, 9: row})
    embeddings[7] = embeddings[9] = embeddings[3]
    assert b"".join(chunks) == embeddings.numpy().tobytes()


@pytest.mark.parametrize("save, file, prefix", [(save_file, "a.safetensors", ""), (torch.save, "a.pt", "model.")])
def test_trained_projector(save, file, prefix, bases, tmp_path):
    trained = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    save({f"{prefix}audio_projector.weight": trained}, tmp_path / file)
    built = build(bases["base"], bases["whisper"], tmp_path / "out", projector=tmp_path / file)
    assert torch.equal(load(built)[checkpoints.PROJECTOR], trained)
    card = (built / "README.md").read_text()
    assert "The projector is trained." in card and "untrained" not in card


def test_trained_checkpoint_without_code(repo, tmp_path):
    """What a trained model was saved as; its code, card and checksums come with the build."""
    added = (*SHIPPED_FILES, "README.md", paths.CHECKSUMS, "chat_template.jinja")
    trained = shutil.copytree(repo, tmp_path / "trained", ignore=lambda _, names: {*names} & {*added, "examples"})
    built = build(checkpoint=trained, output=tmp_path / "built")
    assert paths.files_of(built) == paths.files_of(repo)
    same = set(paths.files_of(repo)) - {"README.md", paths.CHECKSUMS, "tokenizer_config.json"}
    assert all((built / name).read_bytes() == (repo / name).read_bytes() for name in same)
    assert "The projector is trained." in (built / "README.md").read_text()
    checking.check_files(built)


@pytest.mark.parametrize("names", [(), ("checkpoint", "base"), ("base",), ("checkpoint", "adapter")])
def test_build_takes_either_bases_or_a_checkpoint(names, repo, tmp_path):
    with pytest.raises(ValueError, match="Give either --base and --audio-encoder, or --checkpoint."):
        build(output=tmp_path / "out", **dict.fromkeys(names, repo))


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return (os.mkdir, (self.folder,))


def test_wrong_projectors_are_refused(tmp_path, refuse):
    path, name = tmp_path / "projector.safetensors", "audio_projector.weight"
    for tensors, message in (
        ({name: torch.zeros(64, 32)}, rf"misshapen: model.{name} is \(64, 32\), the model's is \(64, 64\)"),
        ({"other": torch.zeros(64, 64)}, f"holds other; expected {name}, and perhaps audio_markers.weight"),
        ({name: torch.zeros(2), "audio_projector.bias": torch.zeros(2)}, f"projector.bias, model.{name}; expected"),
    ):
        save_file(tensors, path)
        refuse(message, projector=path)
    torch.save({name: Evil(tmp_path / "evil")}, tmp_path / "evil.pt")
    path.write_text("no tensors")
    for wrong in (path, tmp_path / "evil.pt", tmp_path / "missing.pt"):
        refuse("is not a file of tensors by name", projector=wrong)
    assert not (tmp_path / "evil").exists()


def test_trained_checkpoint_of_the_first_layout(bases, repo, tmp_path, refuse):
    """The weights may have the names that were published first."""
    generator = torch.Generator().manual_seed(6)
    trained = {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in load(repo).items()}
    first = {}
    for name, tensor in trained.items():
        name = re.sub(r"^model\.(visual|audio_encoder|audio_projector)\.", r"\1.", name)
        first[name.replace(".language_model.", ".")] = tensor
    adapter = tmp_path / "first"
    adapter.mkdir()
    save_file(first, adapter / "model.safetensors")
    built = load(build(bases["base"], bases["whisper"], tmp_path / "built", adapter=adapter))
    assert built.keys() == trained.keys() and all(torch.equal(built[name], trained[name]) for name in built)

    del first["audio_projector.weight"]
    save_file(first, adapter / "model.safetensors")
    refuse("missing: model.audio_projector.weight", adapter=adapter)


def test_a_full_disk_is_seen_first(refuse, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**7))
    refuse(r"needs 0.1 GB, but its disk has 0.0 GB free")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 5, 1000, 10**6])
def test_files_that_are_cut_short_are_refused(size, bases, tmp_path, refuse):
    base = shutil.copytree(bases["base"], tmp_path / "base")
    os.truncate(base / "model.safetensors", size)
    refuse("cut short", base=base)


KILLED = """
    import os, shutil, signal, sys
    from pathlib import Path
    import torch
    from publishing import build, paths
    torch.set_num_threads(1)
    base, encoder, target = map(Path, sys.argv[1:])
    num_events, last_event = 0, None

    def count_or_die(event, arguments):
        global num_events
        if event in ("open", "os.mkdir", "os.rename"):
            num_events += 1
            if num_events == last_event:
                os.kill(os.getpid(), signal.SIGKILL)

    def make() -> dict:
        build.build(base, encoder, target)
        assert [path.name for path in target.parent.iterdir()] == ["out"]
        return {name: (target / name).read_bytes() for name in paths.files_of(target)}

    make()
    shutil.rmtree(target)
    sys.addaudithook(count_or_die)  # after all modules were imported
    expected, unfinished = make(), 0
    total = num_events
    for number in range(1, 9):
        shutil.rmtree(target)
        child = os.fork()
        if not child:
            num_events, last_event = 0, number * total // 10
            make()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        unfinished += any(target.parent.glob(".out.*.unfinished"))
        assert not target.exists() and make() == expected
    print(unfinished)
"""


@pytest.mark.long
def test_a_killed_build_leaves_nothing_that_looks_complete(bases, repo, tmp_path):
    """Eight kills from the first file that is read to the last that is written; then a run gives the same folder."""
    process = start_python(KILLED, bases["base"], bases["whisper"], tmp_path / "out", cwd=paths.ROOT)
    assert int(finish(process)) >= 2  # some kills hit builds while they wrote
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (repo / "SHA256SUMS").read_bytes()


@pytest.mark.long
def test_hostile_headers_are_refused(bases, tmp_path, refuse):
    """Offsets that overlap, are negative, twice the same or beyond the file, and an index that leaves its folder."""
    base = shutil.copytree(bases["base"], tmp_path / "base")
    content = (base / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    names = sorted((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    first, second = names[:2]
    headers = [b"[]", b"null", b"[" * 10**6, b"\xff\xfe", b'{"x": 3}']
    for offsets in (header[first]["data_offsets"], [-8, 8], [8, 0], [0, 2**62], [0.5, 8], ["0", 8], [], None):
        headers.append(json.dumps(header | {second: {**header[second], "data_offsets": offsets}}).encode())
    for hostile in headers:
        (base / "model.safetensors").write_bytes(len(hostile).to_bytes(8, "little") + hostile + content[8 + size :])
        refuse("not a safetensors file, or is cut short", base=base)
    (base / "model.safetensors").unlink()
    (base / "linked.safetensors").symlink_to(bases["whisper"] / "model.safetensors")
    for name in ("../whisper/model.safetensors", "/etc/hostname", "linked.safetensors"):
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        refuse("expected the name of a file beside it", base=base)


@pytest.mark.long
def test_two_builds_into_one_folder(bases, repo, tmp_path):
    """One of them makes it, whole; the other says so."""
    options = ["--base", bases["base"], "--audio-encoder", bases["whisper"], "--output", tmp_path / "out"]
    builds = [start_python("import upload; upload.main()", "build", *options, cwd=paths.ROOT) for _ in range(2)]
    outputs = [build.communicate(timeout=300) for build in builds]
    assert sorted(build.returncode for build in builds) == [0, 1]
    assert sum("out is ready" in output for output, _ in outputs) == 1
    assert sum("was made by another build" in errors or "is not empty" in errors for _, errors in outputs) == 1
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (repo / "SHA256SUMS").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_wrong_parts_are_refused_before_anything_is_written(bases, repo, tmp_path, refuse):
    base, whisper, tensors = bases["base"], bases["whisper"], load(bases["base"])
    integers = copy_base(base, tmp_path / "integers", tensors | {NORM: tensors[NORM].to(torch.int8)})
    refuse("of dtype I8: model.language_model.norm.weight; expected one of F32, F16, BF16", base=integers)
    norm = tensors.pop(NORM)
    refuse("missing: model.language_model.norm.weight", base=copy_base(base, tmp_path / "missing", tensors))
    extra = copy_base(base, tmp_path / "extra", tensors | {"model.other": norm})
    refuse(r"unexpected: model.other \(stored as model.other\)", base=extra)
    extractor = shutil.copytree(whisper, tmp_path / "extractor")
    settings = json.loads((extractor / "preprocessor_config.json").read_text())
    (extractor / "preprocessor_config.json").write_text(json.dumps(settings | {"feature_size": 80}))
    refuse("feature_size is 80, but the model's num_mel_bins is 128", audio_encoder=extractor)
    no_vision = shutil.copytree(whisper, tmp_path / "whisper")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, no_vision / name)
    refuse("holds a whisper model; --base has to be one of Qwen2-VL, Qwen2.5-VL, Qwen3-VL", base=no_vision)
    refuse(f"holds a {BASE} model; expected one of qwen2_audio_vl, qwen2_5_audio_vl, qwen3_audio_vl", checkpoint=base)
    thinking = shutil.copytree(base, tmp_path / "thinking")
    template = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    (thinking / "chat_template.jinja").write_text(template)
    refuse("begins its answers with <think>; take the Instruct checkpoint", base=thinking)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match=f"{tmp_path / 'full'} is not empty; name a new folder for --output."):
        build(checkpoint=repo, output=tmp_path / "full")
