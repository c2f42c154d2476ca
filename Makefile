# Two commands set everything up on a fresh machine with Python >= 3.11: `make smoke` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The python of a GPU machine: one that has torch, triton, pytest and pytest-timeout already (matplotlib too, for the plots).
GPU_PYTHON ?= python3
INSTALLED := $(VENV)/.installed

.PHONY: help install smoke test test-slow golden faults lint types bench bench-kernels gpu gpu-wheels audit release clean
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

# Tests of one file share what they make, so a file stays with one process. Each process and its children take up to 4 GB. On two cores
# three are best: one of them has the tests of SLURM, which mostly waits.
WORKERS ?= 3
test: $(INSTALLED)  ## run the tests (no network, no GPU; WORKERS=6 on more cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not slow and not interpreted'
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m interpreted tests/kernels

test-slow: $(INSTALLED)  ## the tests that take minutes each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow

golden: $(INSTALLED)  ## the numbers that tests/golden holds runs to, anew; the commit says why (GOLDEN=answers: one of them; see its README)
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PYTHONPATH=tests $(BIN)/python tests/golden/renew.py $(GOLDEN)

faults: $(INSTALLED)  ## thousands of damaged files and mistaken settings, a fixed seed and a fresh one (FAULTS="--family tars --seed 7")
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PYTHONPATH=tests $(BIN)/python -m faults $(FAULTS)

lint: $(INSTALLED)  ## ruff, formatting included, and vulture: nothing is dead, in tests/ neither
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vulture
	$(BIN)/vulture megakd kernels tests

# Not a part of `make lint`: its answer depends on the day, not on the commit, and it asks PyPI's own pages, which a mirror does not have.
# There pip-audit skips each package and says that it found nothing; --strict makes that an error. It has an environment of its own.
audit:  ## known vulnerabilities of the pinned versions, by pip-audit; needs a network that reaches PyPI itself
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit; }
	.venv-audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

# Tags and pages are a person's: `make release` says what to type. Before it: raise megakd.__version__ and CITATION.cff's (a test compares
# them), name the changelog's [Unreleased] after the version, and let `make lint types test test-slow` pass.
release: $(INSTALLED)  ## the wheel and sdist of the last commit in dist/, checked and tried outside the checkout, and the text of their page
	.ci/release $(abspath $(BIN))

types: $(INSTALLED)  ## mypy on megakd/ and kernels/
	$(BIN)/mypy

bench: $(INSTALLED)  ## the two comparisons with open_clip
	$(BIN)/megakd bench step
	$(BIN)/megakd bench loader

bench-kernels: $(INSTALLED)  ## the losses of kernels/ against each other and against others' (BENCH="--sizes 1k 8k --budget 120")
	PYTHONPATH=kernels $(BIN)/python kernels/benchmarks/run.py $(BENCH)

# Such a machine may be lent for minutes, without a network. What its python lacks may be carried there: `make gpu-wheels` here, for the
# Python GPU_TARGET, fills .gpu-wheels (50 MB), which `make gpu` there installs beside itself. The limits add up to less than 9 minutes.
# The kernel tests compile 224 Triton programs, 230 processor seconds (kernels/benchmarks/programs.py counts them without a GPU): 40 s each
# for six processes side by side, and more than the limit for one alone.
GPU_TARGET ?= 3.12
GPU_NEEDS := open_clip_torch ftfy wcwidth pydantic pydantic_core annotated-types typing-inspection submitit bitsandbytes pytest-xdist execnet
GPU_BUILT := deepspeed hjson
pinned = $(foreach name,$(1),$(shell grep -iE '^$(subst -,[-_],$(name))==' constraints.txt || echo $(name)))

gpu-wheels: $(INSTALLED)  ## wheels that `make gpu` needs on a machine without a network, into .gpu-wheels
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version $(GPU_TARGET) \
	$(foreach tag,manylinux_2_28 manylinux_2_24 manylinux_2_17 manylinux2014,--platform $(tag)_x86_64) -d .gpu-wheels $(call pinned,$(GPU_NEEDS))
	$(BIN)/python -m pip wheel --quiet --no-deps -w .gpu-wheels $(call pinned,$(GPU_BUILT))

gpu: export PYTHONPATH := kernels:.:$(CURDIR)/.gpu-site
gpu:  ## on a machine with a CUDA device: gpu tests, benchmarks and whole runs, with its own python (OUT=folder for copies)
	@$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("no CUDA device: torch " + torch.__version__ + " of " + sys.executable + " sees none")'
	@nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
	@test ! -d .gpu-wheels || $(GPU_PYTHON) -m pip install -q --no-index --no-deps --no-compile --upgrade --target .gpu-site .gpu-wheels/*.whl
	@status=0; parallel=$$($(GPU_PYTHON) -c 'import xdist; print("-n 6")' 2>/dev/null); \
	test -n "$$parallel" || echo 'without pytest-xdist the kernel tests and whole runs do not fit their limits; `make gpu-wheels` elsewhere fetches it'; \
	timeout 140 $(GPU_PYTHON) -m pytest tests/kernels -m gpu --noconftest --continue-on-collection-errors -p no:cacheprovider --timeout 120 -q $$parallel || status=$$?; \
	timeout 160 $(GPU_PYTHON) kernels/benchmarks/run.py --device cuda --budget 140 $(if $(OUT),--copy-to $(OUT)) $(BENCH) || status=$$?; \
	timeout 20 $(GPU_PYTHON) kernels/benchmarks/run.py --device cuda --check || true; \
	if $(GPU_PYTHON) -c 'import bitsandbytes, deepspeed, open_clip, pydantic, submitit, typer'; then \
	timeout 120 $(GPU_PYTHON) -m pytest tests/training/test_gpu_runs.py -m gpu -p no:cacheprovider --durations 0 -q $$parallel || status=$$?; \
	timeout 50 $(GPU_PYTHON) -m megakd.cli bench teacher-speed $(if $(OUT),--json $(OUT)/teacher-speed.json) || status=$$?; \
	timeout 48 $(GPU_PYTHON) -m pytest tests/training/test_gpu_prefetch.py -m gpu -p no:cacheprovider -q || status=$$?; \
	else echo 'whole runs and int8 teachers: not run, this python lacks what the line above names; `make gpu-wheels` elsewhere fetches it'; fi; \
	exit $$status

clean:  ## remove the environment and what building left behind
	rm -rf $(VENV) .venv-audit .gpu-wheels .gpu-site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
