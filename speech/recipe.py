"""
Trains the speech adapter from the published parts, through every stage; each goes on where it was interrupted:

    python -m speech.recipe            all stages, hours; the adapter goes to speech/adapter
    python -m speech.recipe --short    ten minutes: 320 clips, and the loss has to fall below MAX_LOSS

Everything is in build/speech. The stages are those of upload.py and `python -m training`.
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

from publishing.build import build
from publishing.paths import only_run, write_json
from speech import clips, parts, recordings
from speech.recordings import BUILD
from speech.run import ADAPTER
from training.arguments import Arguments
from training.resuming import newest_checkpoint
from training.train import train


# Windows of 10 s cost a quarter of Whisper's own 30 s, and the projector learns no less.
ENCODER, WHOLE = "whisper-10s", "whisper"
MAX_LOSS = 5.5  # over the last ten steps of the short run; it starts at 11, and guessing without audio reaches 4.7


class Data(NamedTuple):
    """A folder of clips."""

    name: str
    mix: str  # a name from speech.sentences.MIXES
    clips: int
    seed: int


class Round(NamedTuple):
    """
    One run of `python -m training --stage lora`, which starts from the adapter of the round before.

    Attributes:
        encoder: The folder of Whisper; its windows are as long as the longest clip.
        batch: Clips of a step.
        accumulated: Parts into which a CPU divides each step, because long clips need memory.
    """

    name: str
    data: tuple[Data, ...]
    encoder: str
    steps: int
    batch: int
    accumulated: int
    learning_rate: float
    projector_learning_rate: float
    seed: int = 42  # for the order of the clips


BATCH = 8  # clips of a step on a CPU
ALL_CLIPS = tuple(
    Data(f"data-{seed}", mix, count, seed)
    for mix, counts in {
        "rare": {1: 6_000, 2: 6_000, 8: 11_500},
        "plain": {3: 4_000, 5: 2_600, 9: 8_500},
        "lengthy": {4: 1_000},
        "lengthier": {6: 2_000, 7: 4_000, 10: 5_000},
    }.items()
    for seed, count in counts.items()
)
RARE_1, RARE_2, _, PLAIN_3, PLAIN_5, _, LENGTHY_4, LENGTHIER_6, _, _ = ALL_CLIPS
ROUNDS = (
    Round("first", (RARE_1,), ENCODER, 480, BATCH, 1, 1e-3, 3e-4),
    Round("second", (RARE_2,), ENCODER, 540, BATCH, 1, 7e-4, 2e-4),
    Round("third", (PLAIN_3,), ENCODER, 450, BATCH, 1, 7e-4, 2e-4),
    Round("fourth", (LENGTHY_4,), WHOLE, 120, BATCH, 2, 3e-4, 1e-4),
    Round("fifth", (PLAIN_5,), ENCODER, 300, BATCH, 1, 7e-4, 2e-4),
    Round("sixth", (LENGTHIER_6,), WHOLE, 200, BATCH, 4, 5e-4, 1.5e-4),
    # These two took eight minutes and 73 GiB of an H200; a CPU would need days.
    Round("seventh", ALL_CLIPS, WHOLE, 520, 64, 32, 1.5e-3, 4e-4),
    Round("eighth", ALL_CLIPS, WHOLE, 420, 64, 32, 1.2e-3, 3e-4, seed=1),
)
SHORT = (Round("short", (Data("data-short", "rare", 320, 3),), ENCODER, 40, BATCH, 1, 1e-3, 3e-4),)
HELD_OUT = Data("held-out", "rare", 600, 0)  # its texts are never in training
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
    "save_total_limit": 10,
    "dataloader_num_workers": os.cpu_count() if ON_GPU else 1,
    # A GPU encodes clips faster than it reads encoded ones.
    "encoder_cache": None if ON_GPU else BUILD / "encoded",
}


def run_train(processes: int = 1, **arguments) -> dict:
    """Runs `training` with these arguments, unless that run has ended; returns its summary."""
    summary = Path(arguments["output_dir"]) / "summary.json"
    if summary.is_file():
        return json.loads(summary.read_text())
    if processes == 1:
        with only_run(arguments["output_dir"], "--output-dir"):
            return train(Arguments(**arguments))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["--module", "training"]
    for name, value in arguments.items():
        if value is not None:
            command += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(os.cpu_count() // processes)})
    return json.loads(summary.read_text())


def build_once(output: Path, **arguments) -> Path:
    return output if output.is_dir() else build(output=str(output), **arguments)


def make_start(seed: int = 0, encoder: str = ENCODER) -> Path:
    """Builds the repository of the parts, with a random projector."""
    parts.make_parts(BUILD)
    name = "-".join(["start", *(["whole"] if encoder != ENCODER else []), *([str(seed)] if seed else [])])
    bases = {"base": str(BUILD / "smollm2"), "audio_encoder": str(BUILD / encoder)}
    return build_once(BUILD / name, **bases, audio_tokens="trimmed", seed=seed)


def make_aligned(start: Path, data: Data) -> Path:
    """Builds the same repository with a projector in closed form, from a tenth of some clips."""
    output = BUILD / f"align-{data.name}"
    run_train(
        stage="align",
        model=start,
        aligner=BUILD / ENCODER,
        align_rows=data.clips // 10,
        data=[rows_of(data)],
        output_dir=output,
        audio_tokens="trimmed",
    )
    projector = str(output / "audio_projector.safetensors")
    return build_once(BUILD / f"aligned-{data.name}", checkpoint=str(start), projector=projector)


def make_data(*folders: Data) -> list[Path]:
    """Makes the folders of clips that are missing; returns the rows of all."""
    # Training never says a text that the test has.
    exclude = recordings.fetch_packages(BUILD / "debian") / recordings.TEXTS
    for data in folders:
        if not rows_of(data).is_file():
            clips.write_clips(BUILD / data.name, data.clips, data.seed, data == HELD_OUT, exclude, data.mix)
    return [rows_of(data) for data in folders]


def rows_of(data: Data) -> Path:
    return BUILD / data.name / "rows.jsonl"


def last_loss(output: Path) -> float:
    """Reads the mean loss of the last ten steps of a run."""
    state = json.loads((Path(newest_checkpoint(str(output))) / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line][-1]


def write_adapter(source: Path, folder: Path):
    """Writes the part of a run's adapter that ships: LoRA in bfloat16, which halves it, and the projector as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": None, "auto_mapping": None})
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
        if not adapter:
            model = make_aligned(model, round_.data[0])
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
        summary = run_train(PROCESSES, **settings, stage="lora", model=model, output_dir=output)
        adapter = {"adapter": output / "adapter"}
        print(f"{round_.name}: loss {summary['loss']}, {summary['rows per second']} clips a second")
    if not is_short:
        write_adapter(output / "adapter", ADAPTER)
        make_data(HELD_OUT)
    elif (loss := last_loss(output)) > MAX_LOSS:
        raise SystemExit(f"The loss of the last steps is {loss:.2f}; expected at most {MAX_LOSS}.")


if __name__ == "__main__":
    main()
