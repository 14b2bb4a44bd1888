"""The tables of the README that scripts write."""

from pathlib import Path


README = Path(__file__).resolve().parent.parent / "README.md"


def fill(script: str, text: str):
    """Puts `text` between the marks `<!-- script -->` and `<!-- end of script -->`."""
    start, end = f"<!-- {script} -->\n", f"<!-- end of {script} -->\n"
    readme = README.read_text()
    if readme.count(start) != 1 or readme.count(end) != 1:
        raise ValueError(f"README.md needs one line {start.strip()} and one {end.strip()} below it.")
    before, _, rest = readme.partition(start)
    README.write_text(before + start + text + end + rest.partition(end)[2])
