"""Is a folder or a repository of the Hub complete and unchanged, and does it load and answer?"""

import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from configuration_qwen2_audio_vl import AUTO_MAP, CODE_FILES, EXAMPLES, SHIPPED_FILES, find_folder
from publishing.build import AUDIO_TOKENS, meta_state_dict
from publishing.card import EVALUATION, check_results, check_sizes
from publishing.checkpoints import find_problems, stored_tensors
from publishing.paths import CHECKSUMS, ROOT, check_content, files_of, is_inside, own_class, read_checksums


KNOWN_FILES = (
    *SHIPPED_FILES,
    *("README.md", CHECKSUMS, "config.json", "generation_config.json", "processor_config.json"),
    *(f"{EVALUATION}/{name}" for name in ("manifest.json", "scores.json", "predictions*.jsonl")),
    *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "model*.safetensors", "model*.index.json"),
)


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
    questions = {
        "audio and picture": [picture, clip, {"type": "text", "text": "Answer the spoken question about the photo."}],
        speech: [clip],
        photo: [picture, {"type": "text", "text": "What is in the photo?"}],
    }
    answers = {}
    for name, content in questions.items():
        (answer,) = processor.answer(model, [[{"role": "user", "content": content}]], max_new_tokens=16)
        answers[name] = answer.strip()

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
