"""
The core suite on every supported release of transformers, and on the oldest and newest torch; what they compute is
recorded, to be compared by `python -m benchmarks.releases`.

    nox                      all of it
    nox -s "core(5.18.0)"    one release of transformers, with the torch that `make` installs
    nox -s torch             the oldest and the newest torch, in environments of their own
    nox --tags ci            what CI runs beside `make test`, which is on the newest
"""

from pathlib import Path

import nox


nox.options.envdir = ".venv/nox"
PYTHON = ".venv/bin/python"
REQUIREMENTS = Path("requirements-dev.txt").read_text().splitlines()
HUB_1 = ("huggingface_hub==1.33.0",)  # the newest that the first releases take
RELEASES = {
    "5.16.1": HUB_1,
    "5.17.0": HUB_1,
    "5.18.0": (),
    "5.19.0": (),
    "5.20.2": (),
    "5.21.1": (),
    "5.22.2": (),
    "5.23.0": (),
    "5.24.0": (),
}
TORCHES = {  # with the transformers that take them
    "2.5.1": ("torchvision==0.20.1", "transformers==5.16.1", *HUB_1),
    "2.15.0": ("torchvision==0.29.2", "transformers==5.24.0"),
}
CI = ("5.16.1", "5.20.2")
PARTS = ["configuration", "conversations", "processing", "modeling", "ecosystem"]
PARTS += ["remote_code", "serving", "accelerated"]
CORE = [f"tests/test_{part}.py" for part in PARTS]


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
    """Without torchaudio and torchcodec: each of their releases is built for one torch."""
    replaced = ("torch", "transformers", "huggingface_hub", "#")
    kept = [requirement for requirement in REQUIREMENTS if not requirement.startswith(replaced)]
    session.install("--quiet", f"torch=={version}", *TORCHES[version], *kept)
    test_and_record(session, "python")


def test_and_record(session: nox.Session, python: str, **environment: str):
    workers = ("--numprocesses", "auto", "--maxprocesses", "8", "--dist", "loadfile")
    session.run(python, "-m", "pytest", *workers, *CORE, env=environment)
    session.run(python, "-m", "benchmarks.releases", "--record", env=environment)
