# make demo   installs what it needs, then: sample -> label -> train -> evaluate -> report, on a real 135 M model
# make test   installs, then all tests, the slow ones too
# make check  format, lint, types, import directions, unit tests
# make gpu-check  on a CUDA machine with torch, transformers and numpy, without installing: correctness, then speed and memory
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check lint format install install-dev clean bench gpu-check

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.demo
install-dev: $(VENV)/.dev

demo: $(VENV)/.demo
	PATH="$(abspath $(BIN)):$$PATH" bash examples/positive/run.sh

test: check
	$(BIN)/python -m pytest -n auto -m slow

check: lint
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/pairs.py

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) runs build dist .mypy_cache .pytest_cache .ruff_cache
