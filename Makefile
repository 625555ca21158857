# `make demo`, `make check` and `make test` share one virtual environment, made once in .venv.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo docs check test fuzz test-distributed test-families families test-releases lint types env clean

env: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools setuptools-scm wheel
	$(BIN)/python -m pip install --quiet --progress-bar off --editable ".[test]"
	touch $@

demo: env
	rm -rf pivot-demo
	$(BIN)/pivot demo --output-dir pivot-demo

# the documents as a site on 127.0.0.1:8000
docs: env
	$(BIN)/python -m mkdocs serve

# while writing: all but the tests that are marked as training or slow (see CONTRIBUTING.md)
check: env lint types
	$(PYTEST) --ignore tests/compatibility -m "not training and not slow and not distributed"

test: env lint types
	$(PYTEST) --ignore tests/compatibility -m "not distributed"

# every engine with every part that trains, in several processes; a diagonal of it is part of `make test`
test-distributed: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/training/test_engines.py \
		tests/training/test_engines_resumed.py tests/training/test_failing_together.py tests/cli/test_launched.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -m distributed tests/training/test_launches.py tests/training/test_shares.py

# every family of the zoo, and the conformance kit; part of `make test`
test-families: env
	$(PYTEST) tests/testing

# asks every family, and writes what is found into its record, README and the documents
families: env
	$(BIN)/python -m pivot_plugin.testing.zoo_findings tests/testing/families.json README.md docs/families.md

# The property tests and the table of the Hub's faults at length, in one process so that a seed repeats a run, and every
# kind of run killed and gone on with; failing examples are counted by kind, and kept as tests. `make fuzz PIVOT_FUZZ=500 KILLS=5` for a shorter look.
PIVOT_FUZZ ?= 10000
FUZZ_SEED ?= $(shell date +%s)
KILLS ?= 50
fuzz: env
	PIVOT_FUZZ=$(PIVOT_FUZZ) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -s -p no:randomly --hypothesis-seed=$(FUZZ_SEED) \
		tests/fuzz tests/runs/test_provenance.py tests/encoders/test_publishing.py tests/encoders/test_downloading.py
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.helpers.kills --kills $(KILLS) --seed $(FUZZ_SEED)

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
