"""
python tests/mutations.py [--only NAME ...] [--jobs 2]: breaks the code in 69 places, one at a time, and runs the tests
that have to notice. Prints a table, and fails if fewer than 95% of the mutations are killed. `make test` leaves it out.

Each mutation is made in a copy of the checkout. Its tests first run without it, as tests that fail anyway tell nothing.
"""

import argparse
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parents[1]
NEEDED = 0.95  # share of the mutations that have to be killed
TIMEOUT = 1200  # seconds for the tests of one mutation; a mutation that makes them hang is killed

# A file is followed by its mutations: a name and tests (arguments of pytest, whose file is tests/test_<first>.py), the
# old text, which occurs exactly once in the file, and the new one.
TABLE = ROOT / "tests" / "mutations.txt"


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str


def read_table() -> list[Mutation]:
    mutations, file, lines = [], "", iter(TABLE.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.endswith(".py"):
            file = line
        else:
            name, tests = line.split(": ")
            mutations.append(
                Mutation(name, file, next(lines).removeprefix("- "), next(lines).removeprefix("+ "), tests)
            )
    return mutations


def copy_checkout(folder: Path) -> Path:
    """Copies what git tracks, as it is in the working tree."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def run_tests(folder: Path, tests: str) -> tuple[str, str]:
    """Runs tests in a copy of the checkout. Returns "passed", "failed" or "broken", and the end of the output."""
    name, *options = shlex.split(tests)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not speech", "-p", "no:cacheprovider"]
    command += [f"tests/test_{name}.py", *options]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return "failed", f"longer than {TIMEOUT} s"
    # pytest exits with 1 if a test fails, and with 2 if a test file cannot be imported.
    verdict = {0: "passed", 1: "failed", 2: "failed"}.get(done.returncode, "broken")
    return verdict, (done.stdout + done.stderr)[-2000:]


def run_mutation(folder: Path, mutation: Mutation) -> tuple[str, str]:
    """Runs the tests of a mutation in a copy of the checkout, which is left as it was. Returns as `run_tests` does."""
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        return run_tests(folder, mutation.tests)
    finally:
        path.write_text(text, encoding="utf-8")


def check_table(mutations: list[Mutation]):
    """Exits if a name is used twice or an old text does not occur exactly once."""
    names = [mutation.name for mutation in mutations]
    problems = [f"{name} is used twice" for name in set(names) if names.count(name) > 1]
    for mutation in mutations:
        count = (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old)
        if count != 1:
            problems.append(f"{mutation.name}: {mutation.file} has {mutation.old!r} {count} times, expected once")
    if problems:
        sys.exit("\n".join(problems))


def run_all(jobs: list, num_workers: int, run) -> list[tuple[str, str]]:
    """Calls `run(folder, job)` for every job, each worker in a copy of the checkout of its own. Prints the progress."""
    folders = queue.Queue()

    def work(job):
        folder, start = folders.get(), time.monotonic()
        try:
            verdict, output = run(folder, job)
        finally:
            folders.put(folder)
        print(
            f"{getattr(job, 'name', job)}: {verdict} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True
        )
        return verdict, output

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(num_workers) as pool:
        for number in range(num_workers):
            folders.put(copy_checkout(Path(temporary) / str(number)))
        return list(pool.map(work, jobs))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these mutations")
    parser.add_argument("--list", action="store_true", help="list the mutations and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="run so many mutations at once (default: 1)")
    parser.add_argument("--skip-baseline", action="store_true", help="do not run the tests without a mutation first")
    arguments = parser.parse_args()
    table = read_table()
    mutations = [each for each in table if not arguments.only or each.name in arguments.only]
    if unknown := set(arguments.only or ()) - {each.name for each in mutations}:
        parser.error(f"there is no mutation {', '.join(sorted(unknown))}; --list shows all")
    check_table(table)
    if arguments.list:
        print("\n".join(f"{each.name:28}{each.file:34}{each.tests}" for each in mutations))
        return

    if not arguments.skip_baseline:
        selections = list(dict.fromkeys(each.tests for each in mutations))
        verdicts = run_all(selections, arguments.jobs, run_tests)
        for tests, (verdict, output) in zip(selections, verdicts, strict=True):
            if verdict != "passed":
                sys.exit(f"{tests}: {verdict} without a mutation\n{output}")
    verdicts = run_all(mutations, arguments.jobs, run_mutation)
    words = {"failed": "killed", "passed": "SURVIVED", "broken": "NO TESTS RUN"}
    print("| mutation | file | tests | result |\n|---|---|---|---|")
    for mutation, (verdict, _) in zip(mutations, verdicts, strict=True):
        print(f"| {mutation.name} | {mutation.file} | {mutation.tests} | {words[verdict]} |")
    killed = sum(verdict == "failed" for verdict, _ in verdicts)
    print(f"\n{killed} of {len(mutations)} killed")
    if killed < NEEDED * len(mutations):
        sys.exit(1)


if __name__ == "__main__":
    main()
