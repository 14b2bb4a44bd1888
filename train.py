"""
Trains the audio path of a folder that `upload.py build` made:

    train.py --stage projector --model DIR --data FILE --output_dir OUT    the projector alone, the model stays as it is
    train.py --stage lora --model DIR --data FILE --output_dir OUT         the projector, and LoRA on the language model

On several GPUs or machines: `accelerate launch [--config_file configs/fsdp-8-gpus.yaml] train.py ...`. All arguments of
[`TrainingArguments`] can be given, such as `--bf16`, `--gradient_checkpointing` or `--per_device_train_batch_size 4`.
"""

import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import jiwer
import torch
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from PIL import Image
from safetensors.torch import load_file, save_file
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
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Attention and MLP of the language model; nothing of the vision tower or the audio encoder has such a path.
LANGUAGE_MODEL = r"(.*\.)?language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
LEARNING_RATES = {"projector": 1e-3, "lora": 2e-4}
PROJECTOR_FILE = "audio_projector.safetensors"
COMPLETE = "complete"  # the file that marks a checkpoint as written to its end
IGNORED = -100  # label of what is not learned


@dataclass
class Arguments(TrainingArguments):
    """
    [`TrainingArguments`] with defaults for this task, and the arguments of this script.

    Raises:
        ValueError: if arguments are missing or contradict each other or the machine.
    """

    model: str | None = field(default=None, metadata={"help": "folder of `upload.py build`, or a Hub id"})
    stage: str = field(default="projector", metadata={"choices": ["projector", "lora"], "help": "what learns"})
    data: list[str] | None = field(
        default=None,
        metadata={"help": "JSON lines with `messages`, or a `datasets` folder or id with such a column, as ID[:SPLIT]"},
    )
    eval: list[str] | None = field(default=None, metadata={"help": "the same, for loss, word and character error rate"})
    streaming: bool = field(default=False, metadata={"help": "read --data as it is needed; set --max_steps as well"})
    skip_bad_rows: bool = field(default=False, metadata={"help": "leave out rows that cannot be used, naming them"})
    train_markers: bool = field(default=False, metadata={"help": "<|audio_bos|> and <|audio_eos|> learn as well"})
    lora_r: int = field(default=16, metadata={"help": "rank of LoRA"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of LoRA, over its rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout of LoRA's inputs"})
    load_in_4bit: bool = field(default=False, metadata={"help": "hold the language model in 4 bits (bitsandbytes)"})
    encoder_cache: str | None = field(default=None, metadata={"help": "folder that keeps the audio encoder's outputs"})
    export: str | None = field(default=None, metadata={"help": "folder for the whole model, LoRA merged, at the end"})
    max_new_tokens: int = field(default=256, metadata={"help": "length of an answer to --eval"})

    learning_rate: float | None = field(default=None, metadata={"help": "1e-3 for the projector, 2e-4 with LoRA"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "see TrainingArguments"})
    warmup_steps: float = field(default=0.03, metadata={"help": "steps, or their share of all if below 1"})
    logging_steps: float = field(default=10, metadata={"help": "see TrainingArguments"})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "checkpoints kept; the newest may be half written"}
    )
    report_to: str = field(default="tensorboard", metadata={"help": "see TrainingArguments"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "rows are read whole"})
    prediction_loss_only: bool = field(default=True, metadata={"help": "logits of 152,064 words are not kept"})

    def __post_init__(self):
        for name in ("model", "data"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing.")
        if self.stage not in LEARNING_RATES:
            raise ValueError(f"--stage is {self.stage!r}, expected one of {', '.join(LEARNING_RATES)}.")
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


class BadRow(ValueError):
    """A row that cannot be trained on; the message begins with its place."""


def load_rows(sources: list[str], streaming: bool = False):
    """
    Rows of JSON lines files, of folders that `datasets` saved, and of datasets by their Hub id or folder.

    Returns:
        [`datasets.Dataset`] or [`datasets.IterableDataset`] with columns `line` (JSON text) or `messages`, and
        `place`, which names the row in messages.

    Raises:
        ValueError: if a source has no `messages`.
    """
    loaded = []
    for source in sources:
        if source.endswith((".jsonl", ".json")):
            # As text: Arrow would give every content item the keys of all others, filled with None.
            rows = datasets.load_dataset("text", data_files=source, split="train", streaming=streaming)
            rows = rows.rename_column("text", "line")
        else:
            rows = load_dataset(source, streaming)
        if streaming:
            rows = rows.map(lambda _, index, source=source: {"place": f"{source}:{index + 1}"}, with_indices=True)
        else:
            rows = rows.add_column("place", [f"{source}:{index + 1}" for index in range(len(rows))])
        loaded.append(rows)
    return datasets.concatenate_datasets(loaded)


def load_dataset(source: str, streaming: bool):
    if (Path(source) / "state.json").is_file():
        rows = datasets.load_from_disk(source)
        rows = rows.to_iterable_dataset() if streaming else rows
    else:
        name, _, split = source.partition(":")
        rows = datasets.load_dataset(name, split=split or "train", streaming=streaming)
    if "messages" not in (rows.features or {}):
        raise ValueError(f"{source} has columns {', '.join(rows.features or {})}; expected `messages`.")
    rows = rows.select_columns(["messages"])
    if (stored := without_decoding(rows.features["messages"])) != rows.features["messages"]:
        rows = rows.cast_column("messages", stored)
    return rows


def without_decoding(feature):
    """The same feature with audio and pictures left as the bytes of their files, which the processor decodes."""
    if isinstance(feature, (datasets.Audio, datasets.Image)):
        return type(feature)(decode=False)
    if isinstance(feature, dict):
        return {name: without_decoding(part) for name, part in feature.items()}
    if isinstance(feature, datasets.List):
        return datasets.List(without_decoding(feature.feature))
    return feature


class ChatCollator:
    """Rows of chat messages -> batches to train on. Bad rows raise [`BadRow`]."""

    def __init__(self, processor, needs_audio: bool):
        self.processor, self.needs_audio = processor, needs_audio
        self.answer_start = processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
        self.answer_end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def messages(self, row: dict) -> list[dict]:
        """The messages of a row, checked without opening what they name; local files are found beside the source."""
        with prefix_errors(row["place"]):
            found = row.get("messages")
            if row.get("line") is not None:
                found = json.loads(row["line"])
                found = found.get("messages") if isinstance(found, dict) else None
            if not isinstance(found, list) or not found:
                raise ValueError("there is no list of `messages`")
            folder = Path(row["place"].rpartition(":")[0]).parent
            messages = [self.message(message, folder) for message in found]
            if messages[-1]["role"] != "assistant":
                raise ValueError(f"the last message is from {messages[-1]['role']!r}; expected the assistant's answer")
            text = self.processor.apply_chat_template(messages, tokenize=False)  # refuses unknown content
            turns = len(messages) + (messages[0]["role"] != "system")  # the template adds a system prompt
            if text.count("<|im_start|>") != turns or text.count("<|im_end|>") != turns:
                raise ValueError("a text contains <|im_start|> or <|im_end|>, which only the chat template may write")
            if self.needs_audio and self.processor.audio_token not in text:
                raise ValueError("there is no audio, so the projector learns nothing from it")
            return messages

    def message(self, message: dict, folder: Path) -> dict:
        role, content = (message.get(name) if isinstance(message, dict) else None for name in ("role", "content"))
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"a message has role {role!r}; expected system, user or assistant")
        if role == "assistant" and not answer_text(content).strip():
            raise ValueError("an answer of the assistant is empty")
        if isinstance(content, list):
            content = [self.item(item, folder) for item in content]
        return {"role": role, "content": content}

    def item(self, item, folder: Path):
        if not isinstance(item, dict):
            return item  # which the processor refuses
        # Arrow fills the keys that an item does not have with None.
        return {name: locate(name, part, folder) for name, part in item.items() if part is not None}

    def inputs(self, row: dict) -> dict[str, torch.Tensor]:
        """Model inputs of one row, unpadded, and `labels`: the answers and the ends of their turns, -100 elsewhere."""
        messages = self.messages(row)
        with prefix_errors(row["place"]):
            inputs = self.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
            return {**inputs, "labels": self.labels(inputs["input_ids"])}

    def labels(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 `(1, sequence)`."""
        labels = torch.full_like(input_ids, IGNORED)
        ids, start = input_ids[0].tolist(), self.answer_start
        place = 0
        while place < len(ids):
            if ids[place : place + len(start)] != start:
                place += 1
                continue
            place += len(start)
            end = ids.index(self.answer_end, place) + 1
            labels[0, place:end] = input_ids[0, place:end]
            place = end
        return labels

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Collates rows to a batch."""
        made = [self.inputs(row) for row in rows]
        length = max(inputs["input_ids"].shape[1] for inputs in made)
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORED}
        batch = {}
        for name in dict.fromkeys(name for inputs in made for name in inputs):
            parts = [inputs[name] for inputs in made if name in inputs]
            if name in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"):
                parts = [
                    torch.nn.functional.pad(part, (0, length - part.shape[1]), value=fill.get(name, 0))
                    for part in parts
                ]
            batch[name] = torch.cat(parts)
        return batch


@contextmanager
def prefix_errors(place: str):
    """Puts the place of a row before every error that its content causes."""
    try:
        yield
    except BadRow:
        raise
    except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
        raise BadRow(f"{place}: {str(error) or type(error).__name__}") from error


def answer_text(content) -> str:
    if isinstance(content, str):
        return content
    return "".join(item.get("text") or "" for item in content or [] if isinstance(item, dict))


def locate(name: str, source, folder: Path):
    """Makes relative paths absolute, and pictures that `datasets` holds as bytes pictures."""
    if name == "image" and isinstance(source, dict) and source.get("bytes"):
        return Image.open(io.BytesIO(source["bytes"]))
    is_path = isinstance(source, str) and not re.match(r"\w+:", source) and len(source) < 1024  # base64 is longer
    if name not in ("image", "video", "audio", "url", "path") or not is_path:
        return source
    if not (folder / source).is_file():
        raise ValueError(f"there is no file {folder / source}")
    return str(folder / source)


def map_rows(dataset, function: Callable[[dict], object], args: Arguments) -> list:
    """`function` of every row, in order: rows are shared among processes and their data loader workers."""
    mine = range(args.process_index, len(dataset), args.world_size)
    workers = args.dataloader_num_workers
    workers = args.dataloader_num_workers
    workers = args.dataloader_num_workers
    workers = args.dataloader_num_workers
    workers = args.dataloader_num_workers
    workers = args.dataloader_num_workers
    workers = args.dataloader_num_workers
    workers = args.dataloader_num_workers
    workers = args.dataloader_num_workers
    workers = args.dataloader_num_workers
    workers = args.dataloader_num_workers
    workers = args.dataloader_num_workers
    loader = DataLoader(Subset(dataset, mine), batch_size=None, collate_fn=function, num_workers=workers)
    found = gather_object([*zip(mine, loader, strict=True)])
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]


def select_rows(dataset, collator: ChatCollator, args: Arguments):
    """
    Refuses bad rows or, with `--skip_bad_rows`, leaves them out. Adds the length of each row if rows are grouped by
    length. Clips and pictures are opened only for `--skip_bad_rows` and for the lengths.

    Raises:
        ValueError: that counts and names bad rows.
    """
    opens_files = args.skip_bad_rows or args.train_sampling_strategy not in ("random", "sequential")

    def measure(row) -> int | str:
        """The tokens of a row (its messages, if `opens_files` is false), or what is wrong with it."""
        try:
            return collator.inputs(row)["input_ids"].shape[1] if opens_files else len(collator.messages(row))
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
    if opens_files:
        lengths = [result for result in found if not isinstance(result, str)]
        dataset = dataset.add_column(args.length_column_name, lengths)
    return dataset


class SkipBadRows:
    """Tells whether a streamed row can be used; counts and names those that cannot."""

    def __init__(self, measure: Callable[[dict], int | str]):
        self.measure, self.skipped = measure, 0

    def __call__(self, row: dict) -> bool:
        found = self.measure(row)
        if isinstance(found, str):
            self.skipped += 1
            logger.warning(f"Left out, {self.skipped} so far: {found}")
        return not isinstance(found, str)


class CachedEncoder(WhisperEncoder):
    """A frozen encoder that writes its output for a window to a file, and reads it when the window comes again."""

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

    def forward(self, input_features: torch.Tensor, **kwargs) -> BaseModelOutput:
        """As in [`WhisperEncoder`], the last hidden state alone."""
        device = input_features.device.type
        precision = str(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input_features.dtype)
        windows = input_features.cpu().contiguous().view(torch.uint8).numpy()
        keys = [hashlib.sha256(precision.encode() + window.tobytes()).hexdigest() for window in windows]
        paths = [self.folder / f"{key}.safetensors" for key in keys]
        missing = [index for index, path in enumerate(paths) if not path.is_file()]
        if missing:
            encoded = super().forward(input_features[missing], **kwargs).last_hidden_state
            for index, states in zip(missing, encoded, strict=True):
                unfinished = paths[index].with_suffix(f".{os.getpid()}")
                save_file({"last_hidden_state": states.contiguous()}, unfinished)
                unfinished.replace(paths[index])
        states = [load_file(path, device=str(input_features.device))["last_hidden_state"] for path in paths]
        return BaseModelOutput(last_hidden_state=torch.stack(states))


def load_model(args: Arguments) -> PeftModel:
    """The model, frozen in the dtype in which it is stored but for the parameters that learn, which are float32."""
    quantization = None
    if args.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["model.visual", "model.audio_encoder", "model.audio_projector", "lm_head"],
        )
    model = AutoModel.from_pretrained(
        args.model, trust_remote_code=True, dtype="auto", quantization_config=quantization
    )
    if args.encoder_cache:
        model.model.audio_encoder = CachedEncoder.of(model.model.audio_encoder, args.encoder_cache)
    markers = [model.config.audio_bos_token_id, model.config.audio_eos_token_id]
    model = get_peft_model(
        model,
        LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=LANGUAGE_MODEL if args.stage == "lora" else DUMMY_TARGET_MODULES,
            modules_to_save=["audio_projector"],
            trainable_token_indices={"embed_tokens": markers} if args.train_markers else None,
        ),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:  # bfloat16 would round away updates of 1e-3
            parameter.data = parameter.data.float()
    return model


class AnswerTrainer(Trainer):
    """[`Trainer`] whose evaluation also generates answers, and compares them with those of the rows."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Adds the word and the character error rate (https://github.com/jitsi/jiwer) of the last answers."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.is_fsdp_enabled:
            logger.warning("FSDP has no whole model to ask, so evaluation gives the loss alone.")
            return metrics
        pairs = self.answer(self.eval_dataset if eval_dataset is None else eval_dataset)
        expected, given = ([normalize(pair[place]) for pair in pairs] for place in (0, 1))
        rates = {
            f"{metric_key_prefix}_wer": jiwer.wer(expected, given),
            f"{metric_key_prefix}_cer": jiwer.cer(expected, given),
        }
        self.log(rates)
        return {**metrics, **rates}

    def answer(self, dataset) -> list[tuple[str, str]]:
        """The expected and the given last answer of every row."""
        model, collator = self.accelerator.unwrap_model(self.model), self.data_collator
        model.eval()
        mine, pairs = range(self.args.process_index, len(dataset), self.args.world_size), []
        batch_size = self.args.per_device_eval_batch_size
        for start in range(0, len(mine), batch_size):
            conversations = [collator.messages(dataset[index]) for index in mine[start : start + batch_size]]
            inputs = collator.processor.apply_chat_template(
                [messages[:-1] for messages in conversations],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                padding=True,
            ).to(self.args.device)
            with torch.no_grad(), self.compute_loss_context_manager():
                output = model.generate(**inputs, max_new_tokens=self.args.max_new_tokens, do_sample=False)
            new = output[:, inputs["input_ids"].shape[1] :]
            given = collator.processor.batch_decode(new, skip_special_tokens=True)
            pairs += zip((answer_text(messages[-1]["content"]) for messages in conversations), given, strict=True)
        return gather_object(pairs)


def normalize(text: str) -> str:
    """Lower case, without punctuation, one space between words."""
    return " ".join(re.sub(r"[^\w\s']", " ", text.lower()).split())


class MarkComplete(TrainerCallback):
    """Marks a checkpoint when all processes have written their part of it."""

    def on_save(self, args, state, control, **kwargs):
        args.distributed_state.wait_for_everyone()
        if args.should_save:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def newest_checkpoint(output_dir: str) -> str | None:
    steps = [int(path.parent.name.rpartition("-")[2]) for path in Path(output_dir).glob(f"checkpoint-*/{COMPLETE}")]
    return str(Path(output_dir) / f"checkpoint-{max(steps)}") if steps else None


def refuse_another_run(args: Arguments):
    """An interrupted run continues only with the arguments that it was started with."""
    own = ("model", "stage", "data", "train_markers", "lora_r", "lora_alpha", "learning_rate", "seed", "max_steps")
    own = {name: getattr(args, name) for name in (*own, "num_train_epochs")}
    path = Path(args.output_dir) / "arguments.json"
    if path.is_file() and newest_checkpoint(args.output_dir):
        then = json.loads(path.read_text())
        differing = [
            f"{name} was {then.get(name)!r}, is {value!r}" for name, value in own.items() if then.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"{args.output_dir} holds checkpoints of another run: {'; '.join(differing)}. Go on with its "
                "arguments, or name a new --output_dir."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(own, indent=2) + "\n")


def write_projector(adapter: Path, path: Path):
    """What `upload.py build --projector` reads: the projector and, if they learned, the rows of the two markers."""
    tensors = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        if name.endswith("audio_projector.weight"):
            tensors["audio_projector.weight"] = tensor
        elif name.endswith("trainable_tokens_delta"):
            tensors["audio_markers.weight"] = tensor
    save_file(tensors, path)


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
    collator = ChatCollator(processor, needs_audio=args.stage == "projector")
    with args.main_process_first(desc="reading the data"):
        dataset = load_rows(args.data, args.streaming)
        eval_dataset = load_rows(args.eval) if args.eval else None
    dataset = select_rows(dataset, collator, args)
    if eval_dataset is not None:
        eval_dataset = select_rows(eval_dataset, collator, args)

    output, start = Path(args.output_dir), time.time()
    trainer = AnswerTrainer(
        model=load_model(args),
        args=args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        callbacks=[MarkComplete()],
    )
    learning = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    result = trainer.train(resume_from_checkpoint=newest_checkpoint(args.output_dir))
    metrics = trainer.evaluate() if eval_dataset is not None else {}
    trainer.save_model(str(output / "adapter"))
    summary = {
        "stage": args.stage,
        "learning parameters": learning,
        "rows": None if args.streaming else len(dataset),
        "steps": trainer.state.global_step,
        "seconds": round(time.time() - start, 1),
        "rows per second": result.metrics["train_samples_per_second"],
        "loss": round(result.training_loss, 4),
        **{name: round(value, 4) for name, value in metrics.items() if name in ("eval_loss", "eval_wer", "eval_cer")},
    }
    if torch.cuda.is_available():
        summary["peak memory of the GPU in GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if args.should_save:
        if args.stage == "projector":
            write_projector(output / "adapter", output / PROJECTOR_FILE)
        if args.export:
            export(args, processor, output / "adapter")
        draw_losses(trainer.state.log_history, output / "loss.png")
        (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main(arguments: list[str] | None = None):
    parser = HfArgumentParser(Arguments, description=__doc__.strip().splitlines()[0])
    try:
        (args,) = parser.parse_args_into_dataclasses(arguments)
        summary = train(args)
    except ValueError as error:
        parser.exit(1, f"train.py: {error}\n")
    if args.should_log:
        print("\n".join(f"{name:<32} {value}" for name, value in summary.items()))


if __name__ == "__main__":
    main()
