# Two commands set everything up on a fresh machine with Python >= 3.11: `make smoke` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install smoke test test-slow lint types bench clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(INSTALLED)  ## make .venv and install megakd with what its tests need

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { echo "megakd needs Python 3.11, 3.12 or 3.13; $(PYTHON) is another: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "this Python cannot make environments: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

smoke: $(INSTALLED)  ## distil a tiny teacher into a tiny student here; ends with a table
	$(BIN)/megakd smoke

test: $(INSTALLED)  ## run the tests (no network, no GPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow'

test-slow: $(INSTALLED)  ## the tests that take minutes each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: $(INSTALLED)  ## ruff, formatting included
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy on megakd/ and kernels/
	$(BIN)/mypy

bench: $(INSTALLED)  ## the two comparisons with open_clip
	$(BIN)/megakd bench step
	$(BIN)/megakd bench loader

clean:  ## remove the environment and what building left behind
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
