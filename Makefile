# make transfer   set up, then run the main job on embedded data
# make test       set up, then lint, type-check and test
# make bench      time the supernet's search step
# make help       everything else

VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
NATIVE := nas/_native.json
SOURCES := nas pipeline tests benchmarks setup.py
SANITIZED := NAS_TRANSFER_SANITIZE=1 TORCH_EXTENSIONS_DIR=build/sanitize

.DEFAULT_GOAL := help
.PHONY: help setup transfer test lint sanitize bench cuda-check gpu-check ui upgrade clean

help:  ## say what can be made
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(READY) $(NATIVE)  ## make the virtual environment, compile the kernels

$(READY): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up $(VENV); PyTorch is large, this takes some minutes once"
	$(PYTHON) -m venv $(VENV)
	NAS_TRANSFER_NO_EXTENSION=1 \
	  $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# With the torch that was just installed. No compiler is no failure: it says so, and tries next time.
$(NATIVE): $(READY) setup.py nas/ops/recipe.py $(shell find csrc)
	$(BIN)/python setup.py -q build_ext --inplace

transfer: setup  ## run the main job on embedded data
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mlflow run . -e transfer \
	  --env-manager local --experiment-name nas-transfer $(ARGUMENTS)

test: lint setup  ## lint, type-check and test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy -p nas -p pipeline

# libstdc++ is loaded first too, for the sanitizer looks up its throw before torch brings it. Tests
# that compile are left out, for the compilers would run under the sanitizer as well: nvcc does not end.
sanitize: $(READY)  ## run the kernel tests under the address and undefined-behaviour sanitizers
	$(SANITIZED) $(BIN)/python -c 'from nas.ops.build import compiled; compiled()'
	$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest -n 0 tests/nas/ops --ignore tests/nas/ops/test_build.py \
	  --ignore-glob 'tests/nas/ops/test_cuda_*.py'
	PYTHONPATH=. $(BIN)/python tests/emulated_cells.py

bench: setup  ## time the supernet's search step (ARGUMENTS="--peers PATH --json FILE")
	$(BIN)/python -m benchmarks.supernet_step $(ARGUMENTS)

# From nothing, so that nvcc tells of every kernel: three minutes of a core for each of five kinds
# of numbers.
cuda-check: $(READY)  ## compile everything for GPUs without one, report registers and spills
	rm -rf build/cuda
	FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0;9.0" NVCC_APPEND_FLAGS="-Xptxas -v" \
	  $(BIN)/python setup.py -q build_ext --build-lib build/cuda --build-temp build/cuda
	PYTHONPATH=. $(BIN)/python -m benchmarks.cuda_registers --log build/cuda/native/build.log \
	  --report benchmarks/results/cuda-registers.md

gpu-check:  ## build, test and time the kernels on a GPU, with the python that PYTHON names
	FORCE_CUDA=1 PYTHONPATH=. $(PYTHON) -m benchmarks.gpu_check $(ARGUMENTS)

ui: $(READY)  ## open the MLflow UI on the local store
	$(BIN)/mlflow ui

upgrade: $(READY)  ## renew constraints.txt with the newest versions that fit
	NAS_TRANSFER_NO_EXTENSION=1 $(BIN)/python -m pip install --quiet --upgrade -e '.[dev]'
	{ echo "# Versions that the project is tested with, for pip's -c; make upgrade renews them."; \
	  $(BIN)/python -m pip freeze --exclude-editable | grep == | grep -viE '^(nvidia|cuda|triton)'; \
	} > constraints.txt

clean:  ## remove the virtual environment and what was compiled
	rm -rf $(VENV) build nas/_native*
