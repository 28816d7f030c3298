# Every command a person or CI needs. `make` alone lists them.
#   VENV=dir           the virtual environment (default .venv); a relative path without spaces
#   PYTHON=python3.12  the interpreter it is made from (default python3)
#   CONSTRAINTS=file   the pinned versions (default constraints.txt; /dev/null for your own)
#   WORKERS=2          processes that run the tests (default: one a core, at most 4)
#   ARGS="..."         passed on to `fastpref demo` or to pytest
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=
WORKERS ?= logical --maxprocesses 4

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint $(CONSTRAINTS)
CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
BUILD_FILES := pyproject.toml setup.py $(CXX_FILES)

.DEFAULT_GOAL := help
.PHONY: help demo test lint build wheel clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(VENV)/.installed-demo  ## preference-tune a small real model here, from nothing
	@$(BIN)/python -m fastpref demo $(ARGS)

test: $(VENV)/.installed-test  ## the tests, with everything they need
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest \
	  --numprocesses $(WORKERS) --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev  ## style, formatting (Python, C++, CUDA) and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run --Werror $(CXX_FILES))
	$(BIN)/python -m mypy

build: $(VENV)/.build-tools  ## compile the native parts and install the package editable
	$(INSTALL) --no-build-isolation --no-deps --editable .

wheel: $(VENV)/.build-tools  ## dist/: an sdist, and a wheel built from that sdist
	rm -rf dist
	$(BIN)/python -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")'
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist dist/*.tar.gz

clean:  ## remove what was built (the environment and the downloads stay)
	rm -rf build dist *.egg-info fastpref/_C*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find fastpref kernels tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fastpref: the pinned versions need Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "fastpref: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

# torch comes first: the package is compiled against the torch it will run with.
$(VENV)/.build-tools: $(BIN)/python $(filter-out /dev/null,$(CONSTRAINTS))
	$(INSTALL) setuptools wheel ninja pybind11 torch
	@touch $@

$(VENV)/.installed-%: $(VENV)/.build-tools $(BUILD_FILES)
	$(INSTALL) --no-build-isolation --editable '.[$*]'
	@touch $@
