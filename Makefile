# One target for each habit; `make` lists them.
#
# PYTHON chooses the interpreter that .venv is made from: make PYTHON=python3.12
# NEWEST chooses that of `make test-newest`, the newest one that is there.

PYTHON ?= python3
NEWEST ?= $(firstword $(foreach v,3.14 3.13 3.12,$(shell \
  PYENV_VERSION=$v python$v -c 'print("python$v")' 2>/dev/null)))
BIN := .venv/bin
INSTALLED := .venv/installed
INSTALLED_LINT := .venv/installed-lint
INSTALLED_DEV := .venv/installed-dev
INSTALLED_NEWEST := .venv-newest/installed
INSTALLED_BEAM := .venv-beam/installed
# Every core runs its own test files, the longest first; a file's tests share
# what they set up.
TESTS := -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python $(TESTS)
# Shows only what went wrong. CONSTRAINTS has the versions that are installed.
CONSTRAINTS ?= constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS)

.PHONY: help setup setup-dev quickstart test test-ci test-nightly test-newest \
  test-beam notebooks docs lint format hooks clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-15s %s\n", $$1, $$2}' \
	  Makefile

setup: $(INSTALLED)  ## make .venv and install the package into it

setup-dev: $(INSTALLED_DEV)  ## also all that CI needs, some gigabytes

quickstart: $(INSTALLED)  ## pre-train, fine-tune, predict; about 6 minutes
	@$(BIN)/vit-jax quickstart

test: $(INSTALLED)  ## the default tests, below 6 minutes
	@$(PYTEST)

test-ci: $(INSTALLED_DEV)  ## what CI runs beside them
	@$(PYTEST) -m "ci and not nightly and not gpu"

test-nightly: $(INSTALLED_DEV)  ## what takes long and rarely breaks
	@$(PYTEST) -m "nightly and not gpu"

# What JAX and Python decide; the rest follows from it.
test-newest: $(INSTALLED_NEWEST)  ## the core, with the newest Python and JAX
	@.venv-newest/bin/python $(TESTS) $(foreach name,unit/models/models \
	  unit/training/optim unit/training/steps unit/sharding unit/checkpoint \
	  integration/train parity/pretrained,tests/$(name)_test.py)

# Apache Beam asks for versions of its own.
test-beam: $(INSTALLED_BEAM)  ## data build, by Apache Beam
	@.venv-beam/bin/python -m pytest -m "" tests/unit/tools/beam_test.py

notebooks: $(INSTALLED_DEV)  ## run them, and keep their outputs in them
	@rm -rf notebooks/runs
	@JAX_PLATFORMS=cpu PATH="$(CURDIR)/$(BIN):$$PATH" \
	  $(BIN)/jupyter execute --inplace notebooks/*.ipynb

docs: $(INSTALLED_DEV)  ## build the documents' site: docs/_build/index.html
	@$(BIN)/python -m sphinx -E -q -W --keep-going docs docs/_build

lint: $(INSTALLED_LINT)  ## ruff and pyright, changing nothing
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED_LINT)  ## let ruff correct and format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

hooks: $(INSTALLED_LINT)  ## lint at each git commit
	@$(BIN)/pre-commit install

clean:  ## remove .venv and caches; runs/ and data sets stay
	rm -rf .venv .venv-newest .venv-beam build dist docs/_build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are older than setup.py or the constraints when those have changed:
# then pip brings the same .venv up to date.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>/dev/null || echo "not there"); \
	  echo "vit_jax needs Python 3.11 or newer, and $(PYTHON) is $$found;" \
	    "name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
	@echo "Installing vit_jax into .venv; the first time takes some minutes."

$(INSTALLED): setup.py $(CONSTRAINTS) | .venv/bin/python
	@$(INSTALL) --editable '.[test]'
	@touch $@

$(INSTALLED_LINT): setup.py $(CONSTRAINTS) | .venv/bin/python
	@$(INSTALL) --editable '.[lint]'
	@touch $@

# On Linux the package index has PyTorch with CUDA, some gigabytes; a build
# without is enough, if PIP_FIND_LINKS or PIP_INDEX_URL leads to one. For timm
# without torchvision see tests/torch_libraries.py.
$(INSTALLED_DEV): setup.py $(CONSTRAINTS) | .venv/bin/python
	@$(INSTALL) --editable '.[dev]'
	@$(INSTALL) --no-deps --no-warn-conflicts timm
	@touch $@ $(INSTALLED) $(INSTALLED_LINT)

# constraints.txt has the versions of the oldest Python.
$(INSTALLED_NEWEST): setup.py constraints-newest.txt
	@test -n "$(NEWEST)" || { echo "make test-newest needs Python 3.12 or" \
	  "newer; name one: make test-newest NEWEST=PATH" >&2; exit 1; }
	@PYENV_VERSION=$(NEWEST:python%=%) $(NEWEST) -m venv --clear .venv-newest
	@.venv-newest/bin/python -m pip install --quiet \
	  --constraint constraints-newest.txt --editable '.[test]'
	@touch $@

$(INSTALLED_BEAM): setup.py constraints-beam.txt
	@$(PYTHON) -m venv --clear .venv-beam
	@.venv-beam/bin/python -m pip install --quiet \
	  --constraint constraints-beam.txt --editable '.[test,beam]'
	@touch $@
