"""
The command line of training. Importing `Arguments` imports torch, which takes seconds. Its fields, and those of
transformers' TrainingArguments, are therefore read from the source, so that help and errors come at once.
"""

import ast
import difflib
import importlib.util
import os
import re
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from pathlib import Path


DESCRIPTION = """
Trains the audio path of a folder that `upload.py build` made:

    python -m training --stage align --aligner WHISPER --model DIR --data FILE --output-dir OUT    a start without steps
    python -m training --stage projector --model DIR --data FILE --output-dir OUT    the projector alone
    python -m training --stage lora --model DIR --data FILE --output-dir OUT         LoRA on the language model as well

On several GPUs or machines: `accelerate launch [--config_file training/fsdp-8-gpus.yaml] -m training ...`. All
arguments of transformers' TrainingArguments can be given, such as `--bf16` or `--per-device-train-batch-size 4`;
`--help-all` lists them. Underscores do as well as dashes.
"""
# Expressions in the source that are no literals.
KNOWN = {"trainer_log_levels.keys()": ["detail", "debug", "info", "warning", "error", "critical", "passive"]}
TRUE, FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")


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
    return {"nargs": "+"} if types[0].startswith("list[") else {"type": {"int": int, "float": float}.get(types[0], str)}


def read_fields(tree: ast.Module, name: str, enums: dict[str, list[str]]) -> dict[str, dict]:
    """The fields of a dataclass, each as the arguments of `add_argument`; `default` is only shown."""
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = {}
    for node in body:
        if isinstance(node, ast.AnnAssign):
            is_call = isinstance(node.value, ast.Call)
            parts = {word.arg: word.value for word in node.value.keywords} if is_call else {"default": node.value}
            metadata = parts.get("metadata", ast.Dict([], []))
            option = {literal(key): literal(value) for key, value in zip(metadata.keys, metadata.values, strict=True)}
            default = literal(parts["default"]) if "default" in parts else None
            fields[node.target.id] = settings_of(ast.unparse(node.annotation), enums) | option | {"default": default}
    return fields


def read_options() -> tuple[dict[str, dict], dict[str, dict]]:
    """The fields of [`Arguments`] that are its own or changed, and those of TrainingArguments."""
    folder = Path(importlib.util.find_spec("transformers").origin).parent
    paths = Path(__file__).with_name("arguments.py"), folder / "training_args.py", folder / "trainer_utils.py"
    ours, theirs, shared = (ast.parse(path.read_text(encoding="utf-8")) for path in paths)
    enums = {
        node.name: [literal(line.value) for line in node.body if isinstance(line, ast.Assign)]
        for node in theirs.body + shared.body
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["ExplicitEnum"]
    }
    inherited = read_fields(theirs, "TrainingArguments", enums)
    own = read_fields(ours, "Arguments", enums)
    return {name: inherited.get(name, {}) | option for name, option in own.items()}, inherited


def dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def make_parser(shows_all: bool) -> ArgumentParser:
    """A parser of the options of [`Arguments`]. Its help lists unchanged ones of TrainingArguments if `shows_all`."""
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


def columns_of(audio_column: str | None, text_column: str | None) -> tuple[str, str] | None:
    """
    The `columns` of [`load_rows`] from the options of a command line.

    Raises:
        ValueError: if only one is given.
    """
    if (audio_column is None) != (text_column is None):
        raise ValueError("--audio-column and --text-column must be given together, or neither of them.")
    return None if audio_column is None else (audio_column, text_column)


def check_options(options: dict):
    """
    Raises:
        ValueError: if a field of [`Arguments`] is missing or contradicts another one.
    """
    for name in ("model", "data"):
        if not options.get(name):
            raise ValueError(f"--{name} is missing; --help shows the usual commands.")
    columns_of(options.get("audio_column"), options.get("text_column"))
    if (options.get("stage") == "align") != bool(options.get("aligner")):
        raise ValueError("--stage align needs --aligner, a folder or Hub id of Whisper, and no other stage does.")
    if options.get("streaming") and options.get("max_steps", -1) < 1:
        raise ValueError("--streaming needs --max-steps, because the number of rows is not known.")
    if options.get("save_total_limit") == 1:
        raise ValueError("--save-total-limit 1 leaves nothing if the run ends while it saves; give 2 or more.")
    export = options.get("export")
    if export and Path(export).exists() and any(Path(export).iterdir()):
        raise ValueError(f"--export {export} is not empty; name a new folder.")
    if options.get("encoder_cache") and (options.get("fsdp") or os.environ.get("ACCELERATE_USE_FSDP") == "true"):
        raise ValueError(
            "--encoder-cache cannot be used with FSDP, where a process that reads a window from it would leave out "
            "layers that the others call. Leave it out."
        )


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
