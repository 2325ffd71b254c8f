# Everything here runs from a fresh clone with Python 3.12, make and a C compiler.
# `make help` (or plain `make`) lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Set PYTHON to choose the interpreter that .venv is made from.
PYTHON ?=
# What is installed beside the package: make setup EXTRAS=dev,cuda13 runs everything on a GPU.
EXTRAS ?= dev
PYTHONS := python3.12 python3 python
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What builds this package and the few that have no wheel: pip is told not to fetch a builder for each.
BUILDERS := hatchling editables setuptools
STAMP = .venv/.stamp-$(EXTRAS)
# pip compiles to bytecode on one core, tests included. Some packages ship files that are no Python 3.
compile = $(1)/python -W ignore -m compileall -qq -j 0 -x '/tests?/' $(1)/../lib || true

# The TPU compiler, for machines without a TPU; there is one for this platform only.
LIBTPU := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),.cache/libtpu/libtpu/libtpu.so)

# The packages that `make test-oldest` takes older: jax|jaxlib
OLDEST = $(shell sed -n 's/==.*//p' constraints-oldest.txt | paste -sd'|')

# More arguments for pytest, e.g. make test PYTEST_ARGS="-k sampler"
PYTEST_ARGS ?=
# More arguments for the torture, e.g. make torture TORTURE_ARGS="--faults 50 --seed 1"
TORTURE_ARGS ?=
# Cases that each fuzz test draws, e.g. make fuzz FUZZ_EXAMPLES=100000
FUZZ_EXAMPLES ?= 5000

.PHONY: help setup quickstart quickstart-long posttrain posttrain-study torture fuzz test test-slow test-oldest test-kernels lint format bench aot wheel pins clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## create .venv and install the project with its development tools

$(STAMP): pyproject.toml constraints.txt
	@if ! [ -x $(BIN)/python ]; then \
	  for python in $(or $(PYTHON),$(PYTHONS)); do \
	    version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	    if [ "$$version" = 3.12 ] || [ -n "$(PYTHON)" ]; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$${found:-}" ]; then \
	    echo "make setup: no Python 3.12 found (tried: $(or $(PYTHON),$(PYTHONS)))." >&2; \
	    echo "Install it, or name an interpreter: make setup PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "Creating .venv with $$found"; \
	  "$$found" -m venv .venv; \
	fi
	@echo "Installing the packages pinned in constraints.txt (about a minute)"
	@$(PIP) install -qq -c constraints.txt $(BUILDERS)
	@$(PIP) install -qq --no-compile -c constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	@$(call compile,$(BIN))
	@touch $@

quickstart: setup ## the whole conversion on this machine, about 10 minutes; writes runs/quickstart/report.md
	$(BIN)/llada2 quickstart

quickstart-long: setup ## the same with a real budget (hours on 2 cores); run it again to resume
	$(BIN)/llada2 quickstart --config=configs/quickstart_long.py

posttrain: setup | runs/quickstart/merged ## SFT, CAP and DPO of the quickstart's model; writes runs/posttrain/report.md
	$(BIN)/llada2 posttrain

posttrain-study: setup | runs/quickstart/merged ## the full grid with three seeds: hours; run it again to resume
	$(BIN)/llada2 posttrain --config=configs/posttrain_study.py

runs/quickstart/merged:
	$(MAKE) quickstart

test: setup ## lint, then all tests, 12 minutes the first time
	@$(MAKE) --no-print-directory -j 2 lint $(LIBTPU)
	JAX_COMPILATION_CACHE_DIR="$(CURDIR)/.cache/jax" $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test-slow: setup ## the tests marked slow: jobs of up to four processes; minutes
	JAX_COMPILATION_CACHE_DIR="$(CURDIR)/.cache/jax" $(BIN)/python -m pytest -n 0 -m slow $(PYTEST_ARGS)

test-oldest: .cache/oldest/.stamp ## the tests under the oldest jax that works, in an environment of its own
	JAX_COMPILATION_CACHE_DIR="$(CURDIR)/.cache/jax-oldest" .cache/oldest/bin/python -m pytest -n 2 $(PYTEST_ARGS)

torture: setup ## survive 1000 random kills, preemptions, full disks and damaged checkpoints; resumable
	$(BIN)/python -m tests.torture --out runs/torture $(TORTURE_ARGS)

fuzz: setup ## search the readers of configs, data, templates and checkpoints for crashes; minutes
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -n 2 \
	  tests/unit/test_fuzz.py tests/unit/test_data_fuzz.py $(PYTEST_ARGS)

test-kernels: setup ## every case of the attention contract for every backend, in interpret mode; half an hour
	KERNEL_CASES=all JAX_COMPILATION_CACHE_DIR="$(CURDIR)/.cache/jax" \
	  $(BIN)/python -m pytest -n 2 tests/kernels -k matches_the_oracle $(PYTEST_ARGS)

lint: setup ## style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo --cache-dir .cache/import_linter

format: setup ## let ruff rewrite the files in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup ## share of a training step that is not the model's; minutes
	$(BIN)/python -m llada2_jax.bench overhead

aot: setup $(LIBTPU) ## compile the kernels for TPU v5e, v5p, v6e and 7x, without a TPU; 8 minutes
	JAX_PLATFORMS=cpu $(BIN)/python -m pallas_kernels.aot

.cache/libtpu/libtpu/libtpu.so: requirements-libtpu.txt | $(STAMP)
	@echo "Fetching the TPU compiler into .cache/libtpu (640 MB on disk)"
	@$(PIP) install -qq --no-deps --upgrade --target .cache/libtpu -r $<
	@touch $@

# constraints.txt, but with the versions of constraints-oldest.txt where that has any.
.cache/oldest/.stamp: pyproject.toml constraints.txt constraints-oldest.txt | $(STAMP)
	$(BIN)/python -m venv .cache/oldest
	{ cat constraints-oldest.txt; grep -vxiE '($(OLDEST))==.*' constraints.txt; } > .cache/oldest/constraints.txt
	.cache/oldest/bin/python -m pip install -qq --disable-pip-version-check -c .cache/oldest/constraints.txt $(BUILDERS)
	.cache/oldest/bin/python -m pip install -qq --disable-pip-version-check --no-compile \
	  -c .cache/oldest/constraints.txt --no-build-isolation --editable '.[dev]'
	$(call compile,.cache/oldest/bin)
	@touch $@

wheel: setup ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation

pins: setup ## renew constraints.txt from a clean environment with the newest releases
	rm -rf .cache/pins
	$(BIN)/python -m venv .cache/pins
	.cache/pins/bin/python -m pip install -qq --disable-pip-version-check $(BUILDERS)
	.cache/pins/bin/python -m pip install -qq --disable-pip-version-check --no-build-isolation --editable '.[dev]'
	{ sed '/^[^#]/,$$d' constraints.txt; .cache/pins/bin/python -m pip freeze --exclude-editable; } > .cache/constraints.txt
	mv .cache/constraints.txt constraints.txt
	rm -rf .cache/pins

clean: ## remove caches and built files; .venv and runs/ stay
	rm -rf .cache .hypothesis dist build *.egg-info
	find llada2_jax pallas_kernels configs tests -name __pycache__ -prune -exec rm -rf {} +
