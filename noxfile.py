"""
Runs the core of the suite on every supported release of transformers, and on the oldest and the newest torch. What each
computes is recorded, and `python -m benchmarks.releases` compares the records.

    nox                      all of it
    nox -s "core(5.18.0)"    one release of transformers, with the torch that `make` installs
    nox -s torch             the oldest and the newest torch, in environments of their own
    nox --tags ci -- -m "not speech and not long"    what CI runs beside `make test`, which is on the newest release
    nox -s upcoming          transformers' main branch with the newest releases of what it works with
    nox -s upcoming -- transformers==5.24.0    the same with another transformers
"""

from pathlib import Path

import nox


nox.options.envdir = ".venv/nox"
PYTHON = ".venv/bin/python"
REQUIREMENTS = Path("requirements/dev.txt").read_text().splitlines()
OLD_HUB = ("huggingface_hub==1.33.0",)  # the newest that transformers 5.16 and 5.17 accept
# A release of transformers -> what it needs in another version than requirements/dev.txt has.
RELEASES = {"5.16.1": OLD_HUB, "5.17.0": OLD_HUB}
RELEASES |= dict.fromkeys(("5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0"), ())
# A release of torch -> torchvision, and a transformers that accepts it.
TORCHES = {
    "2.5.1": ("torchvision==0.20.1", "transformers==5.16.1", *OLD_HUB),
    "2.15.0": ("torchvision==0.29.2", "transformers==5.24.0"),
}
CI = ("5.16.1", "5.20.2")
WORKERS = ("--numprocesses", "auto", "--maxprocesses", "8", "--dist", "loadfile", "-m", "not speech")
PARTS = ["configuration", "conversations", "dialogues", "processing", "modeling", "trimmed", "ecosystem"]
PARTS += ["remote_code", "serving", "accelerated", "alignment", "transcribe", "transcripts"]
CORE = [f"tests/test_{part}.py" for part in PARTS]
TRAINING = ("tests/test_training.py", "tests/test_rows.py", "tests/test_options.py")
MAIN = "git+https://github.com/huggingface/transformers"
# pip installs the newest releases of these that fit each other.
COMPANIONS = (
    *("huggingface_hub", "tokenizers", "safetensors", "accelerate", "peft", "datasets", "bitsandbytes"),
    *("numpy", "pillow", "av"),
)


@nox.session(venv_backend="none")
@nox.parametrize("release", [nox.param(name, id=name, tags=["ci"] if name in CI else []) for name in RELEASES])
def core(session: nox.Session, release: str):
    overlay = Path(f".venv/transformers-{release}")
    if not overlay.exists():
        packages = [f"transformers=={release}", *RELEASES[release]]
        session.run(PYTHON, "-m", "pip", "install", "--quiet", "--target", str(overlay), "--no-deps", *packages)
    test_and_record(session, PYTHON, PYTHONPATH=str(overlay))


@nox.session(venv_backend="venv", reuse_venv=True)
@nox.parametrize("version", list(TORCHES), ids=list(TORCHES))
def torch(session: nox.Session, version: str):
    """Leaves out torchaudio and torchcodec, because each of their releases is built for one torch."""
    packages = requirements_without("torch", "transformers", "huggingface_hub")
    session.install("--quiet", f"torch=={version}", *TORCHES[version], *packages)
    test_and_record(session, "python")


@nox.session(venv_backend="venv", default=False)
def upcoming(session: nox.Session):
    """Tests training as well, because peft and datasets are new too. Torch stays, so that no failure comes from it."""
    packages = requirements_without("transformers", *COMPANIONS)
    session.install("--quiet", "--upgrade", *(session.posargs or [MAIN]), *COMPANIONS, *packages)
    session.run("python", "-m", "pip", "list", "--format", "freeze")
    session.run("python", "-m", "pytest", *WORKERS, *CORE, *TRAINING)


def requirements_without(*prefixes: str) -> list[str]:
    return [requirement for requirement in REQUIREMENTS if not requirement.startswith((*prefixes, "#"))]


def test_and_record(session: nox.Session, python: str, **environment: str):
    session.run(python, "-m", "pytest", *WORKERS, *CORE, *session.posargs, env=environment)
    session.run(python, "-m", "benchmarks.releases", "--record", env=environment)
