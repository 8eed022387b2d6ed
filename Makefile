# One door to everything: make setup | demo | test | lint | docs | package | bench | cuda-check | gpu-check
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.the_mask_installed
# Requirements of torch alone first: building the kernels needs the torch they will run with.
TORCH ?= torch
KERNELS := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: setup demo test test-slow lint format docs package bench cuda-check gpu-check clean

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja numpy
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	$(BIN)/python -m the_mask.env
	touch $@

demo: setup
	$(BIN)/python tools/run_demo.py

# Two processes of one thread each use two cores better than one of two. Should one die, the run ends: pytest-xdist 3.8
# gives the tests that were left to nobody and waits for ever.
test: setup
	OMP_NUM_THREADS=1 PYTHONFAULTHANDLER=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --max-worker-restart 0 -q

test-slow: setup
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vermin --target=3.10- --exclude long --violations --quiet the_mask tools datasets benchmarks csrc tests setup.py
	$(BIN)/mypy the_mask tools datasets benchmarks setup.py csrc
	cd the_mask/runtime && ../../$(BIN)/mypy --explicit-package-bases --config-file ../../pyproject.toml detectron2

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# output/site. Broken links and references are errors.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# dist/: the sdist, and from it a wheel with kernels for the torch of .venv.
package: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

bench: setup
	set -e; for script in benchmarks/bench_*.py; do $(BIN)/python $$script; done

cuda-check: setup
	$(BIN)/python csrc/cuda_check.py

# On a machine with a GPU, with the Python that has its torch: PYTHON=python3 make gpu-check. Needs torch and numpy only.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)

clean:
	rm -rf build dist *.egg-info output .pytest_cache .mypy_cache .ruff_cache
