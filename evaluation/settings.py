"""The settings of a run, checked before anything slow is imported."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path


CHOICES = {
    "arms": ("silence", "swapped", "no-image", "text"),
    "audio_tokens": ("fixed", "trimmed"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "backend": ("transformers", "vllm"),
}


@dataclass
class Settings:
    """
    What `python -m evaluation predict` takes; its `--help` describes each field.

    Raises:
        ValueError: if settings are out of range or exclude each other.
    """

    repo: str | Path
    data: list[str | Path]
    output: str | Path
    audio_column: str | None = None
    text_column: str | None = None
    instruction: str | None = None  # the default is TRANSCRIBE
    group_column: str | None = None
    transcript_column: str | None = None
    streaming: bool = False
    limit: int | None = None
    arms: tuple[str, ...] = ()
    batch_size: int = 8
    max_new_tokens: int = 256
    audio_tokens: str | None = None
    dtype: str = "auto"
    seed: int = 0
    backend: str = "transformers"
    url: str | None = None
    served_name: str | None = None
    keep_media: bool = True

    def __post_init__(self):
        self.repo, self.data = str(self.repo), [str(source) for source in self.data]
        self.output, self.arms = Path(self.output), tuple(self.arms)
        for name, known in CHOICES.items():
            value = getattr(self, name)
            for choice in self.arms if name == "arms" else [value] if value is not None else []:
                if choice not in known:
                    expected = f"{', '.join(known[:-1])} or {known[-1]}"
                    raise ValueError(f"{option_of(name)} must be {expected}, got {choice!r}.")
        if (self.audio_column is None) != (self.text_column is None):
            raise ValueError("--audio-column and --text-column must be given together, or neither of them.")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be 1 or more, got {self.batch_size}.")
        if self.backend == "vllm" and not self.url:
            raise ValueError("--backend vllm needs --url, the address of the server, such as http://127.0.0.1:8000/v1.")
        if self.streaming and "swapped" in self.arms:
            reason = "takes the clips of other rows, which --streaming cannot reach"
            raise ValueError(f"--arms swapped {reason}; leave one out.")

    @property
    def command(self) -> str:
        """The command line that has these settings."""
        words = ["evaluation", "predict", self.repo]
        for field in fields(self)[1:]:
            value, option = getattr(self, field.name), option_of(field.name)
            if isinstance(value, bool):
                words += [option] if value != field.default else []
            elif value != field.default:
                words += [option, *map(str, value if isinstance(value, (list, tuple)) else [value])]
        return shlex.join(words)


def option_of(name: str) -> str:
    return "--no-media" if name == "keep_media" else f"--{name.replace('_', '-')}"
