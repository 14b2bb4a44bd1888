"""A checked folder -> the Hub, and from the Hub back into an empty cache."""

import os
import re
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelCard, get_token, hf_hub_download

from publishing.card import name_repo, save_card
from publishing.check import ask_in_a_fresh_process, check_answers
from publishing.paths import CHECKSUMS, check_content, read_checksums
from shipped_files import KNOWN_FILES


def push(
    folder: Path, repo: str, loaded: dict, *, revision: str | None = None, pr: bool = False, public: bool = False
) -> CommitInfo:
    """
    Writes the answers of a folder's examples into its card, and uploads the folder in one commit. What the Hub already
    has of an interrupted push is not sent again. `loaded` is what [`check`] returned about the folder. The commit goes
    to a branch, `revision`, which is made if it is not there, or becomes a pull request (`pr`). `public` is for a new
    repository.
    """
    card = ModelCard.load(folder / "README.md")
    for widget in getattr(card.data, "widget", None) or []:
        if widget.get("src") in loaded["answers"]:
            widget["output"] = {"text": loaded["answers"][widget["src"]]}
    card.text = name_repo(card.text, repo)
    save_card(folder, card)

    api = HfApi()
    api.create_repo(repo, private=not public, exist_ok=True)
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        commit_message=f"Upload qwen2-audio-vl: {loaded['parameters']:,} parameters in {loaded['dtype']}",
        revision=revision,
        create_pr=pr,
        ignore_patterns=[".cache/*"],  # which `files_of` leaves out, so that `check` did not see it
        delete_patterns=[*KNOWN_FILES, "*.safetensors", "*.safetensors.index.json", "*.py"],  # of an earlier upload
    )


def smoke(repo: str, revision: str | None = None) -> dict[str, str]:
    """
    Pulls from the Hub into an empty cache, in a fresh process, and asks. A ValueError says whether it does not load or
    answer, or which downloaded file differs from the one that was built.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if not re.fullmatch("HF_.*_CACHE", name)}
        environment["HF_HOME"] = cache
        if token := get_token():  # the token may be stored in the HF_HOME that is replaced here
            environment["HF_TOKEN"] = token
        loaded = ask_in_a_fresh_process(repo, revision, environment)
        hub = str(Path(cache) / "hub")
        folder = Path(hf_hub_download(repo, CHECKSUMS, revision=loaded["commit"], cache_dir=hub)).parent
        check_content(folder, read_checksums(folder))
    return {"commit": loaded["commit"], **check_answers(loaded)}
