"""
Base weights -> repository folder -> Hub.

    upload.py build --base DIR_OR_ID --audio-encoder DIR_OR_ID [--projector FILE] [--adapter DIR_OR_ID] --output DIR
    upload.py build --checkpoint DIR_OR_ID --output DIR     a trained model, or a peft adapter of one, which is merged:
                                                            adds code, card and checksums
    upload.py check DIR_OR_ID       does it load and answer, are its files complete and unchanged
    upload.py gguf DIR_OR_ID --output DIR       two files for llama.cpp
    upload.py push DIR REPO [--results DIR] [--gguf DIR]    check, then upload in one commit
    upload.py smoke REPO            for CI: pull from the Hub into an empty cache, and ask about the examples
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from publishing.arguments import HUB_ID, check_build, require_source
from publishing.paths import files_of, print_table


# The commands check their arguments first, and then import torch and transformers, which takes seconds.


def build_folder(base, audio_encoder, output, checkpoint, adapter, **options):
    check_build(base, audio_encoder, output, checkpoint, adapter)
    from publishing.build import build

    folder = build(base, audio_encoder, output, checkpoint=checkpoint, adapter=adapter, **options)
    size = sum((folder / file).stat().st_size for file in files_of(folder))
    print(f"{output} is ready: {size / 1e9:.2f} GB.")


def check_folder(folder: Path, trust_code: bool) -> tuple[dict[str, str], dict]:
    """Returns what was checked, by topic: files, answers, and the scores of the card; and what was loaded."""
    from publishing.card import EVALUATION
    from publishing.check import check

    table, loaded = check(folder, trust_code)
    if (folder / EVALUATION).is_dir():
        from evaluation.card import check_results  # which needs kaldialign

        table["scores"] = check_results(folder)
    return table, loaded


def check_source(repo: str, revision: str | None, trust_code: bool):
    require_source(repo)
    from shipped_files import find_folder

    print_table(check_folder(find_folder(repo, revision), trust_code)[0])


def export_files(repo: str, output: Path, kind: str):
    require_source(repo)
    from publishing.gguf import export

    for path in export(repo, output, kind):
        print(f"{path} is ready: {path.stat().st_size / 1e9:.2f} GB.")


def push_folder(folder: Path, repo: str, results: Path | None, gguf: Path | None, trust_code: bool, **options):
    sources = ((folder, "upload.py build"), (results, "python -m evaluation predict"), (gguf, "upload.py gguf"))
    for path, tool in sources:
        if path is not None and not path.is_dir():
            raise ValueError(f"There is no folder {path}; `{tool}` makes one.")
    from publishing.hub import push

    if results is not None:
        from evaluation.card import add_results

        add_results(folder, results)
    if gguf is not None:
        from publishing.gguf import add_files

        add_files(folder, gguf, repo)
    _, loaded = check_folder(folder, trust_code)
    commit = push(folder, repo, loaded, **options)
    print(f"{commit.pr_url or commit.commit_url}\ncommit {commit.oid}")


def smoke_repo(repo: str, revision: str | None):
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"{repo} is no Hub id; `upload.py check` is for folders.")
    from publishing.hub import smoke

    print_table(smoke(repo, revision))


def ask_source(repo: str, revision: str | None):
    require_source(repo)
    from publishing.check import ask

    print(json.dumps(ask(repo, revision)))


def make_parser() -> ArgumentParser:
    parser = ArgumentParser("upload.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="base weights -> repository folder")
    command.set_defaults(run=build_folder)
    command.add_argument(
        "--base", metavar="DIR_OR_ID", help="Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint, or ID@REVISION"
    )
    command.add_argument("--audio-encoder", metavar="DIR_OR_ID", help="Whisper checkpoint")
    command.add_argument("--checkpoint", metavar="DIR_OR_ID", help="instead of these, a trained model or an adapter")
    command.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    command.add_argument("--projector", metavar="FILE", help="trained audio_projector.weight, safetensors or .pt")
    command.add_argument("--adapter", metavar="DIR_OR_ID", help="trained checkpoint of the whole model")
    command.add_argument("--audio-tokens", choices=("fixed", "trimmed"), help="default: as it was trained, or fixed")
    command.add_argument("--seed", type=int, default=0, help="seed of an untrained projector (default: 0)")
    for name, run, help in (
        ("check", check_source, "does a folder or Hub id load and answer, are its files complete and unchanged"),
        ("smoke", smoke_repo, "pull from the Hub into an empty cache, and ask about the examples"),
        ("ask", ask_source, "what check and smoke run in a fresh process; prints JSON"),
    ):
        command = commands.add_parser(name, help=help)
        command.set_defaults(run=run)
        command.add_argument("repo", metavar="REPO")
        command.add_argument("--revision", help="branch, tag or commit of the Hub")
        if name == "check":
            command.add_argument("--trust-code", action="store_true", help="run code that is not this checkout's")
    command = commands.add_parser("gguf", help="two files for llama.cpp: the language model, and both towers")
    command.set_defaults(run=export_files)
    command.add_argument("repo", metavar="DIR_OR_ID", help="what build made, or ID@REVISION")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the files")
    command.add_argument(
        "--type", dest="kind", default="f16", choices=("f32", "f16", "bf16", "q8_0"), help="of the matrices"
    )
    command = commands.add_parser("push", help="check, then upload in one commit")
    command.set_defaults(run=push_folder)
    command.add_argument("folder", type=Path, metavar="DIR")
    command.add_argument("repo", metavar="REPO")
    command.add_argument("--revision", help="branch to commit to; made if it is not there")
    command.add_argument("--pr", action="store_true", help="open a pull request instead of committing")
    command.add_argument(
        "--results", type=Path, metavar="DIR", help="of `python -m evaluation`; its scores go in the card"
    )
    command.add_argument("--gguf", type=Path, metavar="DIR", help="of `upload.py gguf`; its files are pushed as well")
    command.add_argument("--trust-code", action="store_true", help="push code that is not this checkout's")
    command.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    return parser


def main(arguments: list[str] | None = None):
    parser = make_parser()
    options = vars(parser.parse_args(arguments))
    command, run = options.pop("command"), options.pop("run")
    try:
        run(**options)
    except (ValueError, OSError, ImportError) as error:  # the errors of the Hub's client are OSErrors
        parser.exit(1, f"upload.py {command}: {error}\n")
    except Exception as error:  # hostile files run into many others, within the libraries that read them
        parser.exit(1, f"upload.py {command}: these files cannot be used: {type(error).__name__}: {error}\n")


if __name__ == "__main__":
    main()
