# Entry points of the project; `make` alone lists them. Everything they write stays inside this folder.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

# Left empty, PYTHON means the interpreter that .venv has, else python3; EXTRAS those of the last set-up, else dev.
PYTHON ?=
EXTRAS ?=
PIP_ARGS ?=
ARGS ?=
export PYTHON EXTRAS PIP_ARGS

VENV_PYTHON := .venv/bin/python
PACKAGES := $(wildcard megatron_fwpkm kernels/fwpkm_kernels launch data_prep tests)

# A process of a test uses one core, or those of a distributed one would wait for one another; ARGS="-n 8" uses more.
TEST_ENV := TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONFAULTHANDLER=1 \
    OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=$${MKL_NUM_THREADS:-1}

.PHONY: help setup doctor train recall test test-unit test-distributed matrix lint format bench verify clean clean-all

help: ## List the targets and variables
	@awk 'BEGIN { FS = ":.*## "; print "Usage: make TARGET [VARIABLE=value ...]\n\nTargets" } \
	    /^[a-z-]+:.*## / { printf "  %-18s%s\n", $$1, $$2 }' Makefile
	@printf '\nVariables\n'
	@printf '  %-18s%s\n' \
	    PYTHON 'interpreter for .venv, 3.11 to 3.13 (default: python3)' \
	    EXTRAS 'extras to install: dev (default), or dev,gpu on a machine with NVIDIA GPUs' \
	    PIP_ARGS 'further options for pip, such as an index with builds of torch for your machine' \
	    ARGS 'options for the command behind a target: make train ARGS="training.steps=100"'

setup: ## Make .venv with the pinned packages (again only when the pins change)
	@./.ci/setup

# Not after setup: doctor is what one runs when a set-up fails.
doctor: ## Say what works on this machine, what is missing and how to mend it
	@if [[ -x $(VENV_PYTHON) ]]; then python=$(VENV_PYTHON); else python="$${PYTHON:-python3}"; fi; \
	    "$$python" launch/doctor.py $(ARGS)

# The main job trains nano and its plain twin and compares them; key.sub=value in ARGS goes to both, but what gives the
# twin a memory. Options or another run directory ask for something else: then launch/train.py alone gets them.
train: setup ## Train nano and its plain twin, then measure both; another preset alone: ARGS="--config ..."
ifeq (,$(filter --% run_directory=% name=%,$(ARGS)))
	$(VENV_PYTHON) launch/train.py --config configs/train/nano.yaml $(ARGS)
	$(VENV_PYTHON) launch/train.py --config configs/train/nano-plain.yaml $(filter-out model.memory_layers=% model.pkm_layers=%,$(ARGS))
	$(VENV_PYTHON) launch/evaluate.py --run runs/nano --against runs/nano-plain
else
	$(VENV_PYTHON) launch/train.py --config configs/train/nano.yaml $(ARGS)
endif

recall: setup ## Train the recall run and its twin without memory, and measure what they recall (docs/recall.md)
	$(VENV_PYTHON) launch/train.py --config configs/train/recall.yaml
	$(VENV_PYTHON) launch/train.py --config configs/train/recall-plain.yaml
	$(VENV_PYTHON) launch/recall.py --run runs/recall --against runs/recall-plain $(ARGS)

test: test-unit test-distributed ## Run all tests: those in one process, then the distributed ones one by one

test-unit: setup ## Run the tests that need one process, two at a time
	$(TEST_ENV) $(VENV_PYTHON) -m pytest -n 2 -m 'not distributed' $(ARGS)

test-distributed: setup ## Run the tests that start several processes
	$(TEST_ENV) $(VENV_PYTHON) -m pytest -m distributed -p no:xdist --durations=20 $(ARGS) || [[ $$? == 5 ]] # 5: none selected

matrix: setup ## Train in every layout and compare with one rank; writes docs/matrix.md
	$(TEST_ENV) $(VENV_PYTHON) -m tests.distributed.run_matrix

lint: setup ## Check style and types (ruff, mypy); all three always run
	@status=0; \
	$(VENV_PYTHON) -m ruff check . || status=1; \
	$(VENV_PYTHON) -m ruff format --check . || status=1; \
	$(VENV_PYTHON) -m mypy $(PACKAGES) || status=1; \
	exit $$status

format: setup ## Rewrite the sources in the project's format
	$(VENV_PYTHON) -m ruff check --fix-only .
	$(VENV_PYTHON) -m ruff format .

bench: setup ## Time the memory layer; writes build/bench/memory_layer.json
	@mkdir -p build/bench
	$(VENV_PYTHON) launch/bench_memory.py $(ARGS)

verify: setup ## Compare memory layer and whole models with the golden cases of the reference
	$(VENV_PYTHON) launch/verify.py --cases tests/golden --cases tests/golden_model $(ARGS)

clean: ## Remove build outputs and caches; runs/, data/ and .venv stay
	rm -rf build .hypothesis ./*.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

clean-all: clean ## Remove .venv too
	rm -rf .venv
