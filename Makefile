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

LOCKS := images/requirements
GLM := $(VENV)/bin/glm
READY := $(VENV)/.ready-$(TORCH)

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

test: $(READY) ## Run the tests
	$(VENV)/bin/python -m pytest

lint: $(READY) ## Check style and imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

fix: $(READY) ## Repair what the linter can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(READY) ## Measure: convert against a plain copy, our batches against the tutorial's padding
	$(VENV)/bin/python tests/bench/convert_bench.py
	$(VENV)/bin/python tests/bench/batches_bench.py

lock: ## Renew the hashed lock file from pyproject.toml (needs uv)
	uv pip compile --quiet --python-version 3.11 --generate-hashes --extra dev --no-emit-package torch \
	  --no-header --no-annotate pyproject.toml -o $(LOCKS)/dev.lock

clean: ## Remove the environment and the demo's output
	rm -rf $(VENV) demo build *.egg-info

.PHONY: help venv demo test lint fix bench lock clean
