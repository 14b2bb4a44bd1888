"""Folders of models and runs: files, checksums, locks. Command lines import this, so transformers is imported late."""

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from filelock import FileLock, Timeout


ROOT = Path(__file__).resolve().parents[1]
CHECKSUMS = "SHA256SUMS"  # has a line for every other file of a folder, as `sha256sum --check` reads it


class Origin(NamedTuple):
    """A checkpoint on this disk, and where it came from as far as that is known."""

    folder: Path
    name: str  # Hub id, or the directory's name
    commit: str | None  # of the Hub


def resolve(source: str, needed: tuple[str, ...] = (), more: tuple[str, ...] = ()) -> Origin:
    """Finds a directory, or downloads the files of a Hub id or ID@REVISION that `build` reads, and `more`."""
    from shipped_files import find_folder

    repo, _, revision = (str(source), "", "") if Path(source).is_dir() else str(source).partition("@")
    patterns = {"allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.jinja", *more], "ignore_patterns": ["*fp32*"]}
    folder = find_folder(repo, revision or None, needed, **patterns)
    if cached := re.search(r"models--(.+)/snapshots/([0-9a-f]{40})$", folder.resolve().as_posix()):
        return Origin(folder, cached[1].replace("--", "/"), cached[2])
    return Origin(folder, folder.resolve().name, None)


def own_class(reference: str) -> type:
    """Returns a class of this checkout's remote code, loaded as transformers loads it."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(reference, ROOT)


def type_on(base_type: str) -> str | None:
    """Returns the type of the models on a base, None if there are none."""
    from configuration_qwen2_audio_vl import FAMILIES

    return next((name for name, family in FAMILIES.items() if family.base_type == base_type), None)


def family_class(model_type: str, auto_class: str) -> type:
    """Returns the class of this checkout that an Auto class loads for a type of model."""
    from configuration_qwen2_audio_vl import FAMILIES

    return own_class(FAMILIES[model_type].auto_map[auto_class])


def load_processor(repo: str | Path, audio_tokens: str | None = None):
    """Loads the processor of a folder or a Hub id. Raises a ValueError if its code is of an earlier release."""
    from transformers import AutoProcessor

    changes = {} if audio_tokens is None else {"audio_tokens": audio_tokens}
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True, **changes)
    if not hasattr(processor, "answer"):
        advice = f"`python upload.py build --checkpoint {repo} --output NEW` makes a folder of the same weights"
        raise ValueError(f"{repo} has the code of an earlier release; {advice} with the code of this one.")
    return processor


def is_inside(path: Path, folder: Path) -> bool:
    """Tells whether a path of a folder stays in it. The Hub's cache links its snapshots to the blobs beside them."""
    real, home = path.resolve(), folder.resolve()
    return real.is_relative_to(home) or (home.parent.name == "snapshots" and real.parent == home.parents[1] / "blobs")


@contextmanager
def replace_file(path: Path) -> Iterator[TextIO]:
    """Opens a text file that replaces `path` when it is complete. Half of a surrogate pair, as in JSON, is escaped."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        yield file
    unfinished.replace(path)


def write_json(path: Path, content):
    with replace_file(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def print_table(table: dict):
    """Prints a line for each topic, with aligned values."""
    print("\n".join(f"{topic:<32} {value}" for topic, value in table.items()))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(folder: Path) -> list[str]:
    """Lists the names of all files of a folder, except those that git and the Hub's client keep there."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith((".cache/", ".git/")))


def read_checksums(folder: Path) -> dict[str, str]:
    lines = (folder / CHECKSUMS).read_text().splitlines()
    return {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}


def weights_of(folder: Path) -> dict[str, str]:
    """Returns the checksums of the weights of a folder."""
    return {name: checksum for name, checksum in read_checksums(folder).items() if name.endswith(".safetensors")}


def write_checksums(folder: Path, known: dict[str, str]):
    """Writes the checksums of all files. Those that are known are not computed again."""
    sums = {name: known.get(name) or sha256(folder / name) for name in files_of(folder) if name != CHECKSUMS}
    with replace_file(folder / CHECKSUMS) as file:
        file.writelines(f"{checksum}  {name}\n" for name, checksum in sums.items())


def check_content(folder: Path, checksums: dict[str, str]):
    """Compares the files that are there with the checksums of the build."""
    changed = [name for name, sum in checksums.items() if (folder / name).is_file() and sha256(folder / name) != sum]
    if changed:
        raise ValueError(f"the content of {', '.join(changed)} is not what {CHECKSUMS} says")


@contextmanager
def only_run(folder: str | Path, option: str, is_main_process: bool = True):
    """
    Keeps other runs out of a folder, which is made if it is not there. The lock of a process that was killed is free.
    Only the main process of a run takes it. A ValueError names the option and the folder if another run is alive.
    """
    if not is_main_process:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(Path(folder) / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"{option} {folder} is in use by another run; name a new folder, or wait for it.") from error


def silence_peft():
    """Silences what peft warns of: bitsandbytes on a CPU, and a deprecated name. Call it before peft is imported."""
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
