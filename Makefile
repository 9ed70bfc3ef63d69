# `make train` and `make test` do everything on a fresh machine; the other targets are their parts.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help train test test-slow lint format setup lock clean

help:  ## list these targets
	@sed -n -E 's/^([a-z-]+):.*  ## (.*)/\1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "make %-10s %s\n", $$1, $$2 }'

train: setup  ## train a small model on the embedded text, save a checkpoint, print a sample
	$(RUN) train.py --preset smoke --out-dir out/smoke

test: setup lint  ## lint, then every test but the slow ones
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) -m "not slow"

test-slow: setup  ## the slow tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) -m slow

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

lock: setup  ## write the versions that are installed now to requirements.lock
	@{ echo "# What is tested. Written by 'make lock'; pyproject.toml says what is supported."; \
	  $(RUN) -m pip freeze | sed -E -e 's/\+cpu$$//' \
	    -e 's/^(triton==.*)/\1 ; sys_platform == "linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")/'; \
	} > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean:  ## delete .venv and the caches of the tools
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache .mypy_cache
