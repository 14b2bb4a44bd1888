"""
Trains the speech adapter from the published parts, through every stage; each goes on where it was interrupted:

    python -m speech.recipe            all rounds of recipe.json, hours; the adapter goes to speech/adapter
    python -m speech.recipe --short    some minutes: 240 clips; fails unless the loss falls below MAX_LOSS

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
from publishing.checkpoints import PROJECTOR_FILE
from publishing.paths import ROOT, only_run, write_json
from speech import clips, parts, recordings
from speech.recordings import BUILD, rows_of
from speech.run import ADAPTER, has_fast_bfloat16
from training.arguments import Arguments
from training.resuming import newest_checkpoint
from training.train import train


class Round(NamedTuple):
    """One run of `python -m training --stage lora`, which starts from the adapter of the round before."""

    name: str
    data: list[str]  # folders of clips
    # The folder of Whisper, whose windows are as long as the longest clip. Windows of 10 s cost a quarter of Whisper's
    # own 30 s, and the projector learns no less.
    encoder: str
    steps: int
    batch: int  # clips of a step
    accumulated: int  # parts into which a CPU divides each step, because long clips need memory
    learning_rate: float
    projector_learning_rate: float
    seed: int  # for the order of the clips
    settings: dict | None = None  # in the place of those of all rounds; sdpa is twice as fast with 1,500 tokens


RECIPE = json.loads((ROOT / "speech" / "recipe.json").read_text())
DATA = {data["name"]: data for data in RECIPE["data"]}  # folders of clips
# The seventh and eighth round took eight minutes and 73 GiB of an H200; a CPU would need days.
ROUNDS, SHORT = ([Round(**settings) for settings in RECIPE[name]] for name in ("rounds", "short"))
HELD_OUT = "held-out"  # clips whose texts are never in training
ALIGNER = "whisper-10s"  # the folder of Whisper that finds word times
MAX_LOSS = 5.5  # over the last ten steps of the short run; it starts at 11, and guessing without audio reaches 4.7
ON_GPU = torch.cuda.is_available()
# On a CPU two processes of one thread each are faster than one process of two threads.
PROCESSES = 2 if not ON_GPU and os.cpu_count() > 1 else 1
SETTINGS = {
    **RECIPE["settings"],
    "attn_implementation": "sdpa" if ON_GPU else "eager",
    "use_cpu": not ON_GPU,
    "bf16": ON_GPU or has_fast_bfloat16(),  # other CPUs are four times as slow with it
    "dataloader_num_workers": os.cpu_count() if ON_GPU else 1,
    # A GPU encodes clips faster than it reads encoded ones.
    "encoder_cache": None if ON_GPU else BUILD / "encoded",
}


def run_train(processes: int = 1, **arguments) -> dict:
    """Runs `training` with these arguments, unless that run has ended; returns its summary."""
    summary = arguments["output_dir"] / "summary.json"
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


def make_start(encoder: str, seed: int = 0) -> Path:
    """Builds the repository of the parts, with a random projector."""
    parts.make_parts(BUILD)
    bases = {"base": str(BUILD / "smollm2"), "audio_encoder": str(BUILD / encoder)}
    return build_once(BUILD / f"start-{encoder}-{seed}", **bases, audio_tokens="trimmed", seed=seed)


def make_aligned(start: Path, name: str) -> Path:
    """Builds the same repository with a projector in closed form, from a tenth of the clips of a folder."""
    output = BUILD / f"align-{name}"
    run_train(
        stage="align",
        model=start,
        aligner=BUILD / ALIGNER,
        align_rows=DATA[name]["clips"] // 10,
        data=make_data([name]),
        output_dir=output,
        audio_tokens="trimmed",
    )
    projector = str(output / PROJECTOR_FILE)
    return build_once(BUILD / f"aligned-{name}", checkpoint=str(start), projector=projector)


def make_data(names: list[str]) -> list[Path]:
    """Makes the folders of clips that are missing; returns the rows of all."""
    # Training never says a text that the test has.
    exclude = recordings.fetch_packages(BUILD / "debian") / recordings.TEXTS
    for name in names:
        if not rows_of(name).is_file():
            data, held_out = DATA[name], name == HELD_OUT
            clips.write_clips(BUILD / name, data["clips"], data["seed"], held_out, exclude, data["mix"])
    return [rows_of(name) for name in names]


def train_round(round_: Round, adapter: Path | None) -> Path:
    """Trains from an adapter, or from a projector in closed form. Returns the folder of the run."""
    model, output = make_start(round_.encoder), BUILD / f"run-{round_.name}"
    if adapter is None:
        model = make_aligned(model, round_.data[0])
    accumulated = 1 if ON_GPU else round_.accumulated
    summary = run_train(
        PROCESSES,
        **SETTINGS | (round_.settings or {}),
        stage="lora",
        model=model,
        adapter=adapter,
        data=make_data(round_.data),
        output_dir=output,
        per_device_train_batch_size=round_.batch // PROCESSES // accumulated,
        gradient_accumulation_steps=accumulated,
        max_steps=round_.steps,
        save_steps=max(60, round_.steps // 10),
        seed=round_.seed,
        learning_rate=round_.learning_rate,
        projector_learning_rate=round_.projector_learning_rate,
    )
    print(f"{round_.name}: loss {summary['loss']}, {summary['rows per second']} clips a second")
    return output


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="some minutes, and nothing is shipped")
    is_short = parser.parse_args().short
    rounds = SHORT if is_short else ROUNDS
    make_data([name for round_ in rounds for name in round_.data])
    adapter = None
    for round_ in rounds:
        output = train_round(round_, adapter)
        adapter = output / "adapter"
    if not is_short:
        write_adapter(adapter, ADAPTER)
        make_data([HELD_OUT])
    elif (loss := last_loss(output)) > MAX_LOSS:
        raise SystemExit(f"The loss of the last steps is {loss:.2f}; expected at most {MAX_LOSS}.")


if __name__ == "__main__":
    main()
