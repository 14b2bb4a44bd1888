"""The command line of every benchmark: it prints tables and puts them into a document."""

import argparse
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from transformers.utils import logging

from publishing.paths import ROOT


README = ROOT / "benchmarks" / "README.md"


def table(head: Sequence[str], rows: Iterable[Iterable]) -> str:
    """Returns a table in Markdown, without a line break at its end."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def report(path: str, description: str, main: Callable[..., list[str]], document: Path = README):
    """
    Runs the benchmark of a path with the options of the command line, prints the tables and paragraphs in Markdown that
    `main` returns, and puts them between the marks of a document that have the path of the file, as seen from there.
    Each argument of `main` becomes an option, whose type is that of its default; False makes a flag. The description
    explains them.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help=f"put the tables into {document.relative_to(ROOT)}")
    for name, parameter in inspect.signature(main).parameters.items():
        default = parameter.default
        converts = {"type": type(default), "default": default}
        parser.add_argument(f"--{name}", **({"action": "store_true"} if default is False else converts))
    values = vars(parser.parse_args())
    fills_readme = values.pop("readme")
    logging.set_verbosity_error()
    text = "\n\n".join(main(**values)) + "\n"
    print(text)
    if fills_readme:
        script = Path(path).resolve()
        folder = document.parent if script.is_relative_to(document.parent) else ROOT
        fill(script.relative_to(folder).as_posix(), text, document)


def fill(name: str, text: str, document: Path):
    """Puts `text` between the marks `<!-- name -->` and `<!-- end of name -->` of a document."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    content = document.read_text()
    if content.count(start) != 1 or content.count(end) != 1:
        raise ValueError(f"{document} must have one line {start.strip()} and one {end.strip()} below it.")
    before, _, rest = content.partition(start)
    document.write_text(before + start + text + end + rest.partition(end)[2])
