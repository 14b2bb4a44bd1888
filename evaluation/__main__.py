"""
Scores a model, in two steps that may be far apart in time and place:

    python -m evaluation predict REPO --data DATA --output DIR    asks the model row by row; goes on where it stopped
    python -m evaluation score DIR                                scores the answers; needs no model and no GPU

DATA is what `python -m training` takes: chat messages, or with --audio-column and --text-column recordings with
transcripts, from JSON lines or `datasets` (NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT). For several GPUs: `accelerate
launch -m evaluation`.
"""

import argparse
import logging
from pathlib import Path

from evaluation.settings import CHOICES, Settings


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    # Settings has the defaults: an option that is not given is not in the result.
    command = commands.add_parser("predict", help="ask a model", argument_default=argparse.SUPPRESS)
    command.add_argument("repo", metavar="REPO", help="folder of upload.py build, or a Hub id")
    command.add_argument("--data", nargs="+", required=True, help="as for training")
    command.add_argument("--output", required=True, metavar="DIR", help="folder of the results")
    command.add_argument("--audio-column", help="name of a column of recordings that have transcripts")
    command.add_argument("--text-column", help="name of the column of their transcripts")
    command.add_argument("--instruction", help="what is asked about each of them (default: Transcribe the audio.)")
    command.add_argument("--group-column", help="groups of rows that are scored for themselves as well")
    command.add_argument("--transcript-column", help="what each clip of a row says, for the arms text and swapped")
    command.add_argument("--streaming", action="store_true", help="read the data as it is needed")
    command.add_argument("--limit", type=int, help="ask only the first so many rows")
    command.add_argument("--arms", nargs="+", help=f"ask again, without something: {', '.join(CHOICES['arms'])}")
    command.add_argument("--batch-size", type=int, help="rows, or requests, at a time (default: 8)")
    command.add_argument("--max-new-tokens", type=int, help="greatest length of an answer (default: 256)")
    command.add_argument("--audio-tokens", help="fixed or trimmed (default: the model's; a server has its own)")
    command.add_argument("--dtype", help=f"of the weights: {', '.join(CHOICES['dtype'])} (default: auto, as stored)")
    command.add_argument("--seed", type=int, help="(default: 0)")
    command.add_argument("--backend", help="transformers, or vllm: a server with OpenAI's API (default: transformers)")
    command.add_argument("--url", help="address of the server, up to and with /v1")
    command.add_argument("--served-name", help="name of the model at the server (default: the first)")
    command.add_argument("--no-media", dest="keep_media", action="store_false", help="keep no media for the report")
    command = commands.add_parser("score", help="score the answers")
    command.add_argument("folder", metavar="DIR", help="what predict wrote")
    return parser


def main(arguments: list[str] | None = None):
    parser = make_parser()
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    # transformers imports peft and so bitsandbytes, which on a CPU warns about a kernel that it can do without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # What is slow to import comes after what can be wrong with the options.
    try:
        if command == "predict":
            Settings(**options)
            from evaluation.predict import predict

            predict(**options)
        else:
            folder = Path(options["folder"])
            if not folder.is_dir():
                raise ValueError(f"There is no folder {folder}; `python -m evaluation predict` makes one.")
            from evaluation.report import score_folder
            from evaluation.scoring import table

            print(table(score_folder(folder)))
            print(f"\n{folder / 'report.html'} has every answer.")
    except (ValueError, OSError) as error:
        parser.exit(1, f"evaluation {command}: {error}\n")


if __name__ == "__main__":
    main()
