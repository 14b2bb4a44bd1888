"""Checks whether a folder or a repository of the Hub is complete and unchanged, and whether it loads and answers."""

import json
import os
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from configuration_qwen2_audio_vl import AUDIO_TOKEN_IDS, CODE_FILES, FAMILIES
from publishing.build import AUDIO_TOKENS, meta_state_dict, read_config
from publishing.card import ENTRIES, EVALUATION, replace_section
from publishing.checkpoints import find_problems, stored_tensors
from publishing.paths import CHECKSUMS, ROOT, check_content, files_of, is_inside, read_checksums
from shipped_files import EXAMPLES, KNOWN_FILES


# The limit in bytes of files that are read whole, as they may be a stranger's. Files that match one name are summed.
LARGEST = {"README.md": 2**18, "config.json": 2**20, CHECKSUMS: 2**20}
LARGEST |= {"manifest.json": 2**20, "scores.json": 2**24, "predictions*.jsonl": 2**28}


def check_sizes(folder: Path):
    """Raises a ValueError that names a file which is too large to be read whole, its size and the limit."""
    for pattern, limit in LARGEST.items():
        paths = sorted(folder.rglob(pattern))
        size = sum(path.stat().st_size for path in paths)
        if size > limit:
            names = ", ".join(map(str, paths))
            raise ValueError(f"{names}: {size:,} bytes are past the limit of {limit:,} for {pattern}; make it smaller")


def ask(repo: str, revision: str | None = None) -> dict:
    """
    Loads a folder or a Hub id the way a user does and asks it about its own examples. Returns its classes, the
    Auto classes, token ids, dtype, size and the answers by question.
    """
    is_folder, code = Path(repo).is_dir(), {"trust_remote_code": True, "revision": revision}
    processor = AutoProcessor.from_pretrained(repo, **code)
    model = AutoModel.from_pretrained(repo, dtype="auto", device_map="auto", **code)

    def local(name: str) -> Path:
        return Path(repo) / name if is_folder else Path(hf_hub_download(repo, name, revision=revision))

    speech, photo = EXAMPLES
    clip, picture = {"type": "audio", "path": str(local(speech))}, {"type": "image", "path": str(local(photo))}
    questions = {
        "audio and picture": [picture, clip, {"type": "text", "text": "Answer the spoken question about the photo."}],
        speech: [clip],
        photo: [picture, {"type": "text", "text": "What is in the photo?"}],
    }
    answers = {}
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for name, content in questions.items():
        # As in the card, because processors of earlier releases have no method `answer`.
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **settings).to(model.device)
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers[name] = processor.decode(output, skip_special_tokens=True).strip()

    return {
        "classes": {"AutoProcessor": type(processor).__name__, "AutoModel": type(model).__name__},
        "auto classes": {
            auto: get_class_from_dynamic_module(reference, repo, revision=revision).__name__
            for auto, reference in sorted(model.config.auto_map.items())
        },
        "token ids": {token: processor.tokenizer.convert_tokens_to_ids(token) for token in AUDIO_TOKENS},
        "ids of the configuration": [getattr(model.config, name) for name in AUDIO_TOKEN_IDS],
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "commit": None if is_folder else local("config.json").parent.name,
        "answers": answers,
    }


def ask_in_a_fresh_process(repo: str, revision: str | None, environment: dict[str, str]) -> dict:
    """Runs [`ask`]. A ValueError has the last lines that the process wrote, if it could not load or answer."""
    command = [sys.executable, str(ROOT / "upload.py"), "ask", repo, *(["--revision", revision] if revision else [])]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError("it does not load or answer:\n" + "\n".join(done.stderr.strip().splitlines()[-5:]))
    return json.loads(done.stdout.splitlines()[-1])


def check_files(folder: Path, trust_code: bool = False) -> dict[str, str]:
    """Returns what was checked, by topic, without running code of the folder. A ValueError names what is wrong."""
    names = files_of(folder)
    if links := [name for name in names if not is_inside(folder / name, folder)]:
        raise ValueError(f"links to files elsewhere: {', '.join(links)}")
    if unexpected := [name for name in names if not any(fnmatch(name, pattern) for pattern in KNOWN_FILES)]:
        raise ValueError(f"unexpected files: {', '.join(unexpected)} (weights are safetensors, never pickle)")
    if missing := {"README.md", "config.json", CHECKSUMS, *CODE_FILES} - set(names):
        raise ValueError(f"missing files: {', '.join(sorted(missing))}")
    check_sizes(folder)
    checksums = read_checksums(folder)
    if differing := set(checksums) ^ (set(names) - {CHECKSUMS}):
        raise ValueError(f"{CHECKSUMS} and the folder differ in {', '.join(sorted(differing))}")
    check_content(folder, checksums)

    card = ModelCard.load(folder / "README.md")
    metadata = card.data.to_dict()
    if absent := [field for field in ("library_name", "pipeline_tag", "license", "tags") if not metadata.get(field)]:
        raise ValueError(f"README.md has no {' and no '.join(absent)} in its metadata")
    for widget in metadata.get("widget", []):
        if "src" in widget and widget["src"] not in names:
            raise ValueError(f"README.md shows {widget['src']}, which is not there")

    in_card = card.data.eval_results or replace_section(card.text, "results", "") != card.text
    if (in_card or ENTRIES in names) and not (folder / EVALUATION).is_dir():
        shown = "README.md" if in_card else ENTRIES
        raise ValueError(f"{shown} shows scores, but there is no {EVALUATION}/ with the predictions they come from")

    settings = json.loads((folder / "config.json").read_text())
    config = read_config(folder)
    if settings.get("auto_map") != (expected := FAMILIES[config.model_type].auto_map):
        raise ValueError(f"the auto_map of config.json is {settings.get('auto_map')}, expected {expected}")
    changed = [name for name in CODE_FILES if (folder / name).read_bytes() != (ROOT / name).read_bytes()]
    if changed and not trust_code:
        raise ValueError(f"the code in {', '.join(changed)} is not this checkout's; --trust-code runs it all the same")
    tensors = {tensor.name: tensor for tensor in stored_tensors(folder)}
    if problems := find_problems(tensors, meta_state_dict(config)):
        raise ValueError("the weights are not this model's:\n" + "\n".join(problems))
    size = sum((folder / name).stat().st_size for name in names)
    return {
        "files": f"{len(names)}, {size / 1e9:.2f} GB, none unexpected, no pickle",
        "checksums": "all equal",
        "card": f"{metadata['pipeline_tag']}, {metadata['license']}, base {metadata.get('base_model', 'local')}",
        "weights": f"{len(tensors)} tensors, names and shapes are the model's",
    }


def check_answers(loaded: dict) -> dict[str, str]:
    """Turns what [`ask`] returned into rows of a table; raises ValueError if it contradicts itself."""
    tokens = loaded["token ids"]
    if list(tokens.values()) != loaded["ids of the configuration"]:
        raise ValueError(f"the tokenizer has {tokens}, the configuration {loaded['ids of the configuration']}")
    for auto, name in loaded["classes"].items():  # processor_config.json may name another class than config.json
        if loaded["auto classes"].get(auto) != name:
            raise ValueError(f"{auto} loads {name}, but the auto_map of config.json names another class for it")
    return {
        **loaded["auto classes"],
        "token ids": ", ".join(f"{token} {number}" for token, number in tokens.items()),
        "size": f"{loaded['parameters']:,} parameters in {loaded['dtype']}",
        **{f"answer to {name}": repr(answer) for name, answer in loaded["answers"].items()},
    }


def check(folder: str | Path, trust_code: bool = False) -> tuple[dict[str, str], dict]:
    """
    Checks a folder by its files, and then by loading it in a fresh process, without the token of the Hub. Code that
    differs from this checkout's runs only if it is trusted. Returns what was checked, by topic, and what [`ask`]
    returned. A ValueError names the first thing that is wrong.
    """
    table = check_files(Path(folder), trust_code)
    secrets = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in secrets}
    environment |= {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_OFFLINE": "1"}
    loaded = ask_in_a_fresh_process(str(Path(folder).absolute()), None, environment)
    return table | check_answers(loaded), loaded
