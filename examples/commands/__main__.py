"""
Teaches the speech model a task of its own: spoken commands -> JSON, in a quarter of an hour of two CPU cores.

    python -m examples.commands            makes clips, trains, builds a folder; scores it on other phrases and voices
    python -m examples.commands --short    the same with a few clips, in two minutes, which only shows that it runs

The task is `task.json`: its instruction, words, phrases and voices. `--task FILE` takes another one. Everything is in
the folder that `--output` names. It needs `make speech`, and of Debian espeak-ng and flite; see docs/fine-tuning.md.
"""

import argparse
import json
import random
import shutil
import string
import subprocess
from pathlib import Path

from transformers.utils import logging

from configuration_qwen2_audio_vl import TRANSCRIBE
from demo.ask import user, write_rows
from demo.world import Speech, espeak_variants, say
from evaluation.generate import write_sound
from evaluation.predict import predict
from evaluation.report import score_folder
from evaluation.scoring import ALL, AS_GIVEN, summary, table
from publishing.build import build
from publishing.paths import ROOT, write_json
from speech.recordings import rows_of, short_prompts
from speech.run import REPO, has_fast_bfloat16
from training.arguments import Arguments
from training.train import train


TASK = Path(__file__).with_name("task.json")
CLIPS, SHORT_CLIPS = {"training": 320, "test": 60}, {"training": 16, "test": 4}
STEPS, SHORT_STEPS = 65, 2
PROMPTS = {"training": 60, "test": 40}  # telephone prompts: those that the model labels itself, and those of the score
ANSWER_LENGTH = 40  # tokens
SETTINGS = {
    "stage": "lora",
    "weights": [0.6, 0.2, 0.2],  # of commands, of their transcripts and of old recordings
    "audio_column": "audio_filepath",
    "text_column": "pred_text",
    "learning_rate": 7e-4,
    "projector_learning_rate": 1e-4,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "audio_tokens": "trimmed",
    "attn_implementation": "eager",
    "save_steps": 25,
    "report_to": "none",
    "use_cpu": True,
}


def make_row(audio: str, instruction: str, answer: str) -> dict:
    asked = user([{"type": "audio", "audio": audio}, {"type": "text", "text": instruction}])
    return {"messages": [*asked, {"role": "assistant", "content": answer}]}


def list_voices(engine: str) -> set[str]:
    """Lists the voices of an installed synthesizer; for espeak-ng languages, alone and with each variant."""
    if engine == "flite":
        told = subprocess.run(["flite", "-lv"], check=True, capture_output=True, text=True).stdout
        return set(told.partition(":")[2].split())
    told = subprocess.run(["espeak-ng", "--voices"], check=True, capture_output=True, text=True).stdout
    languages = [line.split()[1] for line in told.splitlines()[1:]]
    variants = espeak_variants(held_out=True) + espeak_variants(held_out=False)
    return {*languages, *(f"{language}+{variant}" for language in languages for variant in variants)}


def check_task(task: dict):
    """Raises a ValueError that names what a task lacks. A synthesizer would say an unknown voice with another one."""
    if missing := [name for name in ("instruction", "words", "phrases", "voices") if not task.get(name)]:
        raise ValueError(f"The task has no {', '.join(missing)}; examples/commands/task.json shows what is needed.")
    for part in CLIPS:
        if not task["phrases"].get(part) or not task["voices"].get(part):
            raise ValueError(f"The task needs phrases and voices for the part {part!r}.")
        for phrase in task["phrases"][part]:
            named = {name for _, name, _, _ in string.Formatter().parse(phrase) if name is not None}
            if unknown := sorted(named - set(task["words"])):
                raise ValueError(f"The phrase {phrase!r} names {unknown}; the task has words for {[*task['words']]}.")
        for engine, names in task["voices"][part].items():
            if engine not in ("espeak-ng", "flite"):
                raise ValueError(f"The voices must be of espeak-ng or flite, got {engine!r}.")
            if unknown := sorted(set(names) - list_voices(engine)):
                raise ValueError(f"{engine} has no voice {', '.join(unknown)} here.")


def make_clips(task: dict, part: str, count: int, folder: Path) -> tuple[Path, Path]:
    """
    Says random commands by random voices of a part of the task. Writes the clips, and returns two files of rows: the
    commands as JSON, and their transcripts.
    """
    rng, speeches, said = random.Random(part), [], []
    voices = [(engine, voice) for engine, names in task["voices"][part].items() for voice in names]
    for _ in range(count):
        words = {name: rng.choice(values) for name, values in task["words"].items()}
        text = rng.choice(task["phrases"][part]).format(**words)
        said.append((words, text))
        speeches.append(Speech(text, *rng.choice(voices), round(rng.uniform(0.85, 1.2), 2), rng.randint(30, 70)))
    (folder / part).mkdir(parents=True, exist_ok=True)
    commands, transcripts = [], []
    for number, (clip, (words, text)) in enumerate(zip(say(speeches), said, strict=True)):
        audio = f"{part}/{number:03}.flac"
        write_sound(clip.numpy(), str(folder / audio), "flac", "flac")
        commands.append(make_row(audio, task["instruction"], json.dumps(words)))
        transcripts.append(make_row(audio, TRANSCRIBE, text))
    paths = folder / f"{part}.jsonl", folder / f"{part}-transcripts.jsonl"
    for path, rows in zip(paths, (commands, transcripts), strict=True):
        write_rows(path, rows)
    return paths


def choose_prompts(folder: Path) -> list[Path] | None:
    """Writes rows of telephone prompts for training and for the score; None where `make speech` found no prompts."""
    if not rows_of("recordings").is_file():
        return None
    rows, paths = short_prompts(), []
    random.Random(0).shuffle(rows)
    for part, count in PROMPTS.items():
        chosen, rows = rows[:count], rows[count:]
        paths.append(folder / f"{part}-prompts.jsonl")
        write_rows(paths[-1], [make_row(row["audio"], TRANSCRIBE, row["text"]) for row in chosen])
    return paths


def ask(model: Path, rows: Path, output: Path, **options) -> Path:
    """Answers rows anew, and returns the predictions."""
    shutil.rmtree(output, ignore_errors=True)
    dtype = "bfloat16" if has_fast_bfloat16() else "float32"
    predict(model, [rows], output, max_new_tokens=ANSWER_LENGTH, dtype=dtype, **options)
    return output / "predictions.jsonl"


def run(task: dict, output: Path, is_short: bool) -> dict:
    """Does all of it; a training that was interrupted goes on. Returns the scores of the test clips and the summary."""
    check_task(task)
    if not REPO.is_dir():
        raise FileNotFoundError(f"There is no {REPO}; `make speech` makes it.")
    counts, steps = (SHORT_CLIPS, SHORT_STEPS) if is_short else (CLIPS, STEPS)
    output.mkdir(parents=True, exist_ok=True)
    facts, written = {"task": task, "clips": counts}, output / "task.json"
    if written.is_file() and json.loads(written.read_text(encoding="utf-8")) != facts:
        raise ValueError(f"{output} has another task, or another number of clips; name another folder as --output.")
    write_json(written, facts)
    own, transcripts = make_clips(task, "training", counts["training"], output)
    test, old = make_clips(task, "test", counts["test"], output)
    known, old = (choose_prompts(output) if not is_short else None) or (transcripts, old)
    before = output / "before" / "predictions.jsonl"
    if not (output / "run").is_dir():  # a resumed training needs the same rows
        ask(REPO, known, before.parent)
    settings = {**SETTINGS, "data": [own, transcripts, before], "keep": [old], "max_steps": steps, "model": REPO}
    settings |= {"output_dir": output / "run", "encoder_cache": output / "encoded", "bf16": has_fast_bfloat16()}
    summary_of_training = train(Arguments(**settings, max_new_tokens=ANSWER_LENGTH))
    shutil.rmtree(output / "model", ignore_errors=True)
    folder = build(checkpoint=output / "run" / "adapter", output=output / "model")
    ask(folder, test, output / "results", arms=("silence",))
    scores = score_folder(output / "results", needs_json=True)
    write_json(output / "scores.json", {"scores": scores, "training": summary_of_training})
    return {"scores": scores, "training": summary_of_training}


def main():
    parser = argparse.ArgumentParser(
        "python -m examples.commands", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", type=Path, default=TASK, help="default: examples/commands/task.json")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "commands", help="default: build/commands")
    parser.add_argument("--short", action="store_true", help="a few clips and steps")
    options = parser.parse_args()
    logging.set_verbosity_error()
    try:
        task = json.loads(options.task.read_text(encoding="utf-8"))
        results = run(task, options.output, options.short)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    scores, kept = results["scores"], results["training"]["kept"]
    print(f"{table(scores)}\n{summary(scores)}")
    exact = scores["arms"][AS_GIVEN][ALL]["exact"]["value"]
    print(f"{exact * scores['arms'][AS_GIVEN][ALL]['rows']:.0f} of {scores['arms'][AS_GIVEN][ALL]['rows']} are right.")
    print(f"Old task, {kept['metric']}: {kept['before']:.1%} before, {kept['after']:.1%} after.")
    print(f"The folder: {options.output / 'model'}; the report: {options.output / 'results' / 'report.html'}")


if __name__ == "__main__":
    main()
