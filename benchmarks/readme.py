"""The tables of the README that scripts write."""

from pathlib import Path


README = Path(__file__).resolve().parent.parent / "README.md"


def fill(script: str, text: str):
    """Puts `text` between the marks `<!-- script -->` and `<!-- end of script -->`."""
    start, end = f"<!-- {script} -->\n", f"<!-- end of {script} -->\n"
    before, _, rest = README.read_text().partition(start)
    _, _, after = rest.partition(end)
    README.write_text(before + start + text + end + after)
