"""
Base weights -> repository folder -> Hub.

    upload.py build --base DIR_OR_ID --audio-encoder DIR_OR_ID [--projector FILE] [--adapter DIR_OR_ID] --output DIR
    upload.py build --checkpoint DIR_OR_ID --output DIR     a trained model, or a peft adapter of one, which is merged:
                                                            adds code, card and checksums
    upload.py check DIR_OR_ID       does it load and answer, are its files complete and unchanged
    upload.py push DIR REPO [--results DIR]     check, then upload in one commit
    upload.py smoke REPO            for CI: pull from the Hub into an empty cache, and ask about the examples
"""

import argparse
import json

from huggingface_hub.errors import HfHubHTTPError

from publishing.build import build
from publishing.check import ask, check
from publishing.hub import push, smoke
from publishing.paths import files_of


COMMANDS = {"build": build, "check": check, "push": push, "smoke": smoke, "ask": ask}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="base weights -> repository folder")
    command.add_argument("--base", metavar="DIR_OR_ID", help="Qwen2-VL checkpoint, or ID@REVISION")
    command.add_argument("--audio-encoder", metavar="DIR_OR_ID", help="Whisper checkpoint")
    command.add_argument("--checkpoint", metavar="DIR_OR_ID", help="instead of these, a trained model or an adapter")
    command.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    command.add_argument("--projector", metavar="FILE", help="trained audio_projector.weight, safetensors or .pt")
    command.add_argument("--adapter", metavar="DIR_OR_ID", help="trained checkpoint of the whole model")
    command.add_argument("--audio-tokens", help="fixed or trimmed (default: what the model was trained with, or fixed)")
    command.add_argument("--seed", type=int, default=0, help="of an untrained projector (default: 0)")
    for name, help in (
        ("check", "does a folder or Hub id load and answer, are its files complete and unchanged"),
        ("smoke", "pull from the Hub into an empty cache, and ask about the examples"),
        ("ask", "what check and smoke run in a fresh process; prints JSON"),
    ):
        command = commands.add_parser(name, help=help)
        command.add_argument("repo", metavar="REPO")
        command.add_argument("--revision", help="branch, tag or commit of the Hub")
        if name == "check":
            command.add_argument("--trust-code", action="store_true", help="run code that is not this checkout's")
    command = commands.add_parser("push", help="check, then upload in one commit")
    command.add_argument("folder", metavar="DIR")
    command.add_argument("repo", metavar="REPO")
    command.add_argument("--revision", help="branch to commit to; made if it is not there")
    command.add_argument("--pr", action="store_true", help="open a pull request instead of committing")
    command.add_argument("--results", metavar="DIR", help="of `python -m evaluation`: its scores go into the card")
    command.add_argument("--trust-code", action="store_true", help="push code that is not this checkout's")
    command.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    options = vars(parser.parse_args(arguments))
    name = options.pop("command")
    try:
        result = COMMANDS[name](**options)
    except (ValueError, OSError, HfHubHTTPError) as error:
        parser.exit(1, f"upload.py {name}: {error}\n")
    except Exception as error:  # hostile files run into many others, within the libraries that read them
        parser.exit(1, f"upload.py {name}: these files cannot be used: {type(error).__name__}: {error}\n")
    if name == "build":
        size = sum((result / file).stat().st_size for file in files_of(result))
        print(f"{options['output']} is ready: {size / 1e9:.2f} GB.")
    elif name == "push":
        print(f"{result.pr_url or result.commit_url}\ncommit {result.oid}")
    elif name == "ask":
        print(json.dumps(result))
    else:
        table = result[0] if name == "check" else result
        print("\n".join(f"{topic:<30} {what}" for topic, what in table.items()))


if __name__ == "__main__":
    main()
