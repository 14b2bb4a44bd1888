"""The command line of every benchmark: it prints tables and puts them into `benchmarks/README.md`."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from transformers.utils import logging

from publishing.paths import ROOT


README = ROOT / "benchmarks" / "README.md"


def table(head: Iterable, rows: Iterable[Iterable]) -> str:
    """Returns a table in Markdown, without a line break at its end."""
    head = list(head)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def report(path: str, description: str, main: Callable[..., list[str]], options: dict[str, dict] | None = None):
    """
    Runs a benchmark with the options of the command line, prints what it returns and fills the README with it.

    Args:
        path: `__file__` of the benchmark; the README has marks with the name of that file.
        description: The docstring of the benchmark, which `--help` shows.
        main: Measures. It is called with the options by name, and returns tables and paragraphs in Markdown.
        options: Options by name, each with the arguments of `add_argument`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="put the tables into benchmarks/README.md")
    for name, settings in (options or {}).items():
        parser.add_argument(name, **settings)
    values = vars(parser.parse_args())
    fills_readme = values.pop("readme")
    logging.set_verbosity_error()
    text = "\n\n".join(main(**values)) + "\n"
    print(text)
    if fills_readme:
        fill(Path(path).name, text)


def fill(name: str, text: str, document: Path = README):
    """Puts `text` between the marks `<!-- name -->` and `<!-- end of name -->` of a document."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    content = document.read_text()
    if content.count(start) != 1 or content.count(end) != 1:
        raise ValueError(f"{document} must have one line {start.strip()} and one {end.strip()} below it.")
    before, _, rest = content.partition(start)
    document.write_text(before + start + text + end + rest.partition(end)[2])
