"""The settings of a run, checked before anything slow is imported."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from publishing.arguments import check_choices, columns_of, dashed, setting


ARMS = ("silence", "swapped", "no-image", "text")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Settings:
    """
    What `python -m evaluation predict` takes: a model, data, the folder of the results, and options. Raises a
    ValueError if settings are out of range or exclude each other.
    """

    repo: str | Path
    data: list[str | Path]
    output: str | Path
    audio_column: str | None = setting(None, "name of a column of recordings that have transcripts")
    text_column: str | None = setting(None, "name of the column of their transcripts")
    instruction: str | None = setting(None, "what is asked about each of them (default: Transcribe the audio.)")
    group_column: str | None = setting(None, "name of a column; the rows of each of its values get scores of their own")
    transcript_column: str | None = setting(None, "column with the words of each clip, for the arms text and swapped")
    streaming: bool = setting(False, "read rows when they are needed", action="store_true")
    limit: int | None = setting(None, "ask only this many rows, from the first", type=int)
    long_form: bool = setting(
        False, "transcribe clips of any length in pieces (docs/transcription.md)", action="store_true"
    )
    arms: tuple[str, ...] = setting((), "ask all rows again without a part of their content", nargs="+", choices=ARMS)
    batch_size: int = setting(8, "rows, or requests, at a time (default: 8)", type=int)
    max_new_tokens: int = setting(256, "greatest length of an answer (default: 256)", type=int)
    audio_tokens: str | None = setting(None, "default: the model's; a server has its own", choices=("fixed", "trimmed"))
    dtype: str = setting("auto", "of the weights (default: auto, as they are stored)", choices=DTYPES)
    backend: str = setting("transformers", "vllm: a server with OpenAI's API", choices=("transformers", "vllm"))
    url: str | None = setting(None, "address of the server, up to and with /v1")
    served_name: str | None = setting(None, "name of the model at the server (default: the first)")
    keep_media: bool = setting(True, "keep no audio and pictures for the report", action="store_false")

    def __post_init__(self):
        self.repo, self.data = str(self.repo), [str(source) for source in self.data]
        self.output, self.arms = Path(self.output), tuple(self.arms)
        check_choices(self)
        self.columns = columns_of(self.audio_column, self.text_column)
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be 1 or more, got {self.batch_size}.")
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"--limit must be 0 or more, got {self.limit}.")
        if self.long_form:
            self.check_long_form()
        if self.backend == "vllm" and not self.url:
            raise ValueError("--backend vllm needs --url, the address of the server, such as http://127.0.0.1:8000/v1.")
        if self.streaming and "swapped" in self.arms:
            raise ValueError("--arms swapped takes clips of other rows, which --streaming cannot reach; leave one out.")

    def check_long_form(self):
        if arms := [arm for arm in self.arms if arm in ("no-image", "text")]:
            raise ValueError(
                f"--long-form transcribes clips, which --arms {arms[0]} has not changed or left; leave one out."
            )
        default = next(option.default for option in fields(self) if option.name == "max_new_tokens")
        if self.max_new_tokens != default:
            raise ValueError("--long-form limits the answer to each piece by its length; leave --max-new-tokens out.")

    @property
    def command(self) -> str:
        """The command line that has these settings."""
        words = ["python", "-m", "evaluation", "predict", self.repo]
        for option in fields(self)[1:]:
            value = getattr(self, option.name)
            if value != option.default:
                words.append(option_of(option.name))
                if not isinstance(value, bool):
                    words += map(str, value if isinstance(value, (list, tuple)) else [value])
        return shlex.join(words)


def option_of(name: str) -> str:
    return "--no-media" if name == "keep_media" else dashed(name)
