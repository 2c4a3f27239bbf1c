PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all test-xla gpu lint clean

demo: .venv/installed  ## trains on the built-in digits and says where the pictures lie
	$(BIN)/frugan train --epochs 60 --batch-size 64 --out runs/demo

test: lint  ## runs every check
	$(BIN)/python -m pytest --numprocesses 2

test-all: .venv/installed  ## every allocation of r3 and projected fails once too, where make test takes a third and a fifth
	FRUGAN_TEST_ALL=1 $(BIN)/python -m pytest --numprocesses 2 tests/test_recover.py

test-xla: .venv-xla/installed  ## trains on PyTorch/XLA's CPU device, and runs the notebook, in an environment of their own
	PJRT_DEVICE=CPU .venv-xla/bin/python -m pytest tests/test_xla.py tests/test_notebook.py

gpu: .venv/installed  ## runs what only a GPU can tell, in less than 25 minutes, and writes docs/gpu.md
	$(BIN)/python benchmarks/gpu.py

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/installed: pyproject.toml setup.py src/frugan/memory/pool.c
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('frugan needs Python 3.11 or later: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv-xla/installed: pyproject.toml setup.py src/frugan/memory/pool.c
	$(PYTHON) -m venv .venv-xla
	.venv-xla/bin/python -m pip install --quiet --editable '.[tpu,notebook]' hypothesis pytest
	touch $@

clean:
	rm -rf .venv .venv-xla build dist
