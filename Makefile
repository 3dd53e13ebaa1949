PYTHON ?= python3
# An extra package index, for instance PyTorch's CPU builds: make demo TORCH_INDEX=<url>
TORCH_INDEX ?=
# Handed on to the command of demo, test, test-all, targets, bench, gpu and report.
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help install demo test test-all check targets bench gpu report clean
.DEFAULT_GOAL := help
# Tests and timings must not share the cores with one another.
.NOTPARALLEL:

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		-c constraints.txt -e '.[dev]'
	@touch $@

install: $(INSTALLED) ## make .venv and install into it

demo: $(INSTALLED) ## show the main job, with or without a GPU
	$(BIN)/fastdl demo $(ARGS)

test: $(INSTALLED) ## the suite, without what is slow or needs a GPU
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu" $(ARGS)

test-all: $(INSTALLED) ## the slow rest
	$(BIN)/python -m pytest -n 2 -m slow $(ARGS)

check: $(INSTALLED) ## lint, format, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

targets: $(INSTALLED) ## compile every kernel for GPUs that are not here
	$(BIN)/fastdl targets $(ARGS)

bench: $(INSTALLED) ## time the ops
	$(BIN)/python -m pytest bench $(ARGS)

# From a plain checkout, with the torch that the machine has: no network, no .venv.
gpu: ## tests and timings on a GPU
	PYTHONPATH=. $(PYTHON) bench/gpu.py $(ARGS)

report: $(INSTALLED) ## a page and README's tables from bench/results
	$(BIN)/fastdl report $(ARGS)

clean: ## remove what was built
	rm -rf .venv build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
