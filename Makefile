# make transfer   set up, then run the main job on embedded data
# make test       set up, then lint, type-check and test
# make bench      time the supernet's search step
# make help       everything else

VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
SOURCES := nas pipeline tests benchmarks

.DEFAULT_GOAL := help
.PHONY: help setup transfer test lint bench ui upgrade clean

help:  ## say what can be made
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(READY)  ## make the virtual environment

$(READY): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up $(VENV); PyTorch is large, this takes some minutes once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

transfer: $(READY)  ## run the main job on embedded data
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mlflow run . -e transfer \
	  --env-manager local --experiment-name nas-transfer $(ARGUMENTS)

test: lint  ## lint, type-check and test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

lint: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy -p nas -p pipeline

bench: $(READY)  ## time the supernet's search step (ARGUMENTS="--peers PATH --json FILE")
	$(BIN)/python -m benchmarks.supernet_step $(ARGUMENTS)

ui: $(READY)  ## open the MLflow UI on the local store
	$(BIN)/mlflow ui

upgrade: $(READY)  ## renew constraints.txt with the newest versions that fit
	$(BIN)/python -m pip install --quiet --upgrade -e '.[dev]'
	{ echo "# Versions that the project is tested with, for pip's -c; make upgrade renews them."; \
	  $(BIN)/python -m pip freeze --exclude-editable | grep == | grep -viE '^(nvidia|cuda|triton)'; \
	} > constraints.txt

clean:  ## remove the virtual environment
	rm -rf $(VENV)
