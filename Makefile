# tokenloft: `make serve` brings it up, `make test` checks it. `make help` lists the rest.

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
SOAK_MINUTES ?= 5

.DEFAULT_GOAL := help
.PHONY: help setup serve test soak lint

help:  ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/'

setup: $(STAMP)  ## Make .venv with everything that serving and testing need

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "tokenloft needs Python 3.11 or later, and there is no python3 here: install python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "tokenloft needs Python 3.11 or later; $(PYTHON) is $$("$(PYTHON)" --version 2>&1). Try: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV) || { \
		echo "could not make $(VENV): on Debian, install python3-venv (or python3.11-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

serve: setup  ## Set up, then serve on 127.0.0.1:8000
	@exec $(BIN)/tokenloft serve

test: setup  ## Set up, then run the whole suite
	$(BIN)/python -m pytest

soak: setup  ## Set up, then five minutes of load (or SOAK_MINUTES=N)
	$(BIN)/python -m pytest -m soak --soak-minutes $(SOAK_MINUTES)

lint: setup  ## Style, format, types and layer order
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
