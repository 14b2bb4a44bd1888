"""
Trains the audio path of a folder that `upload.py build` made:

    python -m training --stage projector --model DIR --data FILE --output_dir OUT    the projector alone
    python -m training --stage lora --model DIR --data FILE --output_dir OUT         LoRA on the language model as well

On several GPUs or machines: `accelerate launch [--config_file training/fsdp-8-gpus.yaml] -m training ...`. All
arguments of [`TrainingArguments`] can be given, such as `--bf16` or `--per_device_train_batch_size 4`; `--help-all`
lists them.
"""

import hashlib
import json
import logging as standard_logging
import os
import sys
import time
import warnings
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from uuid import uuid4

import datasets
import torch
from accelerate.utils import gather_object
from matplotlib.figure import Figure


# peft imports bitsandbytes, which on a CPU warns about a kernel that it can do without.
standard_logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(standard_logging.ERROR)

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from transformers import (
    AutoModel,
    AutoProcessor,
    BitsAndBytesConfig,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import is_torch_xla_available, logging

from collator import BadRow, ChatCollator, answer_text
from configuration_qwen2_audio_vl import (
    AUDIO_TOKEN_COUNTS,
    IGNORED_LABEL,
    TRAINED_AUDIO_TOKENS,
    TRANSCRIBE,
    WHOLE_MODEL,
    check_audio_tokens,
)
from evaluation.scoring import score
from publishing.paths import (
    CHECKSUMS,
    check_content,
    only_run,
    read_checksums,
    resolve,
    write_checksums,
    write_json,
)
from training.rows import SkipBadRows, changed_data, columns_of, describe_data, load_rows, told_length


logger = logging.get_logger(__name__)

# Attention and MLP of the language model; nothing of the vision tower or the audio encoder has such a path.
LANGUAGE_MODEL = r"(.*\.)?language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
LEARNING_RATES = {"projector": 1e-3, "lora": 2e-4}  # by stage
PROJECTOR_FILE = "audio_projector.safetensors"
SECONDS_FILE = "seconds.json"  # of a checkpoint


@dataclass
class Arguments(TrainingArguments):
    """
    [`TrainingArguments`] with defaults for this task, and the arguments of this script.

    Raises:
        ValueError: if arguments are missing or contradict each other or the machine.
    """

    model: str | None = field(default=None, metadata={"help": "folder of `upload.py build`, or a Hub id"})
    stage: str = field(default="projector", metadata={"choices": [*LEARNING_RATES], "help": "what learns"})
    data: list[str] | None = field(
        default=None,
        metadata={"help": "JSON lines with `messages`, or a `datasets` folder or id with such a column, as ID[:SPLIT]"},
    )
    eval: list[str] | None = field(default=None, metadata={"help": "the same, for loss, word and character error rate"})
    streaming: bool = field(default=False, metadata={"help": "read --data as it is needed; set --max_steps as well"})
    audio_column: str | None = field(default=None, metadata={"help": "of recordings with transcripts, not `messages`"})
    text_column: str | None = field(default=None, metadata={"help": "of their transcripts"})
    instruction: str = field(default=TRANSCRIBE, metadata={"help": "what is asked about each of them"})
    skip_bad_rows: bool = field(default=False, metadata={"help": "leave out rows that cannot be used, naming them"})
    audio_tokens: str | None = field(
        default=None,
        metadata={"help": "fixed, trimmed, or both, which draws one for each batch (default: the model's)"},
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

    learning_rate: float | None = field(default=None, metadata={"help": "1e-3 for the projector, 2e-4 with LoRA"})
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "of the projector where LoRA learns as well (default: --learning_rate)"}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "see TrainingArguments"})
    warmup_steps: float = field(default=0.03, metadata={"help": "steps, or their share of all if below 1"})
    logging_steps: float = field(default=10, metadata={"help": "see TrainingArguments"})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "checkpoints kept; the newest may be half written"}
    )
    report_to: str = field(default="tensorboard", metadata={"help": "see TrainingArguments"})
    length_column_name: str | None = field(
        default=None, metadata={"help": "number in the rows to group them by (default: their tokens are counted)"}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "rows are read whole"})
    prediction_loss_only: bool = field(default=True, metadata={"help": "logits of 152,064 words are not kept"})

    def __post_init__(self):
        for name in ("model", "data"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing.")
        if self.stage not in LEARNING_RATES:
            raise ValueError(f"--stage is {self.stage!r}, expected one of {', '.join(LEARNING_RATES)}.")
        if self.audio_tokens is not None:
            check_audio_tokens(self.audio_tokens, TRAINED_AUDIO_TOKENS)
        self.columns = columns_of(self.audio_column, self.text_column)
        self.tells_length = self.length_column_name is not None
        self.length_column_name = self.length_column_name or "length"
        # TrainingArguments refuses --bf16 on a CPU that it was not told to use, and warns about memory that is pinned.
        if not getattr(torch, "accelerator", torch.cuda).is_available() and not is_torch_xla_available():
            self.use_cpu, self.dataloader_pin_memory = True, False
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.stage]
        if self.save_total_limit == 1:
            raise ValueError("--save_total_limit 1 leaves nothing if the run ends while it saves; give 2 or more.")
        if self.export and Path(self.export).exists() and any(Path(self.export).iterdir()):
            raise ValueError(f"--export {self.export} is not empty; name a new folder.")
        if self.accelerator_config is None:
            # Dispatching a streamed batch cuts its tensors by rows, but pixels and windows are not one a row.
            self.accelerator_config = {"dispatch_batches": False}
        if self.ddp_find_unused_parameters is None:
            # A batch without audio does not use the projector.
            self.ddp_find_unused_parameters = self.stage == "lora"
        super().__post_init__()
        if self.encoder_cache and (self.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"):
            raise ValueError(
                "--encoder_cache cannot be used with FSDP, where a process that reads a window from it would leave out "
                "layers that the others call. Leave it out."
            )


def map_rows(dataset, function: Callable[[dict], object], args: Arguments) -> list:
    """`function` of every row, in order: rows are shared among processes and their data loader workers."""
    mine = range(args.process_index, len(dataset), args.world_size)
    workers = args.dataloader_num_workers
    loader = DataLoader(Subset(dataset, mine), batch_size=None, collate_fn=function, num_workers=workers)
    found = gather_object([*zip(mine, loader, strict=True)])
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]


def select_rows(dataset, collator: ChatCollator, args: Arguments):
    """
    Refuses bad rows or, with `--skip_bad_rows`, leaves them out. Adds the length of each row if rows are grouped by
    length. Clips and pictures are opened only for `--skip_bad_rows`, and to count tokens where the rows do not tell
    their length.

    Raises:
        ValueError: that counts and names bad rows.
    """
    is_grouped = args.train_sampling_strategy not in ("random", "sequential")
    is_told = is_grouped and args.tells_length
    opens_files = args.skip_bad_rows or (is_grouped and not is_told)

    def measure(row) -> float | str:
        """The length of a row, told or in tokens (of its messages, if no file is opened), or what is wrong with it."""
        try:
            length = collator.inputs(row)["input_ids"].shape[1] if opens_files else len(collator.messages(row))
            return told_length(row, args.length_column_name) if is_told else length
        except BadRow as error:
            return str(error)

    if isinstance(dataset, datasets.IterableDataset):
        return dataset.filter(SkipBadRows(measure)) if args.skip_bad_rows else dataset  # else training refuses them
    found = map_rows(dataset, measure, args)
    bad = [error for error in found if isinstance(error, str)]
    if bad:
        text = f"{len(bad)} of {len(dataset)} rows cannot be used:\n" + "\n".join(bad[:20] + ["..."] * (len(bad) > 20))
        if not args.skip_bad_rows or len(bad) == len(dataset):
            raise ValueError(text)
        logger.warning(text)
        dataset = dataset.select([index for index, result in enumerate(found) if not isinstance(result, str)])
    if is_grouped:
        lengths = [result for result in found if not isinstance(result, str)]
        if args.length_column_name in dataset.column_names:  # but empty for JSON lines, which have it in `line`
            dataset = dataset.remove_columns(args.length_column_name)
        dataset = dataset.add_column(args.length_column_name, lengths)
    return dataset


class CachedEncoder(WhisperEncoder):
    """
    A frozen encoder that writes its output for a window to a file, and reads it when the window comes again. With
    trimmed tokens only the rows of the clip are written. A file that was damaged is written again.
    """

    @classmethod
    def of(cls, encoder: WhisperEncoder, folder: str) -> "CachedEncoder":
        with torch.device("meta"):
            cached = cls(encoder.config)
        cached.load_state_dict(encoder.state_dict(), assign=True)
        digest = hashlib.sha256()
        for name, tensor in encoder.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        # The outputs of another encoder are in another folder.
        cached.folder = Path(folder) / digest.hexdigest()[:16]
        cached.folder.mkdir(parents=True, exist_ok=True)
        return cached.requires_grad_(False).eval()

    def forward(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """
        As in [`WhisperEncoder`], the last hidden state alone.

        Args:
            attention_mask (`(windows, frames)`, *optional*): Where the clips are; rows behind them are 0, and are not
                stored.
        """
        device, num_rows = input_features.device, self.config.max_source_positions
        precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.dtype
        lengths = [num_rows] * len(input_features)
        if attention_mask is not None:
            places = torch.arange(1, num_rows + 1, device=device)
            lengths = (attention_mask[:, :: self.conv1.stride[0] * self.conv2.stride[0]] * places).amax(1).tolist()
        windows = input_features.cpu().contiguous().view(torch.uint8).numpy()
        keys = [hashlib.sha256(str(precision).encode() + window.tobytes()).hexdigest() for window in windows]
        paths = [self.folder / f"{key}.safetensors" for key in keys]
        found = [self.read(path).to(device) for path in paths]
        # What was stored for trimmed tokens is too short for fixed ones.
        missing = [index for index, length in enumerate(lengths) if len(found[index]) < length]
        if missing:
            encoded = super().forward(input_features[missing], **kwargs).last_hidden_state
            for index, states in zip(missing, encoded, strict=True):
                found[index] = states[: lengths[index]]
                stored = found[index].cpu().contiguous()
                unfinished = paths[index].with_suffix(f".{uuid4().hex}")  # machines may share the folder
                save_file({"last_hidden_state": stored}, unfinished, {"sha256": digest_rows(paths[index], stored)})
                unfinished.replace(paths[index])
        return BaseModelOutput(
            last_hidden_state=torch.stack([F.pad(states, (0, 0, 0, num_rows - len(states))) for states in found])
        )

    def read(self, path: Path) -> torch.Tensor:
        """The rows `(tokens, d_model)` of a window, none if they are not stored or if their file was damaged."""
        try:
            with safe_open(path, "pt") as file:
                rows = file.get_tensor("last_hidden_state")
                if (file.metadata() or {}).get("sha256") == digest_rows(path, rows):
                    return rows
        except FileNotFoundError:
            return torch.empty(0)
        except (SafetensorError, OSError):
            pass
        logger.warning(f"{path} was damaged, or is of an earlier release; its window is encoded again.")
        return torch.empty(0)


def digest_rows(path: Path, rows: torch.Tensor) -> str:
    """SHA-256 of the name of an entry of the cache and of its content, so that it fits no other window or shape."""
    digest = hashlib.sha256(f"{path.stem} {rows.dtype} {tuple(rows.shape)}".encode())
    digest.update(rows.view(torch.uint8).numpy())
    return digest.hexdigest()


def check_adapter(adapter: str, config: LoraConfig):
    """
    Raises:
        ValueError: if an adapter to start from learned other things than those that the arguments name.
    """
    found = LoraConfig.from_pretrained(adapter)
    differing = [
        f"{name} is {getattr(found, name)!r} there, {getattr(config, name)!r} here"
        for name in ("r", "lora_alpha", "target_modules", "trainable_token_indices")
        if getattr(found, name) != getattr(config, name)
    ]
    if differing:
        raise ValueError(f"--adapter {adapter} is of other arguments: {'; '.join(differing)}.")


def load_model(args: Arguments) -> PeftModel:
    """
    The model, frozen in the dtype in which it is stored, or in bfloat16 with `--bf16`, which would otherwise convert
    each weight in each step; but for the parameters that learn, which are float32.
    """
    quantization = None
    if args.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["model.visual", "model.audio_encoder", "model.audio_projector", "lm_head"],
        )
    dtype = torch.bfloat16 if args.bf16 else "auto"
    model = AutoModel.from_pretrained(
        args.model,
        trust_remote_code=True,
        dtype=dtype,
        quantization_config=quantization,
        attn_implementation=args.attn_implementation,
    )
    if args.encoder_cache:
        model.model.audio_encoder = CachedEncoder.of(model.model.audio_encoder, args.encoder_cache)
    markers = [model.config.audio_bos_token_id, model.config.audio_eos_token_id]
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=LANGUAGE_MODEL if args.stage == "lora" else DUMMY_TARGET_MODULES,
        modules_to_save=["audio_projector"],
        trainable_token_indices={"embed_tokens": markers} if args.train_markers else None,
    )
    if args.adapter:
        check_adapter(args.adapter, config)
        model = PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
    else:
        model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:  # bfloat16 would round away updates of 1e-3
            parameter.data = parameter.data.float()
    return model


class AnswerTrainer(Trainer):
    """[`Trainer`] whose evaluation also generates answers, and compares them with those of the rows."""

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As in [`Trainer`], with a learning rate of its own for the projector if one is given."""
        optimizer = super().create_optimizer(model)
        rate = self.args.projector_learning_rate
        if rate is not None:
            named = (self.model if model is None else model).named_parameters()
            projector = {parameter for name, parameter in named if "audio_projector" in name}
            for group in [*optimizer.param_groups]:
                own = [parameter for parameter in group["params"] if parameter in projector]
                if own:
                    group["params"] = [parameter for parameter in group["params"] if parameter not in projector]
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def compute_loss(self, model, inputs: dict[str, torch.Tensor], *args, **kwargs):
        """As in [`Trainer`]; what comes before the first label of all rows, the audio mostly, gets no logits."""
        is_label = (inputs["labels"] != IGNORED_LABEL).any(0)
        kept = min(len(is_label), len(is_label) - int(is_label.int().argmax()) + 1)
        inputs = {**inputs, "labels": inputs["labels"][:, -kept:], "logits_to_keep": kept}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Adds the word and the character error rate of the last answers, by the rule of `scoring.py`."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.is_fsdp_enabled:
            logger.warning("FSDP has no whole model to ask, so evaluation gives the loss alone.")
            return metrics
        found = score(self.answer(self.eval_dataset if eval_dataset is None else eval_dataset))
        found = {name: found[name]["value"] for name in ("wer", "cer")}  # None where no reference says anything
        rates = {f"{metric_key_prefix}_{name}": rate for name, rate in found.items() if rate is not None}
        self.log(rates)
        return {**metrics, **rates}

    def answer(self, dataset) -> list[dict]:
        """The expected and the given last answer of every row, as `scoring.py` takes them."""
        model, collator = self.accelerator.unwrap_model(self.model), self.data_collator
        model.eval()
        mine, rows = range(self.args.process_index, len(dataset), self.args.world_size), []
        batch_size = self.args.per_device_eval_batch_size
        for start in range(0, len(mine), batch_size):
            conversations = [collator.messages(dataset[index]) for index in mine[start : start + batch_size]]
            asked = [messages[:-1] for messages in conversations]
            with self.compute_loss_context_manager():
                answers = collator.processor.answer(model, asked, self.args.max_new_tokens)
            for messages, given in zip(conversations, answers, strict=True):
                rows.append({"text": answer_text(messages[-1]["content"]), "pred_text": given})
        return gather_object(rows)


class MarkComplete(TrainerCallback):
    """
    Marks a checkpoint by the checksums of its files when all processes have written their part of it. Writes the
    seconds that training took so far into it, and has the loss up to it logged, for a summary of the whole run.

    Args:
        seconds: What training took before it was interrupted.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.time() - self.seconds

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save or control.should_training_stop

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save

    def on_save(self, args, state, control, **kwargs):
        args.distributed_state.wait_for_everyone()
        if args.should_save:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (checkpoint / SECONDS_FILE).write_text(json.dumps(time.time() - self.start))
            write_checksums(checkpoint, {})


def mean_loss(history: list[dict]) -> float:
    """The loss of all steps, from lines that each tell the mean since the line before."""
    lines = [line for line in history if "loss" in line]
    steps = [line["step"] for line in lines]
    total = sum(line["loss"] * (step - last) for line, step, last in zip(lines, steps, [0, *steps], strict=False))
    return total / steps[-1]


def newest_checkpoint(output_dir: str) -> str | None:
    steps = [int(path.parent.name.rpartition("-")[2]) for path in Path(output_dir).glob(f"checkpoint-*/{CHECKSUMS}")]
    return str(Path(output_dir) / f"checkpoint-{max(steps)}") if steps else None


def refuse_another_run(args: Arguments):
    """An interrupted run continues only with the arguments, and the content of the data, that it was started with."""
    own = ("model", "stage", "data", "audio_column", "text_column", "instruction", "audio_tokens", "train_markers")
    own += ("adapter", "lora_r", "lora_alpha", "learning_rate", "projector_learning_rate", "seed", "max_steps")
    own += ("num_train_epochs",)
    own = {name: getattr(args, name) for name in own}
    described = describe_data(args.data, args.columns)
    path = Path(args.output_dir) / "arguments.json"
    if path.is_file() and newest_checkpoint(args.output_dir):
        then = json.loads(path.read_text())
        differing = [
            f"{name} was {then.get(name)!r}, is {value!r}" for name, value in own.items() if then.get(name) != value
        ]
        if not differing:
            differing = changed_data(then.get("content of data", described), described)
        if differing:
            raise ValueError(
                f"{args.output_dir} holds checkpoints of another run: {'; '.join(differing)}. Go on with its "
                "arguments, or name a new --output_dir."
            )
    if checkpoint := newest_checkpoint(args.output_dir):
        try:
            check_content(Path(checkpoint), read_checksums(Path(checkpoint)))
        except ValueError as error:
            raise ValueError(f"{checkpoint}: {error}. Remove it to go on from the one before.") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**own, "content of data": described})


def write_projector(adapter: Path, path: Path, audio_tokens: str):
    """What `upload.py build --projector` reads: the projector and, if they learned, the rows of the two markers."""
    tensors = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        if name.endswith("audio_projector.weight"):
            tensors["audio_projector.weight"] = tensor
        elif name.endswith("trainable_tokens_delta"):
            tensors["audio_markers.weight"] = tensor
    save_file(tensors, path, {"audio_tokens": audio_tokens})


def export(args: Arguments, processor, adapter: Path):
    """Writes a folder of the whole model that loads with the Auto classes; its weights come anew from `--model`."""
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True, dtype="auto")
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.to(model.config.dtype).save_pretrained(args.export)
    processor.save_pretrained(args.export)


def draw_losses(history: list[dict], path: Path):
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(line["step"], line[name]) for line in history if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def train(args: Arguments) -> dict:
    """
    Trains, or goes on with a run that was interrupted, and writes what was learned to `args.output_dir`: `adapter`
    (peft), `audio_projector.safetensors` (stage projector), `loss.png` and `summary.json`.

    Returns:
        The summary.

    Raises:
        ValueError: on rows that cannot be used, and on the checkpoints of another run.
    """
    if args.process_index == 0:
        refuse_another_run(args)
    set_seed(args.seed)
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    # In what is written, and now, as the answers to --eval would warn otherwise.
    processor.trained_audio_tokens = args.audio_tokens or processor.audio_tokens
    if args.audio_tokens in AUDIO_TOKEN_COUNTS:
        processor.audio_tokens = args.audio_tokens
    trained = processor.trained_audio_tokens
    collator = ChatCollator(processor, args.stage != "lora", trained, args.instruction)
    with args.main_process_first(desc="reading the data"):
        keep = (args.length_column_name,) if args.tells_length else ()
        dataset = load_rows(args.data, args.streaming, args.columns, keep)
        eval_dataset = load_rows(args.eval, columns=args.columns, keep=keep) if args.eval else None
    dataset = select_rows(dataset, collator, args)
    if eval_dataset is not None:
        eval_dataset = select_rows(eval_dataset, collator, args)

    output, start, checkpoint = Path(args.output_dir), time.time(), newest_checkpoint(args.output_dir)
    timed = checkpoint is not None and (Path(checkpoint) / SECONDS_FILE).is_file()
    seconds_before = json.loads((Path(checkpoint) / SECONDS_FILE).read_text()) if timed else 0
    trainer = AnswerTrainer(
        model=load_model(args),
        args=args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        callbacks=[MarkComplete(seconds_before)],
    )
    learning = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    seconds_of_part = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = trainer.state.global_step
    num_rows = steps * rows_per_step if args.streaming else trainer.state.epoch * len(dataset)  # of the whole run
    metrics = trainer.evaluate() if eval_dataset is not None else {}
    trainer.save_model(str(output / "adapter"))
    summary = {
        "stage": args.stage,
        "learning parameters": learning,
        "rows": None if args.streaming else len(dataset),
        "steps": steps,
        "seconds": round(seconds_before + time.time() - start, 1),
        "rows per second": round(num_rows / (seconds_before + seconds_of_part), 3),
        "loss": round(mean_loss(trainer.state.log_history), 4),
        **{name: round(value, 4) for name, value in metrics.items() if name in ("eval_loss", "eval_wer", "eval_cer")},
    }
    if torch.cuda.is_available():
        summary["peak memory of the GPU in GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if args.should_save:
        processor.save_pretrained(output / "adapter")  # which tells `upload.py build` the audio tokens
        if args.stage == "projector":
            write_projector(output / "adapter", output / PROJECTOR_FILE, processor.trained_audio_tokens)
        if args.export:
            export(args, processor, output / "adapter")
        draw_losses(trainer.state.log_history, output / "loss.png")
        (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Leaves the commands in the description as they are, and adds the default to each option."""


def make_parser(shows_all: bool) -> HfArgumentParser:
    """The parser of the command line, whose help lists the options of [`TrainingArguments`] only if `shows_all`."""
    parser = HfArgumentParser(
        Arguments, usage="python -m training [options]", description=__doc__, formatter_class=HelpFormatter
    )
    inherited = {field.name for field in fields(TrainingArguments)}
    own = parser.add_argument_group("options of this tool")
    changed = parser.add_argument_group("options of transformers' TrainingArguments with other defaults")
    other = parser.add_argument_group("other options")
    other.add_argument("--help-all", action="help", help="show all options of TrainingArguments as well and exit")
    options = parser._optionals._group_actions  # argparse has no public way to move one to another group
    for action in [*options]:
        if action.dest not in inherited | {"help"}:
            group = own
        elif action.dest in Arguments.__annotations__:
            group = changed
        else:
            group = other
            if action.dest != "help" and not shows_all:
                action.help = SUPPRESS
        options.remove(action)
        group._group_actions.append(action)
    return parser


def main(arguments: list[str] | None = None):
    # The new name is not known to peft and to older releases of transformers.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    parser = make_parser("--help-all" in (sys.argv if arguments is None else arguments))
    try:
        (args,) = parser.parse_args_into_dataclasses(arguments)
        resolve(args.model, WHOLE_MODEL)  # a model that is not there is reported before the data is read
        with only_run(args.output_dir, "--output_dir", args.process_index == 0):
            summary = train(args)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        parser.exit(1, f"training: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "training: stopped. The same command goes on from the newest checkpoint, if there is one.\n")
    if args.should_log:
        print("\n".join(f"{name:<32} {value}" for name, value in summary.items()))
