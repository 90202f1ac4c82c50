# `make demo`, `make serve` and `make test` set everything up by themselves in .venv.
#
# PYTHON      the interpreter that .venv is made with (3.11 or newer)
# TORCH_ARGS  where pip takes torch from; its default build brings CUDA along, the CPU build is
#             much smaller: make demo TORCH_ARGS="--index-url <index of the CPU wheels>"

PYTHON ?= python3
TORCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input \
	-c constraints.txt
SOURCES := tuner strategies server tests

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-service test-export lint format bench clean distclean

help:
	@echo "make demo    tune a CNN on handwritten digits and show every trial"
	@echo "make serve   run the service and its dashboard at http://127.0.0.1:8765"
	@echo "make test    run the tests"
	@echo "make lint    run ruff and mypy"
	@echo "make format  let ruff put the code into shape"
	@echo "make bench   run the benchmark and write tests/bench/RESULTS.md"
	@echo "make clean   remove caches; make distclean removes .venv too"

demo: $(VENV)/runtime.stamp
	$(BIN)/tuner demo

serve: $(VENV)/runtime.stamp
	$(BIN)/tuner serve

# A process for each core; the tests of one file stay together, for the models that they share.
# Where one of them dies, the run ends: with another in its place it would wait for ever.
test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile \
		--max-worker-restart 0

# Those that kill processes and databases, and a browser.
test-service: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q -o addopts="--strict-markers --import-mode=importlib -ra" \
		tests/server/test_chaos.py tests/server/browser

# Those that compile and export many models: some five minutes.
test-export: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q -o addopts="--strict-markers --import-mode=importlib -ra" \
		tests/tuner/exporters

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/bench.stamp
	$(BIN)/python tests/bench/run.py
	$(BIN)/python tests/bench/speed.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# torch first and alone, so that TORCH_ARGS speaks of torch only.
$(VENV)/runtime.stamp: pyproject.toml constraints.txt
	@echo "Installing into $(VENV): a few minutes the first time."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --no-deps torch==2.13.0 $(TORCH_ARGS)
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/bench.stamp: $(VENV)/dev.stamp
	@$(PIP_INSTALL) -e '.[dev,bench]'
	@touch $@
