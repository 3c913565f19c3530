# Each command does all set-up itself: Python 3.11 or newer and pip are all it needs.
PYTHON ?= python3
BIN := .venv/bin
# the tests' models are too small for more than a thread; two files of tests at a time take two cores
PYTEST := $(BIN)/pytest --numprocesses 2

.PHONY: demo demo-generation test contract test-fast check bench clean

demo: .venv/ready
	$(BIN)/regraft demo

demo-generation: .venv/ready
	$(BIN)/regraft demo --generation

test: .venv/ready
	$(PYTEST) --dist loadfile -m "not contract"

# every combination of architecture, kind, start, objective and task type: about an hour
contract: .venv/ready
	$(PYTEST) --dist load --contract whole tests/test_contract.py tests/test_merge.py tests/test_figures.py tests/test_tuned_methods.py

test-fast: .venv/ready
	$(PYTEST) --dist loadfile -m "not slow"

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python benchmarks/tune.py
	$(BIN)/python benchmarks/recycle.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'regraft needs Python 3.11 or newer: make PYTHON=python3.11 …')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch .venv/ready

clean:
	rm -rf .venv runs
