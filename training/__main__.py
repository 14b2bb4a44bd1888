"""`python -m training`: reads the command line before it imports what takes seconds."""

import sys

from training.options import parse


def main(words: list[str] | None = None):
    options = parse(sys.argv[1:] if words is None else words)

    from publishing.paths import only_run, print_table, resolve, silence_peft

    silence_peft()
    from datasets.exceptions import DatasetsError

    from shipped_files import WHOLE_MODEL
    from training.arguments import Arguments
    from training.train import train

    try:
        args = Arguments(**options)
        resolve(args.model, WHOLE_MODEL)  # a model that is not there is reported before the data is read
        with only_run(args.output_dir, "--output-dir", args.process_index == 0):
            summary = train(args)
    except (ValueError, OSError, DatasetsError) as error:
        print(f"training: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("training: stopped. The same command goes on from the newest checkpoint, if any.", file=sys.stderr)
        sys.exit(130)
    if args.should_log:
        print_table(summary)


if __name__ == "__main__":
    main()
