"""
Trains the speech adapter from the published parts, through every stage; each goes on where it was interrupted:

    python -m speech.recipe            all stages, hours; the adapter goes to speech/adapter
    python -m speech.recipe --short    ten minutes: 320 clips, and the loss has to fall below MAX_LOSS

Everything lies in build/speech. The stages are those of upload.py and of `python -m training`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser

from publishing.build import build
from publishing.paths import only_run
from speech import clips, parts, recordings
from speech.recordings import BUILD
from speech.run import ADAPTER
from training import train


# Padding to Whisper's own 30 s costs four times as much as to 10 s, and the projector learns no less.
ENCODER, WHOLE = "whisper-10s", "whisper"
MAX_LOSS = 5.5  # of the last ten steps of the short run; it is 11 before, and 4.7 by guessing without audio


class Data(NamedTuple):
    """A folder of clips."""

    name: str
    mix: str  # of their texts: speech.sentences.MIXES
    clips: int
    seed: int


class Round(NamedTuple):
    """
    One run of `train.py --stage lora`, which starts from the adapter of the round before.

    Attributes:
        encoder: The folder of Whisper, whose windows the clips have to fit into.
        batch: Clips of a step.
        accumulated: In so many parts a CPU computes each step, because long clips need memory.
    """

    name: str
    data: tuple[Data, ...]
    encoder: str
    steps: int
    batch: int
    accumulated: int
    learning_rate: float
    projector_learning_rate: float
    seed: int = 42  # of the order of the clips


BATCH = 8  # clips of a step on a CPU
RARE_WORDS = Data("data-1", "rare", 6_000, 1), Data("data-2", "rare", 6_000, 2), Data("data-8", "rare", 11_500, 8)
PLAIN_TEXTS = Data("data-3", "plain", 4_000, 3), Data("data-5", "plain", 2_600, 5), Data("data-9", "plain", 8_500, 9)
LONG_CLIPS = (
    Data("data-4", "lengthy", 1_000, 4),
    Data("data-6", "lengthier", 2_000, 6),
    Data("data-7", "lengthier", 4_000, 7),
    Data("data-10", "lengthier", 5_000, 10),
)
ALL_CLIPS = RARE_WORDS + PLAIN_TEXTS + LONG_CLIPS
ROUNDS = (
    Round("first", RARE_WORDS[:1], ENCODER, 480, BATCH, 1, 1e-3, 3e-4),
    Round("second", RARE_WORDS[1:2], ENCODER, 540, BATCH, 1, 7e-4, 2e-4),
    Round("third", PLAIN_TEXTS[:1], ENCODER, 450, BATCH, 1, 7e-4, 2e-4),
    Round("fourth", LONG_CLIPS[:1], WHOLE, 120, BATCH, 2, 3e-4, 1e-4),
    Round("fifth", PLAIN_TEXTS[1:2], ENCODER, 300, BATCH, 1, 7e-4, 2e-4),
    Round("sixth", LONG_CLIPS[1:2], WHOLE, 200, BATCH, 4, 5e-4, 1.5e-4),
    # Eight minutes of an H200, of which they took 73 GiB; a CPU would need days.
    Round("seventh", ALL_CLIPS, WHOLE, 520, 64, 32, 1.5e-3, 4e-4),
    Round("eighth", ALL_CLIPS, WHOLE, 420, 64, 32, 1.2e-3, 3e-4, seed=1),
)
SHORT = (Round("short", (Data("data-short", "rare", 320, 3),), ENCODER, 40, BATCH, 1, 1e-3, 3e-4),)
HELD_OUT = Data("held-out", "rare", 600, 0)  # which has texts of its own
ON_GPU = torch.cuda.is_available()
# On a CPU two processes of one thread each are faster than one process of two threads.
PROCESSES = 2 if not ON_GPU and os.cpu_count() > 1 else 1
SETTINGS = {
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "seconds",
    "audio_tokens": "trimmed",
    "adam_beta2": 0.98,
    "warmup_steps": 20,
    "lora_dropout": 0.0,
    "bf16": True,
    "attn_implementation": "sdpa" if ON_GPU else "eager",
    "use_cpu": not ON_GPU,
    "save_total_limit": 10,  # speech.curve asks them all
    "dataloader_num_workers": os.cpu_count() if ON_GPU else 1,
    # A GPU encodes clips faster than it reads their rows.
    **({} if ON_GPU else {"encoder_cache": BUILD / "encoded"}),
}


def run_train(processes: int = 1, **arguments) -> dict:
    """`train.py` with these arguments; a run that has ended is not repeated."""
    summary = Path(arguments["output_dir"]) / "summary.json"
    if not summary.is_file():
        given = {name: value if isinstance(value, list) else [value] for name, value in arguments.items()}
        words = [str(word) for name, values in given.items() for word in (f"--{name}", *values)]
        if processes > 1:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            threads = {"OMP_NUM_THREADS": str(os.cpu_count() // processes)}
            subprocess.run([*launch, "--module", "training", *words], check=True, env=os.environ | threads)
        else:
            (args,) = HfArgumentParser(train.Arguments).parse_args_into_dataclasses(words)
            with only_run(args.output_dir, "--output-dir"):
                train.train(args)
    return json.loads(summary.read_text())


def build_once(output: Path, **arguments) -> Path:
    return output if output.is_dir() else build(output=str(output), **arguments)


def make_start(seed: int = 0, encoder: str = ENCODER) -> Path:
    """The repository of the parts, with a random projector."""
    parts.make_parts(BUILD)
    bases = {"base": str(BUILD / "smollm2"), "audio_encoder": str(BUILD / encoder)}
    name = "-".join(["start", *([str(seed)] if seed else []), *(["whole"] if encoder == WHOLE else [])])
    return build_once(BUILD / name, **bases, audio_tokens="trimmed", seed=seed)


def make_data(*wanted: Data) -> list[Path]:
    """The rows of folders of clips."""
    # What is asked at the end is never said in training.
    exclude = recordings.fetch_packages(BUILD / "debian") / recordings.TEXTS
    for data in wanted:
        if not rows_of(data).is_file():
            is_held_out = data == HELD_OUT
            clips.write_clips(BUILD / data.name, data.clips, data.seed, is_held_out, exclude, os.cpu_count(), data.mix)
    return [rows_of(data) for data in wanted]


def rows_of(data: Data) -> Path:
    return BUILD / data.name / "rows.jsonl"


def last_loss(output: Path) -> float:
    """The mean loss of the last ten steps of a run."""
    state = json.loads((Path(train.newest_checkpoint(str(output))) / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line][-1]


def write_adapter(source: Path, folder: Path):
    """What ships of a run's adapter: LoRA in bfloat16, which halves it, and the projector as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": None,
        "auto_mapping": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {
        name: tensor if "audio_projector" in name else tensor.bfloat16()
        for name, tensor in load_file(source / "adapter_model.safetensors").items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--short", action="store_true", help="ten minutes, and nothing is shipped")
    is_short = parser.parse_args().short
    rounds = SHORT if is_short else ROUNDS
    make_data(*(data for round_ in rounds for data in round_.data))
    adapter = {}
    for round_ in rounds:
        output, model = BUILD / f"run-{round_.name}", make_start(encoder=round_.encoder)
        accumulated = 1 if ON_GPU else round_.accumulated
        settings = {
            **SETTINGS,
            **adapter,
            "data": [rows_of(data) for data in round_.data],
            "per_device_train_batch_size": round_.batch // PROCESSES // accumulated,
            "gradient_accumulation_steps": accumulated,
            "max_steps": round_.steps,
            "save_steps": max(60, round_.steps // 10),
            "seed": round_.seed,
            "learning_rate": round_.learning_rate,
            "projector_learning_rate": round_.projector_learning_rate,
        }
        found = run_train(PROCESSES, **settings, stage="lora", model=model, output_dir=output)
        adapter = {"adapter": output / "adapter"}
        print(f"{round_.name}: loss {found['loss']}, {found['rows per second']} clips a second")
    if not is_short:
        write_adapter(output / "adapter", ADAPTER)
        make_data(HELD_OUT)
    elif (loss := last_loss(output)) > MAX_LOSS:
        raise SystemExit(f"The loss of the last steps is {loss:.2f}; expected at most {MAX_LOSS}.")


if __name__ == "__main__":
    main()
