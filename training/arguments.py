"""The settings of a run: those of transformers' Trainer with defaults for this task, and our own."""

from dataclasses import dataclass

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_xla_available

from configuration_qwen2_audio_vl import TRANSCRIBE
from publishing.arguments import check_choices, columns_of
from training.options import LEARNING_RATES, Options, check_options


@dataclass
class Arguments(Options, TrainingArguments):
    """
    [`Options`] and all other fields of [`TrainingArguments`]. Raises a ValueError if some are missing or contradict
    each other or the machine.
    """

    def __post_init__(self):
        for name in ("model", "aligner", "adapter", "encoder_cache", "export", "output_dir"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, str(path))
        for name in ("data", "eval", "keep"):
            setattr(self, name, [str(source) for source in getattr(self, name) or ()])
        check_options(vars(self))
        check_choices(self)
        self.instruction = TRANSCRIBE if self.instruction is None else self.instruction
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
