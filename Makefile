PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt setup.py
NATIVE = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help quickstart test lint bench clean
.NOTPARALLEL:  # two targets may want to install into the same environment

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

quickstart: $(VENV)/.quickstart  ## Make the environment and run the demonstration (no GPU, no model hub)
	$(BIN)/dynabert-fast quickstart

test: $(VENV)/.dev  ## Make the environment and run every test: the fast ones, then the slow ones
	$(BIN)/pytest -q -m "not slow"
	$(BIN)/pytest -q -m slow

lint: $(VENV)/.dev  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(NATIVE),$(BIN)/clang-format --dry-run --Werror $(NATIVE))

bench: $(VENV)/.dev  ## Run the benchmarks
	$(BIN)/pytest -q benchmarks --benchmark-only

clean:  ## Remove the environment, build outputs and caches
	rm -rf $(VENV) build dist *.egg-info .benchmarks .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last. An install that was interrupted leaves .partial behind, and the next one
# then starts from an empty environment rather than from one with half a package in it.
$(VENV)/.quickstart $(VENV)/.dev: $(VENV)/.%: $(INPUTS)
	$(if $(wildcard $(VENV)/.partial),rm -rf $(VENV))
	@mkdir -p $(VENV) && touch $(VENV)/.partial
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[$*]'
	@rm $(VENV)/.partial
	@touch $@
