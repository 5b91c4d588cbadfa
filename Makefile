# Each target sets up what it needs by itself: an environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo notebooks test coverage lint format clean help docs kernels kernels-oldest bench bench-compare gpu-check release-check

help:
	@echo "make demo    train on Megapixel MNIST with attention sampling and uniform sampling, draw what was looked at"
	@echo "make test    run the tests"
	@echo "make coverage  run the tests and count the lines that they run, which takes half as long again"
	@echo "make kernels compile all GPU kernels, without a GPU, and print what came out (kernels-oldest: by Triton 3.6)"
	@echo "make bench   time a training step and the ops beside their alternatives, on the GPU where there is one"
	@echo "make bench-compare A.json B.json  what changed between two runs, beyond the noise"
	@echo "make gpu-check  where there is a GPU: run all that needs one, write bench/results/<GPU>.md (MINUTES=8)"
	@echo "make docs    build the site into site/: pages, API reference; open site/index.html"
	@echo "make notebooks  run the tutorials and keep what they print and show (NOTEBOOKS=\"how-sure slide-to-qupath\")"
	@echo "make release-check  build, look into and install what would be released (RELEASE_ARGS=--draft)"
	@echo "make lint    check style, format and types"
	@echo "make format  apply the format"
	@echo "make clean   remove the environment and caches; runs/ stays"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed, found: $$($(PYTHON) --version). Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Threads that sleep while they wait do not stall each other where other programs use the cores too.
demo: $(READY)
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(BIN)/ats demo

# A process a core, each of one thread: processes of many threads would wait for each other.
test: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal \
		$(COVERAGE) $(PYTEST_ARGS)

coverage: COVERAGE := --cov --cov-report=term
coverage: test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

kernels: $(READY)
	$(BIN)/python -m tools.offline.compile $(KERNELS_ARGS)

# The oldest Triton that is supported, put before the environment's own; compiling does not use torch.
OLDEST_TRITON := $(VENV)/triton-3.6.0
$(OLDEST_TRITON)/.ready: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(OLDEST_TRITON) triton==3.6.0
	@touch $@

kernels-oldest: $(OLDEST_TRITON)/.ready
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m tools.offline.compile $(KERNELS_ARGS)

bench: $(READY)
	$(BIN)/python -m pytest bench $(BENCH_ARGS)

# The files' names come as goals: they have nothing to be made from.
ifeq (bench-compare,$(firstword $(MAKECMDGOALS)))
COMPARED := $(wordlist 2,$(words $(MAKECMDGOALS)),$(MAKECMDGOALS))
.PHONY: $(COMPARED)
$(COMPARED): ; @:
endif
bench-compare: $(READY)
	@$(BIN)/python -m bench.changes $(COMPARED)

# Installs nothing: a machine with a GPU has a torch of its own, and may have no network.
MINUTES ?= 8
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tools.gpu_check --minutes $(MINUTES) $(GPU_CHECK_ARGS)

# In an environment of its own: reading docstrings takes no torch.
DOCS := $(VENV)/docs
$(DOCS)/.ready: docs/requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' \
		|| { echo "make docs needs Python 3.11.5 or newer, found: $$($(PYTHON) --version). Name another: make docs PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt --requirement docs/requirements.txt
	@touch $@

docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

notebooks: $(READY)
	$(BIN)/python -m tools.notebooks $(NOTEBOOKS)

RELEASE := $(VENV)/release
$(RELEASE)/.ready: tools/release-requirements.txt constraints.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --constraint constraints.txt --requirement tools/release-requirements.txt
	@touch $@

release-check: $(RELEASE)/.ready
	$(RELEASE)/bin/python tools/release_check.py $(RELEASE_ARGS)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage
