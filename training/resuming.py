"""Checkpoints of a run that was interrupted: which is the newest whole one, and whether it is of the same run."""

import json
import time
from pathlib import Path

from transformers import TrainerCallback

from evaluation.rows import describe_data, describe_model, list_changes
from publishing.paths import CHECKSUMS, check_content, read_checksums, write_checksums, write_json
from training.arguments import Arguments


SECONDS_FILE = "seconds.json"  # says how long training took up to a checkpoint
# What a run that goes on has in common with the one that was interrupted, beside the content of the data.
SAME = ("model", "stage", "data", "weights", "audio_column", "text_column", "instruction", "audio_tokens")
SAME += ("train_markers", "adapter", "lora_r", "lora_alpha", "learning_rate", "projector_learning_rate", "seed")
SAME += ("max_steps", "num_train_epochs")


class MarkComplete(TrainerCallback):
    """
    Marks a checkpoint by the checksums of its files when all processes have written their part of it. Writes the
    seconds that training took so far into it, and has the loss up to it logged, for a summary of the whole run.
    Goes on from a checkpoint, up to which training took `seconds`, or from 0.
    """

    def __init__(self, checkpoint: str | None):
        self.seconds = json.loads((Path(checkpoint) / SECONDS_FILE).read_text()) if checkpoint else 0

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


def newest_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint that was written whole."""
    steps = [int(path.parent.name.rpartition("-")[2]) for path in Path(output_dir).glob(f"checkpoint-*/{CHECKSUMS}")]
    return str(Path(output_dir) / f"checkpoint-{max(steps)}") if steps else None


def refuse_another_run(args: Arguments):
    """
    Writes down the arguments of a run and what tells its data from other data. Raises a ValueError if the folder has
    checkpoints of a run with others, or if its newest checkpoint was damaged.
    """
    path, checkpoint = Path(args.output_dir) / "arguments.json", newest_checkpoint(args.output_dir)
    now = {**{name: getattr(args, name) for name in SAME}, "content of data": describe_data(args.data, args.columns)}
    now["content of model"] = describe_model(args.model)
    now["content of adapter"] = describe_model(args.adapter) if args.adapter else None
    if checkpoint:
        before = json.loads(path.read_text())
        if differing := list_changes(before, now, (*SAME, "content of model", "content of adapter"), "content of data"):
            text = "; ".join(differing)
            advice = "Go on with its arguments, or name a new --output-dir."
            raise ValueError(f"{args.output_dir} holds checkpoints of another run: {text}. {advice}")
        try:
            check_content(Path(checkpoint), read_checksums(Path(checkpoint)))
        except ValueError as error:
            raise ValueError(f"{checkpoint}: {error}. Remove it to go on from the one before.") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, now)
