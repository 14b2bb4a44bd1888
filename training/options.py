"""The command line of training. Options of transformers are read from its source: its import takes seconds."""

from __future__ import annotations  # `settings_of` reads them as text

import ast
import difflib
import importlib.util
import math
import os
import re
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from dataclasses import dataclass, fields
from pathlib import Path

from publishing.arguments import columns_of, dashed, setting


DESCRIPTION = """
Trains the audio path of a folder that `upload.py build` made:

    python -m training --stage align --aligner WHISPER --model DIR --data FILE --output-dir OUT    a start without steps
    python -m training --stage projector --model DIR --data FILE --output-dir OUT    the projector alone
    python -m training --stage lora --model DIR --data FILE --output-dir OUT         LoRA on the language model as well

On several GPUs or machines: `accelerate launch [--config_file training/fsdp-8-gpus.yaml] -m training ...`. All
arguments of transformers' TrainingArguments can be given, such as `--bf16` or `--per-device-train-batch-size 4`;
`--help-all` lists them. Underscores do as well as dashes.
"""
# The values of expressions in the source that are no literals.
KNOWN = {"trainer_log_levels.keys()": ["detail", "debug", "info", "warning", "error", "critical", "passive"]}
TRUE, FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
LEARNING_RATES = {"align": None, "projector": 1e-3, "lora": 2e-4}  # by stage
AUDIO_TOKENS = ("fixed", "trimmed", "both")


@dataclass
class Options:
    """The settings of `python -m training`, and those of TrainingArguments that have other defaults here."""

    model: str | None = setting(None, "folder of `upload.py build`, or a Hub id")
    stage: str = setting("projector", "what learns", choices=tuple(LEARNING_RATES))
    aligner: str | None = setting(None, "the whole Whisper that --stage align needs")
    align_rows: int = setting(1000, "how many rows with speech --stage align uses")
    data: list[str] | None = setting(None, "JSON lines, or a folder or id of `datasets` (ID[:SPLIT]), with `messages`")
    weights: list[float] | None = setting(None, "how often rows are drawn from each of --data (default: all rows once)")
    keep: list[str] | None = setting(None, "rows of what the model can do already, asked before and after training")
    eval: list[str] | None = setting(None, "the same, for loss, word and character error rate")
    measure_pieces: bool = setting(False, "find with --eval the longest piece of a recording that the model can take")
    streaming: bool = setting(False, "read rows when they are needed; set --max-steps as well")
    audio_column: str | None = setting(None, "column of recordings with transcripts, instead of `messages`")
    text_column: str | None = setting(None, "column of their transcripts")
    instruction: str | None = setting(None, "what is asked about each of them (default: Transcribe the audio.)")
    skip_bad_rows: bool = setting(False, "leave out rows that cannot be used, naming them")
    audio_tokens: str | None = setting(None, "both: drawn for each batch (default: the model's)", choices=AUDIO_TOKENS)
    adapter: str | None = setting(None, "`adapter` of an earlier run to start from")
    train_markers: bool = setting(False, "<|audio_bos|> and <|audio_eos|> learn as well")
    lora_r: int = setting(16, "rank of LoRA")
    lora_alpha: int = setting(32, "scale of LoRA, over its rank")
    lora_dropout: float = setting(0.05, "dropout of LoRA's inputs")
    load_in_4bit: bool = setting(False, "hold the language model in 4 bits (bitsandbytes)")
    attn_implementation: str | None = setting(None, "eager is faster on a CPU than the default, sdpa")
    encoder_cache: str | None = setting(None, "folder that keeps the audio encoder's outputs")
    export: str | None = setting(None, "folder for the whole model, LoRA merged, at the end")
    max_new_tokens: int = setting(256, "length of an answer to --eval")
    projector_learning_rate: float | None = setting(None, "for the projector beside LoRA (default: --learning-rate)")

    learning_rate: float | None = setting(None, "1e-3 for the projector, 2e-4 with LoRA")
    length_column_name: str | None = setting(None, "column of lengths that group the rows (default: count tokens)")
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    logging_steps: float = 10
    save_total_limit: int | None = 2
    report_to: str = "tensorboard"
    remove_unused_columns: bool = False  # rows are read whole
    prediction_loss_only: bool = True  # the logits of 152,064 words are not kept


def parse_bool(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise ArgumentTypeError(f"{text!r} must be true or false")
    return text.lower() in TRUE


def literal(expression: ast.expr):
    """The value of an expression in the source, None if it has to be computed."""
    try:
        return ast.literal_eval(expression)
    except ValueError:
        return KNOWN.get(ast.unparse(expression))


def settings_of(annotation: str, enums: dict[str, list[str]]) -> dict:
    """The arguments of `add_argument` that read a value of this type."""
    types = annotation.split(" | ")
    if "bool" in types:
        return {"type": parse_bool, "nargs": "?", "const": True}
    if types[0] in enums:
        return {"choices": enums[types[0]]}
    many = {"nargs": "+"} if types[0].startswith("list[") else {}
    return many | {"type": {"int": int, "float": float}.get(types[0].removeprefix("list[").rstrip("]"), str)}


def read_inherited() -> dict[str, dict]:
    """The fields of TrainingArguments, each as the arguments of `add_argument`; `default` is only shown."""
    folder = Path(importlib.util.find_spec("transformers").origin).parent
    sources = [(folder / name).read_text(encoding="utf-8") for name in ("training_args.py", "trainer_utils.py")]
    classes = [node for source in sources for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    enums = {
        node.name: [literal(line.value) for line in node.body if isinstance(line, ast.Assign)]
        for node in classes
        if [ast.unparse(base) for base in node.bases] == ["ExplicitEnum"]
    }
    (body,) = (node.body for node in classes if node.name == "TrainingArguments")
    options = {}
    for node in body:
        if isinstance(node, ast.AnnAssign):
            keywords = getattr(node.value, "keywords", [])  # of `field(...)`
            parts = {word.arg: word.value for word in keywords} or {"default": node.value}
            metadata = parts.get("metadata", ast.Dict([], []))
            option = {literal(key): literal(value) for key, value in zip(metadata.keys, metadata.values, strict=True)}
            default = literal(parts["default"]) if "default" in parts else None
            options[node.target.id] = settings_of(ast.unparse(node.annotation), enums) | option | {"default": default}
    return options


def read_options() -> tuple[dict[str, dict], dict[str, dict]]:
    """The fields of [`Options`], and those of TrainingArguments, as [`read_inherited`] gives them."""
    inherited, own = read_inherited(), {}
    for field in fields(Options):
        option = inherited.get(field.name, settings_of(field.type, {}))
        own[field.name] = option | field.metadata | {"default": field.default}
    return own, inherited


def make_parser(shows_all: bool) -> ArgumentParser:
    """A parser of [`read_options`]. Its help lists unchanged options of TrainingArguments only if `shows_all`."""
    settings = {"formatter_class": RawDescriptionHelpFormatter, "add_help": False, "argument_default": SUPPRESS}
    parser = ArgumentParser("training", "python -m training [options]", DESCRIPTION, **settings)
    own = parser.add_argument_group("options of this tool")
    changed = parser.add_argument_group("options of transformers' TrainingArguments with other defaults")
    other = parser.add_argument_group("other options")
    other.add_argument("-h", "--help", action="help", help="show this help message and exit")
    other.add_argument("--help-all", action="help", help="show all options of TrainingArguments as well and exit")
    ours, inherited = read_options()
    for name, option in (inherited | ours).items():
        default = option.pop("default", None)
        if default not in (None, ""):
            option["help"] += f" (default: {default})"
        if name not in ours and not shows_all:
            option["help"] = SUPPRESS
        group = other if name not in ours else changed if name in inherited else own
        group.add_argument(dashed(name), **option)
        if default is True:
            group.add_argument(dashed(f"no_{name}"), dest=name, action="store_false", help=SUPPRESS)
    return parser


def check_options(options: dict):
    """Raises a ValueError if a field of [`Arguments`] is missing or contradicts another one."""
    for name in ("model", "data"):
        if not options.get(name):
            raise ValueError(f"--{name} is missing; --help shows the usual commands.")
    columns_of(options.get("audio_column"), options.get("text_column"))
    if (options.get("stage") == "align") != bool(options.get("aligner")):
        raise ValueError("--stage align needs --aligner, a folder or Hub id of Whisper, and no other stage does.")
    if options.get("measure_pieces") and (not options.get("eval") or options["stage"] == "align"):
        raise ValueError("--measure-pieces needs --eval, recordings with transcripts, and another stage than align.")
    if options.get("streaming") and options.get("max_steps", -1) < 1:
        raise ValueError("--streaming needs --max-steps, because the number of rows is not known.")
    weights = options.get("weights")
    is_given, are_positive = weights is not None, all(0 < weight < math.inf for weight in weights or ())
    if is_given and (len(weights) != len(options["data"]) or not are_positive):
        raise ValueError(f"--weights needs a positive number for each of the {len(options['data'])} sources of --data.")
    if options.get("label_smoothing_factor"):
        raise ValueError("--label-smoothing-factor would smooth labels that are not shifted by one; leave it out.")
    if options.get("resume_from_checkpoint"):
        raise ValueError(
            "--resume-from-checkpoint is not needed: a run goes on from the newest checkpoint of its --output-dir."
        )
    if options.get("keep") and options["stage"] == "align":
        raise ValueError("--keep asks a model that is trained; --stage align changes the projector alone.")
    if options.get("save_total_limit") == 1:
        raise ValueError("--save-total-limit 1 leaves nothing if the run ends while it saves; give 2 or more.")
    export = options.get("export")
    if export and Path(export).exists() and any(Path(export).iterdir()):
        raise ValueError(f"--export {export} is not empty; name a new folder.")
    is_sharded = options.get("fsdp") or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if options.get("keep") and is_sharded:
        raise ValueError("FSDP has no whole model to ask; leave --keep out, and run `evaluation predict` instead.")
    if options.get("measure_pieces") and is_sharded:
        raise ValueError(
            "FSDP has no whole model to ask; leave --measure-pieces out, and run `evaluation pieces` later."
        )
    if options.get("encoder_cache") and is_sharded:
        reason = "where a process that reads a window from it would leave out layers that the others call"
        raise ValueError(f"--encoder-cache cannot be used with FSDP, {reason}. Leave it out.")


def parse(words: list[str]) -> dict:
    """The options that are given, by the names of the fields of [`Arguments`]. Help and errors end the process."""
    words = [re.sub("^--[^=]+", lambda option: option[0].replace("_", "-"), word) for word in words]
    parser = make_parser("--help-all" in words)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        known = [dashed(name) for fields in read_options() for name in fields]
        likely = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {likely[0]}?" if likely else ""))
    try:
        check_options(vars(options))
    except ValueError as error:
        parser.error(str(error))
    return vars(options)
