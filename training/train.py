"""Trains the projector, or the projector and LoRA, with transformers' Trainer and peft."""

import time
from pathlib import Path

import torch
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import load_file
from tqdm import trange
from transformers import AutoModel, BitsAndBytesConfig, Trainer, TrainerState, set_seed
from transformers.utils import logging

from collator import ChatCollator, answer_text
from configuration_qwen2_audio_vl import AUDIO_TOKEN_COUNTS, IGNORED_LABEL
from evaluation.pieces import longest_kept, measure_model
from evaluation.rows import load_rows
from evaluation.scoring import score
from publishing.checkpoints import PROJECTOR_FILE, save_projector
from publishing.paths import load_processor, write_json
from training.arguments import Arguments
from training.closed_form import align
from training.encoder_cache import CachedEncoder
from training.resuming import MarkComplete, newest_checkpoint, refuse_another_run
from training.selection import select_rows
from training.skills import KeptSkill, describe_tasks, join_tasks


logger = logging.get_logger(__name__)

# Attention and MLP of the language model; nothing of the vision tower or the audio encoder has such a path.
LANGUAGE_MODEL = r"(.*\.)?language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def load_model(args: Arguments) -> PeftModel:
    """
    Loads the model. Trainable parameters are float32. Frozen ones keep their stored dtype, or become bfloat16 with
    `--bf16`, so that autocast converts nothing in a step.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.visual", "model.audio_encoder", "model.audio_projector", "lm_head"],
    )
    model = AutoModel.from_pretrained(
        args.model,
        trust_remote_code=True,
        dtype=torch.bfloat16 if args.bf16 else "auto",
        quantization_config=quantization if args.load_in_4bit else None,
        attn_implementation=args.attn_implementation,
    )
    if args.encoder_cache:
        model.model.audio_encoder = CachedEncoder.of(model.model.audio_encoder, args.encoder_cache)
    model = add_adapter(model, args)
    for parameter in model.parameters():
        if parameter.requires_grad:  # bfloat16 would round away updates of 1e-3
            parameter.data = parameter.data.float()
    return model


def add_adapter(model, args: Arguments) -> PeftModel:
    """Adds a new adapter, or the one to start from. A ValueError says in what the latter differs from the arguments."""
    markers = [model.config.audio_bos_token_id, model.config.audio_eos_token_id]
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=LANGUAGE_MODEL if args.stage == "lora" else DUMMY_TARGET_MODULES,
        modules_to_save=["audio_projector"],
        trainable_token_indices={"embed_tokens": markers} if args.train_markers else None,
    )
    if args.adapter is None:
        return get_peft_model(model, config)
    earlier = LoraConfig.from_pretrained(args.adapter)
    names = ("r", "lora_alpha", "target_modules", "trainable_token_indices")
    pairs = [(name, getattr(earlier, name), getattr(config, name)) for name in names]
    if differing := [f"{name} is {there!r} there, {here!r} here" for name, there, here in pairs if there != here]:
        raise ValueError(f"--adapter {args.adapter} is of other arguments: {'; '.join(differing)}.")
    earlier.lora_dropout = args.lora_dropout  # of this run; no weight depends on it
    return PeftModel.from_pretrained(model, args.adapter, is_trainable=True, config=earlier)


class AnswerTrainer(Trainer):
    """[`Trainer`] whose evaluation also generates answers, and compares them with those of the rows."""

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Gives the projector a learning rate of its own, if the arguments name one."""
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
        """Computes no logits before the first label of all rows, where most of the audio is."""
        is_label = (inputs["labels"] != IGNORED_LABEL).any(0)
        kept = min(len(is_label), len(is_label) - int(is_label.int().argmax()) + 1)
        inputs = {**inputs, "labels": inputs["labels"][:, -kept:], "logits_to_keep": kept}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Adds word and character error rate and the share of exact answers, by the rule of `scoring.py`."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.is_fsdp_enabled:
            logger.warning("FSDP has no whole model to ask, so evaluation gives the loss alone.")
            return metrics
        scores = score(self.answer(self.eval_dataset if eval_dataset is None else eval_dataset))
        rates = {f"{metric_key_prefix}_{name}": scores[name]["value"] for name in ("wer", "cer", "exact")}
        rates = {name: rate for name, rate in rates.items() if rate is not None}  # None if no reference has a word
        self.log(rates)
        return {**metrics, **rates}

    def answer(self, dataset, collator: ChatCollator | None = None) -> list[dict]:
        """Returns the last answer of every row and that of the model, as `evaluation.scoring` takes them."""
        model, collator = self.accelerator.unwrap_model(self.model), collator or self.data_collator
        model.eval()
        mine, rows = range(self.args.process_index, len(dataset), self.args.world_size), []
        batch_size = self.args.per_device_eval_batch_size
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        for start in trange(0, len(mine), batch_size, desc="answers", unit="batch", disable=hidden):
            conversations = [collator.messages(dataset[index]) for index in mine[start : start + batch_size]]
            asked = [messages[:-1] for messages in conversations]
            with self.compute_loss_context_manager():
                answers = collator.processor.answer(model, asked, self.args.max_new_tokens)
            for messages, answer in zip(conversations, answers, strict=True):
                rows.append({"text": answer_text(messages[-1]["content"]), "pred_text": answer})
        return gather_object(rows)


EVALUATED = ("eval_loss", "eval_wer", "eval_cer", "eval_exact")  # what the summary has of an evaluation


def mean_loss(history: list[dict]) -> float:
    """The mean loss of all steps, from lines that each have the mean since the line before."""
    lines = [line for line in history if "loss" in line]
    steps = [line["step"] for line in lines]
    total = sum(line["loss"] * (step - last) for line, step, last in zip(lines, steps, [0, *steps], strict=False))
    return total / steps[-1]


def write_projector(adapter: Path, path: Path, processor):
    """Writes what `upload.py build --projector` reads: the projector and, if they learned, the markers."""
    projector = markers = None
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        if name.endswith("audio_projector.weight"):
            projector = tensor
        elif name.endswith("trainable_tokens_delta"):
            markers = tensor
    save_projector(path, projector, processor, markers)


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


def prepare_processor(args: Arguments):
    """Loads the processor, which says from now on with which audio tokens the model was trained."""
    processor = load_processor(args.model)
    processor.trained_audio_tokens = args.audio_tokens or processor.audio_tokens
    if args.audio_tokens in AUDIO_TOKEN_COUNTS:
        processor.audio_tokens = args.audio_tokens
    return processor


def load_data(args: Arguments, collator: ChatCollator) -> list:
    """Loads and selects the rows of `--data`, and those of `--eval` or None."""
    keep = (args.given_length,) if args.given_length else ()
    with args.main_process_first(desc="reading the data"):
        dataset = load_rows(args.data, args.streaming, args.columns, keep, args.weights, args.seed)
        eval_dataset = load_rows(args.eval, columns=args.columns, keep=keep) if args.eval else None
    return [None if rows is None else select_rows(rows, collator, args) for rows in (dataset, eval_dataset)]


def load_complete(trainer: AnswerTrainer, checkpoint: str | None) -> bool:
    """
    Loads the adapter of a checkpoint of the last step, which the Trainer would exceed by one, or with
    `--load-best-model-at-end` that of the best one; returns whether there is one. Parts of a model on several machines
    are left to the Trainer.
    """
    if checkpoint is None or trainer.is_fsdp_enabled:
        return False
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if state.global_step < (trainer.args.max_steps if trainer.args.max_steps > 0 else state.max_steps):
        return False
    trainer.state = state
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer.model.load_adapter(best or checkpoint, trainer.model.active_adapter)
    return True


def run(trainer: AnswerTrainer, checkpoint: str | None, earlier: float) -> dict:
    """Goes on from a checkpoint, which took `earlier` seconds, and evaluates. Returns the summary of the whole run."""
    args, start = trainer.args, time.time()
    learning = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    runtime = 0.0 if load_complete(trainer, checkpoint) else trainer.train(checkpoint).metrics["train_runtime"]
    steps, size = trainer.state.global_step, None if args.streaming else len(trainer.train_dataset)
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    num_rows = steps * rows_per_step if args.streaming else trainer.state.epoch * size
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    summary = {
        "stage": args.stage,
        "learning parameters": learning,
        "rows": size,
        "steps": steps,
        "seconds": round(earlier + time.time() - start, 1),
        "rows per second": round(num_rows / (earlier + runtime), 3),
        "loss": round(mean_loss(trainer.state.log_history), 4),
        **{name: round(value, 4) for name, value in metrics.items() if name in EVALUATED},
    }
    if torch.cuda.is_available():
        summary["peak memory of the GPU in GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return summary


def measure_pieces(trainer: AnswerTrainer, collator: ChatCollator) -> float | None:
    """Returns the seconds of the longest piece that the model can take, None with a warning if it can take none."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model).eval()
    try:
        with trainer.compute_loss_context_manager():
            rows = load_rows(args.eval, columns=args.columns)
            return longest_kept(measure_model(model, collator, rows, args.per_device_eval_batch_size))
    except ValueError as error:
        logger.warning(f"--measure-pieces found no length: {error}")
        return None


def write(trainer: AnswerTrainer, processor, summary: dict):
    """Writes what was learned to `--output-dir`. All processes call it, because they may hold parts of the model."""
    args, output = trainer.args, Path(trainer.args.output_dir)
    trainer.save_model(str(output / "adapter"))
    if args.should_save:
        processor.save_pretrained(output / "adapter")  # which tells `upload.py build` the audio tokens
        if args.stage == "projector":
            write_projector(output / "adapter", output / PROJECTOR_FILE, processor)
        if args.export:
            export(args, processor, output / "adapter")
        draw_losses(trainer.state.log_history, output / "loss.png")
        write_json(output / "summary.json", summary)


def train(args: Arguments) -> dict:
    """
    Trains, or goes on with a run that was interrupted, and writes what was learned to `args.output_dir`: `adapter`
    (peft), `audio_projector.safetensors` (stage projector), `loss.png` and `summary.json`; stage align writes only the
    second and the last. Returns the summary. Raises a ValueError on rows that cannot be used, and on the checkpoints of
    another run.
    """
    if args.process_index == 0:
        refuse_another_run(args)
    set_seed(args.seed)
    processor = prepare_processor(args)
    collator = ChatCollator(processor, args.stage != "lora", processor.trained_audio_tokens, args.instruction)
    dataset, eval_dataset = load_data(args, collator)
    if args.stage == "align":
        return align(args, processor, dataset, collator)
    checkpoint = newest_checkpoint(args.output_dir)
    mark = MarkComplete(checkpoint)
    kept = KeptSkill(args, processor) if args.keep else None
    trainer = AnswerTrainer(load_model(args), args, collator, dataset, eval_dataset, callbacks=[mark])
    before = kept.score_before(trainer, checkpoint is not None) if kept else None
    summary = run(trainer, checkpoint, mark.seconds)
    taught = getattr(processor, "trained_tasks", None)  # a folder of an earlier release has none
    if not args.streaming:
        processor.trained_tasks = taught = join_tasks(taught, describe_tasks(dataset, collator))
    if kept:
        summary["kept"] = kept.compare(trainer, before)
        processor.trained_tasks = join_tasks(taught, kept.describe(summary["kept"]))
    if args.measure_pieces:
        summary["longest piece in seconds"] = processor.piece_seconds = measure_pieces(trainer, collator)
    write(trainer, processor, summary)
    return summary
