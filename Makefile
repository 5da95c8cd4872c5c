# The two commands of the README are `make demo` and `make test`. Both install what they need into .venv, once.
# torch is pinned by constraints.txt; where pip reaches PyPI only, name an index of CPU builds to avoid a CUDA build:
#   make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
BIN := .venv/bin
CORE := .venv/.core-installed
TEST := .venv/.test-installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint bench claims docs sample clean

demo: $(CORE)
	$(BIN)/unfused adapt
	@echo "The report: file://$(CURDIR)/runs/sample/report.html"

test: $(TEST)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --quiet

lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

bench: $(TEST)
	@for benchmark in benchmarks/bench_*.py; do echo "== $$benchmark"; $(BIN)/python $$benchmark || exit 1; done

claims: $(CORE)
	$(BIN)/unfused claims

docs: $(CORE)
	$(BIN)/python tools/make_docs.py

sample: $(CORE)  # needs espeak-ng
	$(BIN)/python tools/make_sample.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(CORE): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing unfused into .venv (a minute or two)"
	$(PIP_INSTALL) --editable .
	@touch $@

$(TEST): $(CORE)
	$(PIP_INSTALL) --editable '.[test]'
	@touch $@
