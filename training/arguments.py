"""The settings of a run: those of transformers' Trainer with defaults for this task, and our own."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.utils import is_torch_xla_available

from configuration_qwen2_audio_vl import TRAINED_AUDIO_TOKENS, TRANSCRIBE, check_audio_tokens
from training.options import check_options, columns_of


LEARNING_RATES = {"align": None, "projector": 1e-3, "lora": 2e-4}  # by stage


@dataclass
class Arguments(TrainingArguments):
    """
    [`TrainingArguments`] and the settings of `python -m training`. `training.options` reads this class as text.

    Raises:
        ValueError: if arguments are missing or contradict each other or the machine.
    """

    model: str | None = field(default=None, metadata={"help": "folder of `upload.py build`, or a Hub id"})
    stage: str = field(default="projector", metadata={"choices": ["align", "projector", "lora"], "help": "what learns"})
    aligner: str | None = field(default=None, metadata={"help": "the whole Whisper that --stage align needs"})
    align_rows: int = field(default=1000, metadata={"help": "how many rows with speech --stage align uses"})
    data: list[str] | None = field(
        default=None,
        metadata={"help": "JSON lines with `messages`, or a `datasets` folder or id with such a column, as ID[:SPLIT]"},
    )
    eval: list[str] | None = field(default=None, metadata={"help": "the same, for loss, word and character error rate"})
    streaming: bool = field(default=False, metadata={"help": "read --data as it is needed; set --max-steps as well"})
    audio_column: str | None = field(default=None, metadata={"help": "of recordings with transcripts, not `messages`"})
    text_column: str | None = field(default=None, metadata={"help": "of their transcripts"})
    instruction: str = field(
        default=TRANSCRIBE, metadata={"help": "what is asked about each of them (default: Transcribe the audio.)"}
    )
    skip_bad_rows: bool = field(default=False, metadata={"help": "leave out rows that cannot be used, naming them"})
    audio_tokens: str | None = field(
        default=None,
        metadata={
            "choices": ["fixed", "trimmed", "both"],
            "help": "what stands for a clip; both draws one for each batch (default: the model's)",
        },
    )
    adapter: str | None = field(default=None, metadata={"help": "`adapter` of an earlier run to start from"})
    train_markers: bool = field(default=False, metadata={"help": "<|audio_bos|> and <|audio_eos|> learn as well"})
    lora_r: int = field(default=16, metadata={"help": "rank of LoRA"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of LoRA, over its rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout of LoRA's inputs"})
    load_in_4bit: bool = field(default=False, metadata={"help": "hold the language model in 4 bits (bitsandbytes)"})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "of transformers; on a CPU eager trains faster than its default, sdpa"}
    )
    encoder_cache: str | None = field(default=None, metadata={"help": "folder that keeps the audio encoder's outputs"})
    export: str | None = field(default=None, metadata={"help": "folder for the whole model, LoRA merged, at the end"})
    max_new_tokens: int = field(default=256, metadata={"help": "length of an answer to --eval"})
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "of the projector where LoRA learns as well (default: --learning-rate)"}
    )

    learning_rate: float | None = field(default=None, metadata={"help": "1e-3 for the projector, 2e-4 with LoRA"})
    length_column_name: str | None = field(
        default=None, metadata={"help": "number in the rows to group them by (default: their tokens are counted)"}
    )
    lr_scheduler_type: SchedulerType | str = "cosine"
    warmup_steps: float = 0.03
    logging_steps: float = 10
    save_total_limit: int | None = 2
    report_to: str = "tensorboard"
    remove_unused_columns: bool = False  # rows are read whole
    prediction_loss_only: bool = True  # the logits of 152,064 words are not kept

    def __post_init__(self):
        for name in ("model", "aligner", "adapter", "encoder_cache", "export", "output_dir"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, str(path))
        self.data, self.eval = ([str(source) for source in sources or ()] for sources in (self.data, self.eval))
        check_options(vars(self))
        if self.stage not in LEARNING_RATES:
            raise ValueError(f"--stage is {self.stage!r}, expected one of {', '.join(LEARNING_RATES)}.")
        if self.audio_tokens is not None:
            check_audio_tokens(self.audio_tokens, TRAINED_AUDIO_TOKENS)
        self.columns = columns_of(self.audio_column, self.text_column)
        # The column of each row's length, if there is one. The Trainer needs a name in either case.
        self.given_length = self.length_column_name
        self.length_column_name = self.length_column_name or "length"
        # TrainingArguments refuses --bf16 on a CPU that it was not told to use, and warns about memory that is pinned.
        if not getattr(torch, "accelerator", torch.cuda).is_available() and not is_torch_xla_available():
            self.use_cpu, self.dataloader_pin_memory = True, False
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.stage]
        if self.accelerator_config is None:
            # Dispatching a streamed batch cuts its tensors by rows, but pixels and windows are not one a row.
            self.accelerator_config = {"dispatch_batches": False}
        if self.ddp_find_unused_parameters is None:
            # A batch without audio does not use the projector.
            self.ddp_find_unused_parameters = self.stage == "lora"
        super().__post_init__()
