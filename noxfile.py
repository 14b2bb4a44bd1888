"""
The core suite on supported releases of transformers, each beside the torch of `make`, and what they compute compared:

    nox                              all of them
    nox -s "core(5.18.0)"            one
    python -m benchmarks.releases    the table of what was recorded
"""

import nox


PYTHON = ".venv/bin/python"
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
CORE = [f"tests/test_{part}.py" for part in ("configuration", "processing", "modeling", "remote_code", "serving")]


@nox.session(venv_backend="none")
@nox.parametrize("release", list(RELEASES), ids=list(RELEASES))
def core(session: nox.Session, release: str):
    overlay = f".venv/transformers-{release}"
    packages = [f"transformers=={release}", *RELEASES[release]]
    session.run(PYTHON, "-m", "pip", "install", "--quiet", "--target", overlay, "--upgrade", "--no-deps", *packages)
    environment = {"PYTHONPATH": overlay}
    session.run(PYTHON, "-m", "pytest", *CORE, env=environment)
    session.run(PYTHON, "-m", "benchmarks.releases", "--record", env=environment)
