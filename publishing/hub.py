"""A checked folder -> the Hub, and from the Hub back into an empty cache."""

import os
import re
import tempfile
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from publishing.card import add_results
from publishing.check import ask_in_a_fresh_process, check, check_answers
from publishing.paths import CHECKSUMS, check_content, files_of, read_checksums, write_checksums


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
    Adds what `evaluation` wrote to `results`, if that is given, and checks a folder, writes the answers of its examples
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
