# `make demo` and `make test` set everything up on a fresh machine; `make help` lists all targets.
SHELL := /bin/bash
.SHELLFLAGS := -e -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# cpu: the CPU wheel of PyTorch; cuda: the wheel of the package index. Override with TORCH=...
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
# Index with the CPU wheel of torch; may be a mirror
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VLLM_VENV ?= .venv-vllm
ENGINE_VENV ?= .venv-infer-cuda
CLIENTS_VENV ?= .venv-clients

LOCKS := images/requirements
GLM := $(VENV)/bin/glm
READY := $(VENV)/.ready-$(TORCH)
VLLM_READY := $(VLLM_VENV)/.ready
ENGINE_READY := $(ENGINE_VENV)/.ready
CLIENTS_READY := $(CLIENTS_VENV)/.ready

help: ## List the targets
	@awk -F':.*## ' '/^[a-zA-Z0-9_/%-]+:.*## / {printf "  %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# $(call create-venv,FOLDER,LOCK,TORCH): installs the lock files LOCK and torch-TORCH, and this package
define create-venv
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --no-deps --require-hashes -r $(LOCKS)/$(2).lock
	$(1)/bin/pip install --quiet --no-deps --require-hashes $(if $(filter cpu,$(3)),--extra-index-url $(TORCH_INDEX)) -r $(LOCKS)/torch-$(3).lock
	$(1)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
endef

venv: $(READY) ## Install the locked packages and the `glm` command into .venv

$(READY): $(LOCKS)/dev.lock $(LOCKS)/torch-$(TORCH).lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else f"the lock files need Python 3.11, this is {v[0]}.{v[1]}; run make PYTHON=/path/to/python3.11")'
	$(call create-venv,$(VENV),dev,$(TORCH))
	$(VENV)/bin/pip check
	touch $@

demo: $(READY) ## Create a demo model, convert, fine-tune, evaluate and chat (no GPU, no download); FAMILY=glm4
	$(GLM) demo $(if $(FAMILY),--family $(FAMILY))

# Variables of chat, serve, evaluate, quantize and train. WITH=local runs them in .venv, WITH=compose in containers.
WITH ?= local
RUN ?= tuned
OUTPUT ?= output
TYPE ?= q4_0
ENGINE ?= auto
COMPOSE := docker compose
# Compose profile of each ENGINE; transformers serves 4-bit weights
PROFILE_auto := cpu
PROFILE_llamacpp := cpu
PROFILE_vllm := gpu
PROFILE_transformers := gpu-int4
# required variables of each target, checked before anything is installed or started
NEEDS_chat := MODEL
NEEDS_switch := MODEL
NEEDS_restore := BACKUP
NEEDS_serve := MODEL
NEEDS_evaluate := MODEL TEST_FILE
NEEDS_quantize := MODEL
NEEDS_train := MODEL TRAIN_FILE
NEEDS_export := CKPT
$(foreach goal,$(MAKECMDGOALS),$(foreach name,$(NEEDS_$(goal)),$(if $($(name)),,\
  $(error $(name) is not set: make $(goal) $(NEEDS_$(goal):%=%=...)))))
# make divides values at blanks, so such a path would arrive as several
$(foreach goal,$(MAKECMDGOALS),$(if $(NEEDS_$(goal)),$(foreach name,MODEL TRAIN_FILE TEST_FILE CKPT BACKUP OUTPUT,\
  $(if $(word 2,$($(name))),$(error $(name) has a blank, which make cannot pass on: rename $($(name)), or use the glm command)))))
LOCAL := $(filter local,$(WITH))
# a local folder or file becomes a mount and a name in the container
COMPOSE_ENV = $(if $(wildcard $(MODEL)/config.json $(MODEL)/adapter_config.json),FOLDERS_DIR=$(abspath $(dir $(abspath $(MODEL)))) MODEL=$(notdir $(abspath $(MODEL))),$(if $(MODEL),MODEL=$(MODEL))) \
  $(if $(NUM_GPUS),NUM_GPUS=$(NUM_GPUS)) RUN=$(RUN)

up: ## Start the API and the web pages in containers, on CPUs by default: make up [PROFILES="gpu monitoring"]
	$(COMPOSE) $(PROFILES:%=--profile %) up --detach --wait

down: ## Stop and remove all containers; volumes with models and runs are kept
	$(COMPOSE) --profile '*' down --remove-orphans

remove: ## Remove all containers and volumes, with the models, runs, scores, usage and conversations in them; asks first
	@read -r -p 'Delete the volumes of this project, with its models, training runs, scores, usage and conversations? Type yes: ' answer || true; \
	  if [ "$$answer" != yes ]; then echo 'Nothing was removed.'; exit 1; fi
	$(COMPOSE) --profile '*' down --remove-orphans --volumes

switch: ## Serve another model in containers: prepares it first, keeps the former one on failure: make switch MODEL=mine
	compose/switch $(MODEL)

# the volumes with training runs, scores, usage and conversations; .env and the files of the secrets are files already
BACKUP ?= backup-$(shell date +%Y-%m-%d).tar.gz
backup: ## Write training runs, scores, usage and conversations of the containers to a file: make backup [BACKUP=file.tar.gz]
	$(COMPOSE) run --rm --no-deps -T backup > $(BACKUP).partial
	mv $(BACKUP).partial $(BACKUP)
	@echo $(BACKUP)

restore: ## Put the files of a backup back into the volumes: make restore BACKUP=file.tar.gz
	@test -s $(BACKUP) || { echo '$(BACKUP) is missing or empty: name a file of make backup, BACKUP=...' >&2; exit 1; }
	$(COMPOSE) run --rm --no-deps -T backup --extract --gzip --no-overwrite-dir --directory / < $(BACKUP)

logs: ## Follow the logs of the containers
	$(COMPOSE) --profile '*' logs --follow --tail 100

chat: $(if $(LOCAL),$(READY)) ## Chat in the terminal: make chat MODEL=models/chatglm3-6b [WITH=compose]
ifeq ($(WITH),local)
	$(GLM) chat --model $(MODEL) $(ARGS)
else
	$(COMPOSE_ENV) $(COMPOSE) run --rm api chat $(ARGS)
endif

serve: $(if $(LOCAL),$(READY)) ## Serve the API: make serve MODEL=THUDM/chatglm3-6b ENGINE=vllm WITH=compose
ifeq ($(WITH),local)
	$(GLM) serve --model $(MODEL) --engine $(ENGINE) $(ARGS)
else
	$(if $(filter gpu%,$(PROFILE_$(ENGINE))),$(MAKE) --no-print-directory gpu-ready)
	$(COMPOSE_ENV) SERVE_ARGS="$(ARGS)" $(COMPOSE) --profile $(PROFILE_$(ENGINE)) up --detach --wait
endif

evaluate: $(if $(LOCAL),$(READY)) ## Evaluate: make evaluate MODEL=... TEST_FILE=rows.jsonl [WITH=compose]
ifeq ($(WITH),local)
	$(GLM) evaluate --model $(MODEL) --test-file $(TEST_FILE) --output-dir $(OUTPUT)/scores-$(RUN) $(ARGS)
else
	$(COMPOSE_ENV) DATA_DIR=$(dir $(abspath $(TEST_FILE))) TEST_FILE=$(notdir $(TEST_FILE)) EVALUATE_ARGS="$(ARGS)" \
	  $(COMPOSE) --profile eval run --rm evaluate
endif

quantize: $(if $(LOCAL),$(READY)) ## Quantize to a GGUF file, or with TYPE=int8|nf4 to a folder: make quantize MODEL=... TYPE=q4_k_m [WITH=compose]
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
	$(if $(filter-out 0,$(NUM_GPUS)),$(MAKE) --no-print-directory gpu-ready)
	$(COMPOSE_ENV) DATA_DIR=$(dir $(abspath $(TRAIN_FILE))) TRAIN_FILE=$(notdir $(TRAIN_FILE)) TRAIN_ARGS="$(ARGS)" \
	  $(COMPOSE) --profile train run --rm train
endif

export: $(READY) ## Export a training checkpoint to a model folder: make export CKPT=output/tuned/checkpoint-500 [MODEL=base] [ARGS="--to original"]
	$(GLM) export $(CKPT) $(abspath $(CKPT))-export $(if $(MODEL),--base $(MODEL)) $(ARGS)

llamacpp: $(READY) ## Compile the code of llama.cpp for newer CPUs into .venv (needs g++)
	images/scripts/llamacpp $(LOCKS)/dev.lock $(VENV)/lib/python3.11/site-packages/glm_llamacpp_cpu

doctor: ## Check this machine, and whether containers can use its GPUs
	compose/gpu-ready || true
	$(if $(wildcard $(READY)),$(GLM) doctor $(if $(MODEL),--model $(MODEL)))

gpu-ready: ## Check driver, NVIDIA Container Toolkit and Docker engine for GPUs in containers
	compose/gpu-ready

# One file at a time on each worker, so that fixtures of a module are built once; in the order of the folders, as sorting by the
# number of tests would leave the longest files to the end. Containers, clusters and clients are tested after that, one folder
# at a time on each worker: browsers drop connections while Docker changes the network, and two control planes or stacks at a
# time would exceed the memory of a small machine.
TEST_WORKERS ?= 2
CONTAINER_TESTS := tests/images tests/compose tests/cluster tests/manifests

SELECTED := -m "not slow"

test: $(READY) ## Run the quick tests, none of which needs a container: make test [ARGS="-k resume"] [TEST_WORKERS=4]
	$(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder \
	  $(CONTAINER_TESTS:%=--ignore %) --ignore tests/clients $(SELECTED) $(ARGS)

test-all: SELECTED :=
test-all: test test-engine $(CLIENTS_READY) ## Run all tests: also slow ones, clients, images, Compose and Kubernetes manifests (a Docker engine for what runs containers)
	CLIENTS_VENV=$(abspath $(CLIENTS_VENV)) \
	  $(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist loadgroup --no-loadscope-reorder $(CONTAINER_TESTS) tests/clients $(ARGS)

# `make test` runs the same tests with a fixed number of inputs, `make fuzz` for so many seconds each
SEED := $(or $(SEED),$(shell date +%s))
FUZZ_SECONDS := $(if $(filter command environment,$(origin SECONDS)),$(SECONDS),60)
fuzz: $(READY) ## Damage files and requests by chance: make fuzz [SEED=7] [SECONDS=600] [CASE=3] [ARGS="-k gguf"]
	@echo 'again with: make fuzz SEED=$(SEED) SECONDS=$(FUZZ_SECONDS)$(if $(ARGS), ARGS="$(ARGS)")'
	FUZZ_SEED=$(SEED) FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_CASE=$(CASE) \
	  $(VENV)/bin/python -m pytest -m fuzz -s --timeout $$(($(FUZZ_SECONDS) + 300)) $(ARGS)

test-vllm: $(READY) $(VLLM_READY) $(CLIENTS_READY) ## Run the vLLM engine's tests in an environment of its own, and lm-eval against it (3.4 GB, no GPU)
	$(VLLM_VENV)/bin/python -m pytest tests/vllm
	$(VLLM_VENV)/bin/python -m pytest tests/api/test_conformance.py tests/api/test_echo.py -k vllm
	CLIENTS_VENV=$(abspath $(CLIENTS_VENV)) VLLM_VENV=$(abspath $(VLLM_VENV)) \
	  $(VENV)/bin/python -m pytest tests/clients/test_lm_eval.py -k vllm

# No `pip check`: infer-cuda-cpu.overrides omits packages that vLLM declares.
$(VLLM_READY): $(LOCKS)/infer-cuda-cpu.lock $(LOCKS)/torch-cpu.lock pyproject.toml
	$(call create-venv,$(VLLM_VENV),infer-cuda-cpu,cpu)
	touch $@

test-engine: $(ENGINE_READY) ## Run the transformers engine's tests with the versions that the image infer-cuda has, as make test-all does
	$(ENGINE_VENV)/bin/python -m pytest tests/unit/engines/transformers tests/unit/engines/test_prompt_logprobs.py \
	  tests/unit/engines/test_cancelling.py $(ARGS)
	$(ENGINE_VENV)/bin/python -m pytest tests/api/test_conformance.py -k transformers $(ARGS)

# The packages whose version in infer-cuda-cpu.lock, the CPU twin of infer-cuda, is another one than in .venv; the others are
# those of .venv.
$(ENGINE_READY): $(LOCKS)/infer-cuda-cpu.lock $(READY)
	$(PYTHON) -m venv $(ENGINE_VENV)
	awk '/^[a-z]/ {split($$1, part, "=="); own = NR != FNR && part[1] in version && version[part[1]] != part[2]; \
	  if (NR == FNR) version[part[1]] = part[2]} own' $(LOCKS)/dev.lock $(LOCKS)/infer-cuda-cpu.lock >$(ENGINE_VENV)/own.lock
	$(ENGINE_VENV)/bin/pip install --quiet --no-deps --require-hashes -r $(ENGINE_VENV)/own.lock
	echo "import site; site.addsitedir('$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  >$$($(ENGINE_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth
	touch $@

test-clients: $(READY) $(CLIENTS_READY) ## Run real clients of the API against two engines, in an environment of their own (0.9 GB)
	CLIENTS_VENV=$(abspath $(CLIENTS_VENV)) $(VENV)/bin/python -m pytest tests/clients $(ARGS)

# No `pip check`: clients.overrides omits packages that the clients declare. Without Node its clients are skipped.
$(CLIENTS_READY): $(LOCKS)/clients.lock tests/clients/package-lock.json
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/pip install --quiet --no-deps --no-compile --require-hashes -r $(LOCKS)/clients.lock
	mkdir -p $(CLIENTS_VENV)/node && cp tests/clients/package.json tests/clients/package-lock.json $(CLIENTS_VENV)/node
	if command -v npm >/dev/null; then cd $(CLIENTS_VENV)/node && npm ci --no-audit --no-fund; fi
	touch $@

lint: $(READY) ## Check style, imports, docstrings and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

fix: $(READY) ## Fix what the linter can fix
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(READY) ## Run the benchmarks of conversion, reading rows, training, serving and the web pages
	$(VENV)/bin/python tests/bench/convert_bench.py
	$(VENV)/bin/python tests/bench/reader_bench.py
	$(VENV)/bin/python tests/bench/train_bench.py
	$(VENV)/bin/python tests/bench/trl_bench.py
	$(VENV)/bin/python tests/bench/serve_bench.py
	$(VENV)/bin/python tests/bench/web_bench.py

# The quality first, as it needs Debian packages; OpenVINO where its environment exists (openvino_bench.py --help)
bench-cpu: $(READY) ## Measure the 6B on CPUs: start, generating, reading prompts, busy hosts, quality of each type (over an hour, 17 GB of disk)
	$(VENV)/bin/python tests/bench/quality_bench.py
	$(VENV)/bin/python tests/bench/lowcost_bench.py
	$(VENV)/bin/python tests/bench/prefill_bench.py --defaults
	$(VENV)/bin/python tests/bench/prefill_bench.py --cpu-codes --tokens 512
	$(VENV)/bin/python tests/bench/shared_cpu_bench.py
	$(if $(wildcard .venv-openvino/bin/python),$(VENV)/bin/python tests/bench/openvino_bench.py --python .venv-openvino/bin/python)

test-gpu: ## Check everything that needs a CUDA GPU, on one card in nine minutes: make test-gpu [PARTS="numbers loss"]
	$(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3) tests/gpu/run.py $(PARTS)

# Those that replace an older version and are not large: pyarrow, bitsandbytes and DeepSpeed are left to the machine.
GPU_WHEELS := accelerate huggingface-hub peft safetensors tokenizers transformers
gpu-wheels: $(READY) ## Download what test-gpu needs on a GPU machine with Python 3.12 and no network: copy .gpu-wheels there
	$(VENV)/bin/pip download -q --no-deps --only-binary :all: --python-version 3.12 --platform manylinux_2_17_x86_64 \
	  -d .gpu-wheels $(foreach name,$(GPU_WHEELS),$(shell grep -oE '^$(name)==[^ ]+' $(LOCKS)/train-cuda.lock))

bench-gpu: ## Measure training and decoding of the 6B on one GPU, beside the limits of the card
	$(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3) tests/bench/gpu_bench.py $(ARGS)

soak: $(READY) ## Load test: 16 clients for ten minutes, a third of which disconnect, on two engines
	$(VENV)/bin/python tests/bench/serve_soak.py
	$(VENV)/bin/python tests/bench/serve_soak.py --engine llamacpp

lock: ## Regenerate all lock files from pyproject.toml and the .in files (needs uv)
	images/scripts/lock

lock-%: ## Lock torch for another CUDA version from the PyTorch index: make lock-cu126 (needs uv)
	images/scripts/lock $*

IMAGES := $(shell images/scripts/names)

image/%: ## Build one image: make image/infer-cpu (variables: images/README.md)
	images/scripts/image $*

images: $(IMAGES:%=image/%) ## Build all images

wheelhouse: ## Download everything that the builds of IMAGES need to ./wheels, for air-gapped sites
	for image in $(IMAGES); do images/scripts/image $$image wheels; done

pins: ## Update the digests of the pinned images from their registries
	images/scripts/pins

sbom: $(READY) ## Write sbom/NAME.json (CycloneDX) for each built image
	images/scripts/sbom $(VENV)/bin/syft

audit: $(READY) ## Compare the lock files with published advisories: make audit [ADVISORIES=all.zip] (a file or a folder)
	$(VENV)/bin/python images/scripts/audit.py $(ADVISORIES)

test-images-full: $(READY) images ## Build all images and run their tests, including vLLM and the code for Arm
	TEST_ARM64=1 REQUIRE_IMAGES="$(IMAGES)" $(VENV)/bin/python -m pytest tests/images

# needs kubectl with kustomize 5; IMAGE_PREFIX is the registry and path from which the nodes pull
KUBECTL ?= kubectl
k8s/%: ## Render k8s/overlays/NAME: make -s k8s/demo IMAGE_PREFIX=registry.example.com/llm/ | kubectl apply -f -
	$(KUBECTL) kustomize k8s/overlays/$* | sed 's#image: glm-#image: $(IMAGE_PREFIX)glm-#'

k8s-registry: ## Write a registry into k8s/components/images, so that kubectl apply -k uses it: make k8s-registry IMAGE_PREFIX=...
	sed -i -E 's#name: (glm-[a-z-]+), newName: [^,]+,#name: \1, newName: $(IMAGE_PREFIX)\1,#' k8s/components/images/kustomization.yaml

k8s-rendered: ## Update the reviewed renderings in tests/manifests/rendered after a change under k8s/
	for overlay in k8s/overlays/*/; do $(KUBECTL) kustomize $$overlay > tests/manifests/rendered/$$(basename $$overlay).yaml; \
	  $(KUBECTL) kustomize $$overlay/storage > tests/manifests/rendered/$$(basename $$overlay)-storage.yaml; done

clean: ## Remove the virtual environments and the output of the demo
	rm -rf $(VENV) $(VLLM_VENV) $(ENGINE_VENV) $(CLIENTS_VENV) demo build *.egg-info

.PHONY: help venv demo up down remove switch backup restore logs chat serve evaluate quantize train llamacpp doctor gpu-ready test test-all test-clients test-engine fuzz test-vllm lint fix bench bench-cpu test-gpu gpu-wheels bench-gpu soak lock images wheelhouse pins sbom audit test-images-full k8s-registry k8s-rendered clean
