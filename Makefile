# make demo    train a small model on two CPU processes, packed and context-parallel: the main job, in a few minutes
# make test    every test but those marked slow
# make checks  lint, types and test
# make nightly thousands of random masks, where `make test` tries hundreds; and the tests marked slow
#
# Each makes .venv with what it needs, pinned in requirements/, and does so again only when those files change.
# WORKERS=4 make test           runs test files in four processes, 2 if not said; 0 is pytest's own process alone.
# PYTHON=python3.12 make test   uses another interpreter. pip's own settings (PIP_EXTRA_INDEX_URL, ...) are respected.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test nightly lint types checks pictures clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.demo
	@echo "== Training: 2 processes, configs/demo_cpu.yaml, results in runs/demo_cpu"
	@OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 launch/train.py --config configs/demo_cpu.yaml

test: $(VENV)/.dev
	@echo "== Tests"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15

nightly: $(VENV)/.dev
	@echo "== Thousands of random masks"
	@HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/mask tests/attention/test_properties.py --timeout=0
	@$(BIN)/python -m pytest -m slow --timeout=0

lint: $(VENV)/.dev
	@echo "== Lint: ruff"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(VENV)/.dev
	@echo "== Types: mypy"
	@$(BIN)/mypy

checks: lint types test

pictures: $(VENV)/.demo
	@echo "== Pictures of the README, into docs/"
	@$(BIN)/python docs/pictures.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "fm_longctx needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name another: PYTHON=python3.12 make $(MAKECMDGOALS)"; exit 1; }
	@echo "== Virtual environment: $(VENV), from $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment (Debian and Ubuntu: apt install python3-venv)."; exit 1; }

$(VENV)/.torch: requirements/torch.txt | $(BIN)/python
	@echo "== Installing PyTorch (the longest step)"
	@$(PIP) -r requirements/torch.txt
	@touch $@

$(VENV)/.package: pyproject.toml setup.py $(VENV)/.torch
	@echo "== Installing fm_longctx in place"
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.demo: requirements/demo.txt $(VENV)/.torch $(VENV)/.package
	@echo "== Installing what the demo needs"
	@$(PIP) -r requirements/demo.txt
	@touch $@

# DS_BUILD_OPS=0: DeepSpeed's own kernels are not compiled; nothing here uses them.
$(VENV)/.dev: requirements/dev.txt requirements/demo.txt $(VENV)/.torch $(VENV)/.package
	@echo "== Installing what the tests need"
	@DS_BUILD_OPS=0 $(PIP) -r requirements/dev.txt
	@touch $@
