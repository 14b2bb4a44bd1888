"""make test ONLY=tests/test_options.py: the command line of training, before and after its slow imports."""

import json
from dataclasses import fields

import pytest
from helpers import answer, start_python
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from configuration_qwen2_audio_vl import TRANSCRIBE
from publishing import paths
from training import options
from training.__main__ import main
from training.arguments import Arguments


@pytest.mark.parametrize(("option", "shows_all"), [("--help", False), ("--help-all", True), ("--help_all", True)])
def test_help_lists_the_options_of_this_tool_first(capsys, option, shows_all):
    with pytest.raises(SystemExit) as done:
        main([option])
    assert done.value.code == 0
    page = capsys.readouterr().out
    order = ["-m training --stage lora", "options of this tool", "--stage {", "--adapter", "--learning-rate"]
    places = [page.index(part) for part in [*order, "other options:"]]
    assert places == sorted(places)
    assert ("--adam-beta1" in page) == ("--max-steps MAX_STEPS" in page) == shows_all
    assert "(default: 0.05)" in page and f"(default: {TRANSCRIBE})" in " ".join(page.split())


def test_options_are_those_of_the_installed_transformers():
    """They are read from the source of TrainingArguments, as its own parser reads them from the class."""
    ours, inherited = options.read_options()
    assert {*inherited, *ours} == {field.name for field in fields(Arguments) if field.init}
    expected, parsers = {}, (HfArgumentParser(TrainingArguments), options.make_parser(shows_all=True))
    for action in parsers[0]._actions:
        expected.setdefault(action.dest, action)  # the first is not its opposite, `--no-...`
    assert {*inherited} == {*expected} - {"help"}
    for action in parsers[1]._actions:
        if action.dest in inherited and not action.option_strings[0].startswith("--no-"):
            other = expected[action.dest]
            assert [*(action.choices or ())] == [*(other.choices or ())], action.dest
            assert (action.type in (int, float)) == (other.type in (int, float)), action.dest
            assert (action.type is options.parse_bool) == (other.type is string_to_bool), action.dest


LINES = {  # what is typed -> a part of what is answered
    "--help": "options of this tool",
    "--lerning_rate 3": "unknown argument --lerning-rate; did you mean --learning-rate?",
    "x": "unknown argument x",
    "--data a": "--model is missing",
    "--model m": "--data is missing",
    "--stage all": "argument --stage: invalid choice: 'all' (choose from 'align', 'projector', 'lora')",
    "--audio_tokens half": "argument --audio-tokens: invalid choice: 'half' (choose from 'fixed', 'trimmed', 'both')",
    "--optim best": "argument --optim: invalid choice: 'best'",
    "--log-level loud": "argument --log-level: invalid choice: 'loud'",
    "--max_steps many": "argument --max-steps: invalid int value: 'many'",
    "--lora-dropout=x": "argument --lora-dropout: invalid float value: 'x'",
    "--bf16 perhaps": "argument --bf16: 'perhaps' must be true or false",
    "--model m --data a --save_total_limit 1": "--save-total-limit 1 leaves nothing",
    "--model m --data a --audio-column a": "--audio-column and --text-column must be given together",
    "--model m --data a --streaming": "--streaming needs --max-steps",
    "--model m --data a --label-smoothing-factor 0.1": "labels that are not shifted by one",
    "--model m --data a --resume-from-checkpoint c": "goes on from the newest checkpoint of its --output-dir",
    "--model m --data a --export .": "--export . is not empty",
    "--model m --data a --encoder-cache c --fsdp": "--encoder-cache cannot be used with FSDP",
}


COMMAND_LINES = """
    import contextlib, io, json, runpy, sys
    pages = []
    for line in json.loads(sys.argv[1]):
        sys.argv[1:] = line.split()
        with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.redirect_stderr(page):
            try:
                runpy.run_module("training", run_name="__main__")
            except SystemExit as done:
                pages.append([done.code, page.getvalue()])
    print("TOKENS", json.dumps([pages, [*sys.modules]]))
    """


def test_help_and_errors_come_before_slow_imports():
    output = answer(start_python(COMMAND_LINES, json.dumps([*LINES]), cwd=paths.ROOT))
    pages, modules = json.loads(output.removeprefix("TOKENS"))
    for (line, message), (code, page) in zip(LINES.items(), pages, strict=True):
        assert message in page and code == (0 if line == "--help" else 2), line
    assert not {"torch", "transformers", "datasets", "peft", "numpy"} & {*modules}


def test_options_have_two_spellings():
    needed = ["--model", "m", "--data", "a", "b"]
    dashes = "--output-dir=a_b --lora-r 4 --bf16 --no-dataloader-pin-memory --eval x y --warmup-steps 1 --tf32 no"
    parsed = options.parse([*needed, *dashes.split()])
    assert parsed == options.parse([*needed, *dashes.replace("-", "_").replace("__", "--").split()])
    expected = {"model": "m", "data": ["a", "b"], "output_dir": "a_b", "eval": ["x", "y"], "lora_r": 4, "bf16": True}
    assert parsed == expected | {"dataloader_pin_memory": False, "tf32": False, "warmup_steps": 1.0}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stage": "all"}, "--stage must be align, projector or lora, got 'all'"),
        ({"encoder_cache": "cache"}, "--encoder-cache cannot be used with FSDP"),
        ({"audio_tokens": "half"}, "--audio-tokens must be fixed, trimmed or both, got 'half'"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(tmp_path, monkeypatch, more, message):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate does
    with pytest.raises(ValueError, match=message):
        Arguments(**{"model": "start", "data": ["train.jsonl"], "output_dir": tmp_path, "use_cpu": True, **more})
