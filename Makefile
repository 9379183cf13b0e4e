# One target for each habit; `make` lists them.
#
# PYTHON chooses the interpreter that .venv is made from: make PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
INSTALLED_DEV := .venv/installed-dev
INSTALLED_EXPORT := .venv/installed-export
INSTALLED_INTEROP := .venv/installed-interop
INSTALLED_PLAN := .venv/installed-plan
INSTALLED_DOCS := .venv/installed-docs
INSTALLED_BROWSER := .venv/installed-browser
INSTALLED_NOTEBOOKS := .venv/installed-notebooks
# Every core runs its own test files, in the order of tests/conftest.py; a
# file's tests share what they set up.
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile \
  --no-loadscope-reorder
# Shows only what went wrong; the versions are those of constraints.txt.
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: help setup quickstart test test-slow test-interop test-export \
  test-browser test-notebooks test-plan notebooks docs lint format hooks clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-15s %s\n", $$1, $$2}' \
	  Makefile

setup: $(INSTALLED)  ## make .venv and install the package into it

quickstart: $(INSTALLED)  ## pre-train, fine-tune, predict; about 6 minutes
	@$(BIN)/vit-jax quickstart

test: $(INSTALLED)  ## the default tests, below 10 minutes
	@$(PYTEST)

test-slow: $(INSTALLED)  ## only the tests that take minutes each
	@$(PYTEST) -m "slow and not gpu and not tpu_compile and not browser"

test-interop: $(INSTALLED_INTEROP)  ## compare with PyTorch, transformers, timm
	@$(PYTEST) -m interop

test-export: $(INSTALLED_EXPORT)  ## run exports without our code
	@$(PYTEST) -m export

test-browser: $(INSTALLED_BROWSER)  ## report and demo in headless Chromium
	@$(BIN)/python -m pytest -m browser

test-notebooks: $(INSTALLED_NOTEBOOKS)  ## run notebooks, also as on Colab
	@JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m notebooks --numprocesses=2 \
	  --dist=loadgroup

# One after the other: a compilation has threads of its own, and gigabytes.
test-plan: $(INSTALLED_PLAN)  ## compile for TPUs, with libtpu
	@JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m tpu_compile

notebooks: $(INSTALLED_NOTEBOOKS)  ## run them, and keep their outputs in them
	@JAX_PLATFORMS=cpu $(BIN)/python notebooks/execute.py

docs: $(INSTALLED_DOCS)  ## build the documents' site: docs/_build/index.html
	@$(BIN)/python -m sphinx -q -W --keep-going docs docs/_build

lint: $(INSTALLED_DEV)  ## ruff and pyright, changing nothing
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED_DEV)  ## let ruff correct and format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

hooks: $(INSTALLED_DEV)  ## lint at each git commit
	@$(BIN)/pre-commit install

clean:  ## remove .venv and caches; runs/ and data sets stay
	rm -rf .venv build dist docs/_build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are older than setup.py or constraints.txt when those have changed:
# then pip brings the same .venv up to date.
$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>/dev/null || echo "not there"); \
	  echo "vit_jax needs Python 3.11 or newer, and $(PYTHON) is $$found;" \
	    "name another one: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing vit_jax into .venv; the first time takes some minutes."
	@$(INSTALL) --editable '.[test]'
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@$(INSTALL) --editable '.[dev]'
	@touch $@

# On Linux the package index has PyTorch with CUDA, some gigabytes; a build
# without is enough, if PIP_FIND_LINKS or PIP_INDEX_URL leads to one. timm alone
# asks for torchvision: see tests/torch_libraries.py for how it does without.
$(INSTALLED_INTEROP): $(INSTALLED)
	@$(INSTALL) --editable '.[interop]'
	@$(INSTALL) --no-deps --no-warn-conflicts timm
	@touch $@

$(INSTALLED_EXPORT): $(INSTALLED)
	@$(INSTALL) --editable '.[export]'
	@touch $@

$(INSTALLED_BROWSER): $(INSTALLED)
	@$(INSTALL) --editable '.[demo,browser]'
	@touch $@

$(INSTALLED_NOTEBOOKS): $(INSTALLED)
	@$(INSTALL) --editable '.[notebooks,plan]'
	@touch $@

$(INSTALLED_PLAN): $(INSTALLED)
	@$(INSTALL) --editable '.[plan]'
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	@$(INSTALL) --editable '.[docs]'
	@touch $@
