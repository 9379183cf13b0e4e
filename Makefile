# Development tasks; `make` lists the targets.
#
# PYTHON is the interpreter for .venv: make PYTHON=python3.12
# NEWEST is the one for `make test-newest`; default: the newest installed.

PYTHON ?= python3
NEWEST ?= $(firstword $(foreach v,3.14 3.13 3.12,$(shell \
  PYENV_VERSION=$v python$v -c 'print("python$v")' 2>/dev/null)))
BIN := .venv/bin
INSTALLED := .venv/installed
INSTALLED_LINT := .venv/installed-lint
INSTALLED_DEV := .venv/installed-dev
INSTALLED_NEWEST := .venv-newest/installed
INSTALLED_BEAM := .venv-beam/installed
# Test files run in parallel, one per core, the longest first. The tests of a
# file share fixtures.
TESTS := -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python $(TESTS)
# Prints errors only. Python compiles and stores a module when it is first
# imported; to compile all takes minutes. CONSTRAINTS pins the versions.
unexport PYTHONDONTWRITEBYTECODE
CONSTRAINTS ?= constraints.txt
PIP := -m pip install --quiet --no-compile
INSTALL := $(BIN)/python $(PIP) --constraint $(CONSTRAINTS)

.PHONY: help setup setup-dev quickstart test test-ci test-nightly test-newest \
  test-beam notebooks docs lint format hooks clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-15s %s\n", $$1, $$2}' \
	  Makefile

setup: $(INSTALLED)  ## create .venv and install the package into it

setup-dev: $(INSTALLED_DEV)  ## also install all development tools (several GB)

quickstart: $(INSTALLED)  ## pre-train, fine-tune, predict; about 6 minutes
	@$(BIN)/vit-jax quickstart

test: $(INSTALLED)  ## run the default tests; below 6 minutes
	@$(PYTEST)

test-ci: $(INSTALLED_DEV)  ## run the additional tests of CI
	@$(PYTEST) -m "ci and not nightly and not gpu"

test-nightly: $(INSTALLED_DEV)  ## run the slow tests that rarely fail
	@$(PYTEST) -m "nightly and not gpu"

# The tests that depend directly on the versions of JAX and Python.
test-newest: $(INSTALLED_NEWEST)  ## run core tests with the newest Python and JAX
	@.venv-newest/bin/python $(TESTS) $(foreach name,unit/models/models \
	  unit/training/optim unit/training/steps unit/sharding unit/checkpoint \
	  integration/train parity/pretrained,tests/$(name)_test.py)

# Apache Beam needs other versions of some dependencies.
test-beam: $(INSTALLED_BEAM)  ## test data build with Apache Beam
	@.venv-beam/bin/python -m pytest -m "" tests/unit/tools/beam_test.py

notebooks: $(INSTALLED_DEV)  ## execute the notebooks and save their outputs
	@rm -rf notebooks/runs
	@JAX_PLATFORMS=cpu PATH="$(CURDIR)/$(BIN):$$PATH" \
	  $(BIN)/jupyter execute --inplace notebooks/*.ipynb

docs: $(INSTALLED_DEV)  ## build the documentation site: docs/_build/index.html
	@$(BIN)/python -m sphinx -E -q -W --keep-going docs docs/_build

lint: $(INSTALLED_LINT)  ## check with ruff and pyright; changes no files
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED_LINT)  ## fix and format with ruff
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

hooks: $(INSTALLED_LINT)  ## lint on every git commit
	@$(BIN)/pre-commit install

clean:  ## remove .venv and caches; runs/ and data sets stay
	rm -rf .venv .venv-newest .venv-beam build dist docs/_build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamp files: if setup.py or the constraints are newer, pip updates the .venv.
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

# On Linux PyTorch's default package includes CUDA (several GB). A CPU build is
# enough; choose one with PIP_FIND_LINKS or PIP_INDEX_URL. For timm without
# torchvision see tests/torch_libraries.py.
$(INSTALLED_DEV): setup.py $(CONSTRAINTS) | .venv/bin/python
	@$(INSTALL) --editable '.[dev]'
	@$(INSTALL) --no-deps --no-warn-conflicts timm
	@touch $@ $(INSTALLED) $(INSTALLED_LINT)

# constraints.txt pins versions for the oldest supported Python.
$(INSTALLED_NEWEST): setup.py constraints-newest.txt
	@test -n "$(NEWEST)" || { echo "make test-newest needs Python 3.12 or" \
	  "newer; name one: make test-newest NEWEST=PATH" >&2; exit 1; }
	@PYENV_VERSION=$(NEWEST:python%=%) $(NEWEST) -m venv --clear .venv-newest
	@.venv-newest/bin/python $(PIP) \
	  --constraint constraints-newest.txt --editable '.[test]'
	@touch $@

$(INSTALLED_BEAM): setup.py constraints-beam.txt
	@$(PYTHON) -m venv --clear .venv-beam
	@.venv-beam/bin/python $(PIP) \
	  --constraint constraints-beam.txt --editable '.[test,beam]'
	@touch $@
