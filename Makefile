# `make train` and `make test` do everything on a fresh machine; the other targets are their parts.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
WORKERS ?= 2
# Of the oldest environment: Python 3.12 where there is one that starts, so that both are tested.
PYTHON_OLDEST ?= $(shell for python in python3.12 $$HOME/.pyenv/versions/3.12.*/bin/python $(PYTHON); do \
  $$python -c "" 2>/dev/null && { echo $$python; break; }; done)
VENV_OLDEST := .venv-oldest
RUN_OLDEST  := $(VENV_OLDEST)/bin/python
TESTS       := -m pytest -n $(WORKERS) -m
# The versions installed, for any platform: torch names its CUDA packages itself, and Triton has no build for some machines.
FREEZE      := -m pip freeze | grep -v -E '^(nvidia|cuda)-' | sed -E -e 's/\+cpu$$//' \
  -e 's/^(triton==.*)/\1 ; sys_platform == "linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")/'

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-oldest lint format setup setup-oldest lock lock-oldest clean

help:  ## list these targets
	@sed -n -E 's/^([a-z-]+):.*  ## (.*)/\1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "make %-12s %s\n", $$1, $$2 }'

train: setup  ## train a small model on the embedded text, save a checkpoint, print a sample
	$(RUN) train.py --preset smoke --out-dir out/smoke

test: setup lint  ## lint, then every test but the slow ones
	OMP_NUM_THREADS=1 $(RUN) $(TESTS) "not slow"

test-slow: setup  ## the slow tests
	OMP_NUM_THREADS=1 $(RUN) $(TESTS) slow

test-oldest: setup-oldest  ## what test runs, with the oldest versions that pyproject.toml allows, and their machine code for sm_90
	OMP_NUM_THREADS=1 $(RUN_OLDEST) $(TESTS) "not slow"
	$(RUN_OLDEST) -m bench.machine_code --arch sm_90

lint: setup  ## ruff, the floors that imports may not climb, mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports
	$(RUN) -m mypy

format: setup  ## repair what ruff can repair
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

setup: $(VENV)/.installed  ## make .venv with the versions of requirements.lock

$(VENV)/.installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.lock
	@touch $@

setup-oldest: $(VENV_OLDEST)/.installed  ## make .venv-oldest with the versions of requirements-oldest.lock

$(VENV_OLDEST)/.installed: requirements-oldest.lock
	$(PYTHON_OLDEST) -m venv $(VENV_OLDEST)
	$(RUN_OLDEST) -m pip install --quiet --requirement requirements-oldest.lock
	@touch $@

lock: setup  ## write the versions that are installed now to requirements.lock
	@{ echo "# What is tested. Written by 'make lock'; pyproject.toml says what is supported."; \
	  $(RUN) $(FREEZE); \
	} > requirements.lock.new
	@mv requirements.lock.new requirements.lock

lock-oldest: setup-oldest  ## write the same of the oldest environment
	@{ echo "# The oldest of what pyproject.toml allows, and what that needs. Written by 'make lock-oldest'."; \
	  $(RUN_OLDEST) $(FREEZE); \
	} > requirements-oldest.lock.new
	@mv requirements-oldest.lock.new requirements-oldest.lock
	@touch $(VENV_OLDEST)/.installed

clean:  ## delete the environments and the caches of the tools
	rm -rf $(VENV) $(VENV_OLDEST) .pytest_cache .ruff_cache .hypothesis .import_linter_cache .mypy_cache
