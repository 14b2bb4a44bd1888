# The commands of the README, and what CI runs beside them.

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
VLLM := $(VENV)/vllm

.PHONY: demo app held-out test test-releases test-endurance test-app test-vllm releases bench lint format clean

demo: $(READY)
	HF_HOME=build/huggingface HF_HUB_OFFLINE=1 $(PYTHON) -m demo.run

app: $(READY)
	rm -rf build/app
	HF_HOME=build/huggingface HF_HUB_OFFLINE=1 $(PYTHON) upload.py build --checkpoint demo --output build/app
	HF_HOME=build/huggingface HF_HUB_OFFLINE=1 $(PYTHON) app.py build/app

# The table of the README; needs the synthesizers that demo/make.py names.
held-out: $(READY)
	HF_HOME=build/huggingface HF_HUB_OFFLINE=1 $(PYTHON) -m demo.evaluate --readme

test: $(READY)
	$(PYTHON) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

# Its core on the oldest supported transformers and on one in the middle; `test` is on the newest.
test-releases: $(READY)
	$(VENV)/bin/nox --tags ci

test-endurance: $(READY)
	$(PYTHON) -m pytest -m endurance -s

test-app: $(READY)
	$(PYTHON) -m pytest -m app

# Where vLLM cannot be installed the tests are skipped, and say so.
test-vllm: $(READY)
	-$(MAKE) $(VLLM)/.ready
	$(PYTHON) -m pytest -m vllm

# The core suite on every supported transformers and on the oldest and newest torch, and the table of the README.
releases: $(READY)
	rm -rf build/releases
	$(VENV)/bin/nox
	$(PYTHON) -m benchmarks.releases --readme

bench: $(READY)
	HF_HUB_OFFLINE=1 $(PYTHON) -m benchmarks.model --readme
	HF_HUB_OFFLINE=1 $(PYTHON) -m benchmarks.sound --readme
	HF_HUB_OFFLINE=1 $(PYTHON) -m benchmarks.train --readme
	HF_HUB_OFFLINE=1 $(PYTHON) -m benchmarks.serving --readme

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(READY)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:
	rm -rf build $(VENV)

$(READY): requirements-dev.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --requirement requirements-dev.txt
	touch $@

# vLLM on the CPU expects its own name, no Triton, and of its companions nothing that was compiled for CUDA: of torchaudio
# the pure Python, and of torchvision all but the registrations of compiled operators.
$(VLLM)/.ready: requirements-vllm.txt
	python3 -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --requirement requirements-vllm.txt
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchcodec triton
	cd $(VLLM)/lib/python3*/site-packages && rm -f torchaudio/lib/*.so \
		&& sed -i '/^    _meta_registrations,$$/d' torchvision/__init__.py && mkdir -p vllm-0.32.0+cpu.dist-info \
		&& printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA
	touch $@
