# The commands of the README, and what CI runs beside them.

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
OLDEST := $(VENV)/transformers-5.16.1

.PHONY: demo held-out test test-oldest bench lint format clean

demo: $(READY)
	HF_HOME=build/huggingface HF_HUB_OFFLINE=1 $(PYTHON) -m demo.run

# The table of the README; needs the synthesizers that demo/make.py names.
held-out: $(READY)
	HF_HOME=build/huggingface HF_HUB_OFFLINE=1 $(PYTHON) -m demo.evaluate --readme

test: $(READY)
	$(PYTHON) -m pytest

test-oldest: $(READY) $(OLDEST)/.ready
	PYTHONPATH=$(OLDEST) $(PYTHON) -m pytest

bench: $(READY)
	HF_HUB_OFFLINE=1 $(PYTHON) -m benchmarks.sound --readme
	HF_HUB_OFFLINE=1 $(PYTHON) -m benchmarks.train --readme

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

# The oldest supported release beside the same torch: it needs huggingface_hub 1, which needs httpx.
$(OLDEST)/.ready: $(READY)
	$(PYTHON) -m pip install --quiet --target $(OLDEST) --upgrade httpx==0.28.1
	$(PYTHON) -m pip install --quiet --target $(OLDEST) --upgrade --no-deps transformers==5.16.1 huggingface_hub==1.33.0
	touch $@
