# Two commands set everything up on a fresh machine with Python >= 3.11: `make smoke` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The python of a GPU machine: one that has torch, triton, pytest and pytest-timeout already (matplotlib too, for the plots).
GPU_PYTHON ?= python3
INSTALLED := $(VENV)/.installed

.PHONY: help install smoke test test-slow faults lint types bench bench-kernels gpu clean
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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not interpreted'
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m interpreted tests/kernels

test-slow: $(INSTALLED)  ## the tests that take minutes each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

faults: $(INSTALLED)  ## thousands of damaged files and mistaken settings, a fixed seed and a fresh one (FAULTS="--family tars --seed 7")
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PYTHONPATH=tests:tests/faults $(BIN)/python tests/faults/campaign.py $(FAULTS)

lint: $(INSTALLED)  ## ruff, formatting included
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy on megakd/ and kernels/
	$(BIN)/mypy

bench: $(INSTALLED)  ## the two comparisons with open_clip
	$(BIN)/megakd bench step
	$(BIN)/megakd bench loader

bench-kernels: $(INSTALLED)  ## the losses of kernels/ against each other and against others' (BENCH="--sizes 1k 8k --budget 120")
	PYTHONPATH=kernels $(BIN)/python kernels/benchmarks/run.py $(BENCH)

# Such a machine may be lent for minutes, without a network: nothing is installed, and the limits add up to less than 9 minutes.
gpu:  ## on a machine with a CUDA device: the kernels' gpu tests and benchmarks, with its own python (OUT=folder for copies)
	@$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("no CUDA device: torch " + torch.__version__ + " of " + sys.executable + " sees none")'
	@nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
	@status=0; parallel=$$($(GPU_PYTHON) -c 'import xdist; print("-n 6")' 2>/dev/null); \
	PYTHONPATH=kernels:. timeout 190 $(GPU_PYTHON) -m pytest tests/kernels -m gpu --noconftest --continue-on-collection-errors -p no:cacheprovider --timeout 120 -q $$parallel || status=$$?; \
	PYTHONPATH=kernels timeout 250 $(GPU_PYTHON) kernels/benchmarks/run.py --device cuda --budget 200 $(if $(OUT),--copy-to $(OUT)) $(BENCH) || status=$$?; \
	PYTHONPATH=kernels timeout 20 $(GPU_PYTHON) kernels/benchmarks/run.py --device cuda --check || true; \
	if $(GPU_PYTHON) -c 'import open_clip, pydantic, typer, bitsandbytes'; then \
	PYTHONPATH=kernels:. timeout 70 $(GPU_PYTHON) -m megakd.cli bench teacher-speed $(if $(OUT),--json $(OUT)/teacher-speed.json) || status=$$?; \
	else echo 'int8 teachers: not measured, this python lacks what the line above names'; fi; \
	exit $$status

clean:  ## remove the environment and what building left behind
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
