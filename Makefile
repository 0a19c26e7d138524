# `make demo` and `make test` need nothing but Python 3.11 or 3.12 and the package index that pip is set up for.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_VENV ?= .venv-bench
BENCH = OMP_NUM_THREADS=$(THREADS) $(BENCH_VENV)/bin/python -m
BENCH_STAMP := $(BENCH_VENV)/.installed
THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help setup demo test test-fast lint test-huggingface bench bench-setup bench-gpu bench-step bench-training clean

help:
	@echo "make setup      install mtmoe with everything it needs into $(VENV)"
	@echo "make demo       fetch real data, train, evaluate and translate (20 to 30 minutes on 2 cores)"
	@echo "make test       linters and all tests, with coverage (under 20 minutes on 2 cores)"
	@echo "make test-fast  the tests that take seconds"
	@echo "make test-huggingface    conversions against transformers 4.57, in $(BENCH_VENV)"
	@echo "make lint       ruff, mypy and the import contracts"
	@echo "make bench      time the MoE layer against its peers, in $(BENCH_VENV) (10 minutes on 2 cores)"
	@echo "make bench-step, make bench-training, make bench-gpu    whole steps, fairseq-train end to end, the layer on a GPU"
	@echo "make clean      remove $(VENV), $(BENCH_VENV), caches and build folders; runs/ stays"

setup: $(STAMP)

# setuptools comes from the lock too, so that the editable install needs no isolated build environment.
$(STAMP): requirements.lock setup.py $(wildcard mtmoe/kernels/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	PATH="$(abspath $(BIN)):$$PATH" scripts/demo.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread for each test process: two torch processes with two threads each on two cores are ten times slower.
# A file's tests stay together, since they share fixtures that train models.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses=$(THREADS) --dist=loadfile --cov --cov-report=term --durations=15

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses=$(THREADS) --dist=loadfile -m "not slow"

test-huggingface: bench-setup
	OMP_NUM_THREADS=1 $(BENCH_VENV)/bin/python -m pytest --quiet tests/checkpoint/test_huggingface.py

# The peers have an environment of their own: their dependencies are no business of mtmoe's. DeepSpeed's setup imports
# torch, so it cannot be built in isolation; its compiled operators are not needed on a CPU.
bench-setup: $(BENCH_STAMP)

$(BENCH_STAMP): requirements.lock benchmarks/requirements.txt setup.py
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --requirement benchmarks/requirements.txt
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# BENCH_ARGS takes more options, such as BENCH_ARGS="--grid full".
bench: bench-setup
	$(BENCH) benchmarks.layer $(BENCH_ARGS)

bench-step: bench-setup
	$(BENCH) benchmarks.step $(BENCH_ARGS)

bench-training: bench-setup
	$(BENCH) benchmarks.training $(BENCH_ARGS)

# In $(VENV), or any environment whose torch sees a GPU: make bench-gpu GPU_PYTHON=python
GPU_PYTHON ?= $(BIN)/python
bench-gpu:
	$(GPU_PYTHON) -m benchmarks.layer --device cuda --zero-biases --output runs/bench-gpu $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(BENCH_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
