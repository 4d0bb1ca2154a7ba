# Every target makes what it needs: on a fresh machine `make demo` and `make test` are each the whole set-up.
SHELL := bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell grep -o '^torch==[0-9.]*' constraints.txt)

# PyPI's torch for Linux is the CUDA build, which is what a GPU wants. Elsewhere its gigabytes are of no use: take the
# CPU build from pip's own sources if they have one, else from PyTorch's index, and the CUDA build only if neither
# answers. TORCH_INDEX=... names the index of another build, an older CUDA say; TORCH_INDEX= takes PyPI's.
HAS_GPU = $(shell nvidia-smi -L 2>/dev/null | grep '^GPU')
TORCH_INDEX ?= $(if $(HAS_GPU),,https://download.pytorch.org/whl/cpu)
INSTALL_TORCH = $(BIN)/pip install --no-deps

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 picks the Python, ARGS='...' adds arguments to the tool a target runs."

.PHONY: venv
venv: $(READY) ## make .venv: pinned dependencies and sparsekv, editable

# The stamp is what makes a second run install nothing. torch goes first and alone, so that only it can come from
# another index; pip then sees it installed and fetches what it depends on.
$(READY): pyproject.toml setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' || { \
	  echo "sparsekv is set up with Python 3.10 to 3.14; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools
	@$(if $(filter %/cpu,$(TORCH_INDEX)),$(INSTALL_TORCH) '$(TORCH)+cpu' 2>/dev/null ||) \
	  $(INSTALL_TORCH) $(TORCH) $(if $(TORCH_INDEX),--retries 1 --timeout 15 --extra-index-url $(TORCH_INDEX))
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,cuda,eval]'
	@touch $@

.PHONY: demo
demo: $(READY) ## show sparse attention beside dense on a small model (CPU, a minute)
	$(BIN)/sparsekv demo $(ARGS)

.PHONY: test test-all
test: $(READY) ## run the tests, but for those that are wide by nature
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not wide" $(ARGS)
test-all: $(READY) ## run all tests, as CI does
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

# A GPU machine's own Python, torch and pytest, with nothing fetched and nothing in it changed: sparsekv is installed,
# editable, into a layer above it. After `make venv`, that Python may be .venv/bin/python.
GPU_VENV := .venv-gpu
.PHONY: test-gpu
test-gpu: $(GPU_VENV)/.ready ## run the GPU tests with the torch of PYTHON, offline
	$(GPU_VENV)/bin/python -m pytest -m gpu $(ARGS)

.PHONY: test-multi-gpu
test-multi-gpu: $(GPU_VENV)/.ready ## run the tests of several GPUs, as test-gpu does
	$(GPU_VENV)/bin/python -m pytest -m gpu tests/hf/test_ranks.py $(ARGS)

$(GPU_VENV)/.ready: pyproject.toml setup.cfg
	@$(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { \
	  echo "$(PYTHON) has no torch that sees a CUDA GPU. Name one that has, for example, after make venv:" >&2; \
	  echo "  make test-gpu PYTHON=.venv/bin/python" >&2; exit 1; }
	$(PYTHON) .ci/layered_venv.py $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --no-index --no-build-isolation --no-deps --editable .
	@touch $@

KERNELS := $(wildcard cuda/*.cu cuda/common/*.cuh tests/extending/*.cuh)
.PHONY: lint
lint: $(READY) ## ruff, clang-format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(KERNELS)
	$(BIN)/mypy

.PHONY: format
format: $(READY) ## let ruff and clang-format format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(KERNELS)

.PHONY: bench
bench: $(READY) ## time sparse attention beside dense
	$(BIN)/sparsekv bench $(ARGS)

.PHONY: docs
docs: $(READY) ## make the documentation with the API reference, in build/docs
	$(BIN)/python .ci/documentation.py $(ARGS)

.PHONY: notebooks
notebooks: $(READY) ## execute the notebooks in place, ARGS names some of them
	$(BIN)/python .ci/notebooks.py $(ARGS)

.PHONY: wheel
wheel: $(READY) ## build dist/*.whl and the sdist, byte for byte reproducible
	$(BIN)/python .ci/build.py $(ARGS)

.PHONY: release-check
release-check: $(READY) ## name the results that were measured with other kernels than today's
	$(BIN)/python -m tools.release_check

.PHONY: clean
clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info $(GPU_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
