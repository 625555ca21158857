# `make demo`, `make check` and `make test` share one virtual environment, made once in .venv.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo check test test-distributed test-families test-releases lint types env clean

env: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --progress-bar off --editable ".[test]"
	touch $@

demo: env
	rm -rf pivot-demo
	$(BIN)/pivot demo --output-dir pivot-demo

# while writing: all but the tests that are marked as training or slow (see CONTRIBUTING.md)
check: env lint types
	$(PYTEST) --ignore tests/compatibility -m "not training and not slow and not distributed"

test: env lint types
	$(PYTEST) --ignore tests/compatibility -m "not distributed"

# every engine with every part that trains, in several processes; a diagonal of it is part of `make test`
test-distributed: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/training/test_engines.py

# every family of the zoo, and the conformance kit; part of `make test`
test-families: env
	$(PYTEST) tests/testing

# Features in other releases of transformers, each in an environment of its own that is made once in .releases.
test-releases: env
	PIVOT_TEST_ENVS=$(CURDIR)/.releases OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/compatibility

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The package's folders are mapped at build time, so the checker is given what a wheel would install.
types: env
	rm -rf .typecheck build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target .typecheck .
	cd .typecheck && ../$(BIN)/mypy --cache-dir ../.mypy_cache --config-file ../pyproject.toml -p pivot_plugin

clean:
	rm -rf .venv .releases .typecheck .mypy_cache build *.egg-info pivot-demo pivot-run
