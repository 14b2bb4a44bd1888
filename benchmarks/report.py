"""What every benchmark's `main` does: read the options, print the tables, put them into `benchmarks/README.md`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging

from publishing.paths import ROOT


README = ROOT / "benchmarks" / "README.md"


def report(
    path: str, description: str, make: Callable[[argparse.Namespace], str], options: dict[str, dict] | None = None
):
    """
    Args:
        path: `__file__` of the script.
        description: Its docstring, which `--help` shows.
        make: Measures, and returns the tables as Markdown.
        options: Arguments of the script by name, each with what `add_argument` takes.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="put the tables into benchmarks/README.md")
    for name, settings in (options or {}).items():
        parser.add_argument(name, **settings)
    given = parser.parse_args()
    logging.set_verbosity_error()
    text = make(given).strip() + "\n"
    print(text)
    if given.readme:
        fill(Path(path).name, text)


def fill(name: str, text: str, document: Path = README):
    """Puts `text` between the marks `<!-- name -->` and `<!-- end of name -->` of a document."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    content = document.read_text()
    if content.count(start) != 1 or content.count(end) != 1:
        raise ValueError(f"{document} must have one line {start.strip()} and one {end.strip()} below it.")
    before, _, rest = content.partition(start)
    document.write_text(before + start + text + end + rest.partition(end)[2])
