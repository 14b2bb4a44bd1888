"""The names of the files that a folder has, and the search for a folder that has them, here or on the Hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from configuration_qwen2_audio_vl import CODE_FILES


# The name of each example in a built folder, and its path in this repository.
EXAMPLES = {"examples/speech.mp3": "assets/audio/jfk.mp3", "examples/photo.png": "assets/images/chelsea.png"}
BESIDE_CODE = ("LICENSE", "requirements.txt", ".gitattributes", "handler.py", "app.py", "serve.py", "collator.py")
BESIDE_CODE += ("transcribe.py", "transcripts.py", "audio_streaming.py", "word_times.py", "shipped_files.py")
BESIDE_CODE += ("openai_requests.py",)
SHIPPED_FILES = {name: name for name in (*CODE_FILES, *BESIDE_CODE)} | EXAMPLES
# Names and patterns of all files that a folder can have: the shipped ones, and what a build or an evaluation writes.
KNOWN_FILES = (
    *SHIPPED_FILES,
    *("README.md", "SHA256SUMS", "config.json", "generation_config.json", "processor_config.json"),
    *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "model*.safetensors", "model*.index.json"),
    *("evaluation/manifest.json", "evaluation/scores.json", "evaluation/predictions*.jsonl"),
    *(".eval_results/open_asr_leaderboard.yaml", "*.gguf"),
)

WHOLE_MODEL = ("config.json", "processor_config.json", "tokenizer.json", "*.safetensors")  # the files of a whole model


def require_files(folder: Path, names: tuple[str, ...], advice: str):
    """Raises ValueError with the names, or patterns of names, that match no file of the folder, and the advice."""
    if missing := [name for name in names if not any(path.is_file() for path in folder.glob(name))]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; {advice}.")


def find_folder(repo: str | Path, revision: str | None = None, needed: tuple[str, ...] = (), **patterns) -> Path:
    """
    Returns the folder `repo`, or downloads the Hub id `repo`. `revision` and `patterns` are those of
    [`huggingface_hub.snapshot_download`].

    Raises:
        ValueError: if there is neither, or no file for one of the names, or patterns of names, that are `needed`.
    """
    try:
        is_local = Path(repo).is_dir()
        folder = Path(repo if is_local else snapshot_download(str(repo), revision=revision, **patterns))
        require_files(folder, needed, "`upload.py build` makes a folder that has all files")
        return folder
    except HFValidationError as error:
        raise ValueError(f"There is no folder {repo}, and it is no Hub id either.") from error
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"There is no folder {repo}, and it cannot be downloaded from the Hub: {reason}") from error
