"""
Scores a model in two steps. The second can run later, and on another machine:

    python -m evaluation predict REPO --data DATA --output DIR    asks the model row by row; goes on where it stopped
    python -m evaluation score DIR                                scores the answers; needs no model and no GPU

Beside these, it finds the longest piece of a recording of which the model drops nothing, which `transcribe.py` uses:

    python -m evaluation pieces REPO --data DATA [--write]

DATA is what `python -m training` takes: chat messages, or with --audio-column and --text-column recordings with
transcripts, from JSON lines or `datasets` (NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT). For several GPUs: `accelerate
launch -m evaluation`.
"""

import argparse
from dataclasses import fields
from pathlib import Path

from evaluation.settings import Settings, option_of
from publishing.paths import silence_peft


OF_PIECES = ("audio_column", "text_column", "instruction", "batch_size", "audio_tokens", "dtype")


def find_pieces(writes: bool, settings: Settings):
    if writes and not (Path(settings.repo) / "processor_config.json").is_file():
        raise ValueError(f"--write needs a folder with processor_config.json, and {settings.repo} is none.")
    from evaluation.pieces import longest_kept, measure_repo, store

    results = measure_repo(settings)
    for seconds, pieces, lossy, lost in results:
        print(f"{seconds:>5g} s: {lossy} of {pieces} pieces lost a third of their words; {lost:.1%} of all words lost")
    seconds = longest_kept(results)
    print(f"\nThe longest piece that this model can take: {seconds:g} s (piece_seconds)")
    if writes:
        store(Path(settings.repo), seconds)


def main(arguments: list[str] | None = None):
    settings = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("python -m evaluation", **settings)
    commands = parser.add_subparsers(dest="command", required=True)
    predictor = commands.add_parser("predict", help="ask a model")
    predictor.add_argument("repo", metavar="REPO", help="folder of upload.py build, or a Hub id")
    predictor.add_argument("--data", nargs="+", required=True, help="as for training")
    predictor.add_argument("--output", required=True, metavar="DIR", help="folder of the results")
    for option in fields(Settings)[3:]:
        predictor.add_argument(option_of(option.name), dest=option.name, default=option.default, **option.metadata)
    scorer = commands.add_parser("score", help="score the answers")
    scorer.add_argument("folder", metavar="DIR", help="what predict wrote")
    scorer.add_argument("--json", action="store_true", help="refuse references that are no JSON objects")
    scorer.add_argument("--metric", metavar="FILE:FUNCTION", help="a function: reference, answer -> number or numbers")
    measurer = commands.add_parser("pieces", help="find the longest piece of a recording that the model can take")
    measurer.add_argument("repo", metavar="REPO", help="folder of upload.py build, or a Hub id")
    measurer.add_argument("--data", nargs="+", required=True, help="recordings with transcripts, not trained on")
    measurer.add_argument("--write", action="store_true", help="write it into the folder's processor_config.json")
    for option in fields(Settings):
        if option.name in OF_PIECES:
            measurer.add_argument(option_of(option.name), dest=option.name, default=option.default, **option.metadata)
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    silence_peft()  # before transformers imports it
    try:
        if command == "predict":
            Settings(**options)  # refuses wrong options before the slow imports
            from evaluation.predict import predict

            predict(**options)
        elif command == "pieces":
            find_pieces(options.pop("write"), Settings(output="", **options))
        else:
            folder = Path(options["folder"])
            if not folder.is_dir():
                raise ValueError(f"There is no folder {folder}; `python -m evaluation predict` makes one.")
            from evaluation.report import score_folder
            from evaluation.scoring import summary, table

            scores = score_folder(folder, options["metric"], options["json"])
            print(f"{table(scores)}\n{summary(scores)}")
            print(f"\n{folder / 'report.html'} has every answer.")
    except (ValueError, OSError) as error:
        parser.exit(1, f"evaluation {command}: {error}\n")


if __name__ == "__main__":
    main()
