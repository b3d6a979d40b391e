# Every target works from a fresh clone: it makes the environment first when it is missing or out of date.
# Variables given on the line (make reproduce-table2 IMAGENET=/data/imagenet) reach the commands through the
# environment, as does what is exported in the shell.

PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
READY = $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup lint test smoke data data-check retrain reproduce speed report \
	reproduce-table2 reproduce-waveclip-table1 reproduce-waveclip-fig1 reproduce-waveclip-fig3 \
	reproduce-waveclip-fig4

help: ## explain every target and variable
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-28s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "variables, as in make retrain ONLY=teacher:"
	@awk -F '## = ' '/^## = / { print "  " $$2 }' Makefile
## = SMOKE=1          benchmarks at their smallest, for a check that takes minutes
## = IMAGENET=DIR     ImageNet's val folder: fills the accuracies of paper scale
## = WEIGHTS=DIR      one weights file per row of the table, for the same
## = ONLY=NAME        retrain this run alone
## = CONFIG=FILE      the recipe of data-check, or an overlay on the recipes of retrain
## = EFFCLIP_RUNS=DIR run directories and caches (default runs)
## = PYTHON, VENV     the Python that makes the environment (python3), and where it is made (.venv)

setup: $(READY) ## make the environment with everything the other targets need

# The stamp is written last, so that an interrupted installation is done again.
$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -e '.[dev,embedded,data,export]'
	touch $@

lint: $(READY) ## ruff's rules and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

test: $(READY) ## the whole test suite, without a network
	$(PY) -m pytest

smoke: $(READY) ## every benchmark at its smallest, in one process
	SMOKE=1 $(PY) -m benchmarks all

data: $(READY) ## draw and pack the embedded benchmark's pictures now (otherwise on first use)
	$(PY) -m common.data.embedded

data-check: $(READY) ## is a recipe's data all there? (CONFIG=FILE.yaml; exit code 1 when something is wrong)
	$(PY) -m common.data.check $(CONFIG)

retrain: $(READY) ## train the embedded models again (ONLY=NAME for one; resumes, skips what is finished)
	$(PY) -m benchmarks retrain

reproduce-table2: $(READY) ## WaveCLIP's Table 2: tokens, multiply-adds and accuracy beside the paper's
	$(PY) -m benchmarks table2

reproduce-waveclip-table1: $(READY) ## WaveCLIP's Table 1
	$(PY) -m benchmarks waveclip-table1

reproduce-waveclip-fig1: $(READY) ## WaveCLIP's Figure 1: accuracy against multiply-adds
	$(PY) -m benchmarks waveclip-fig1

reproduce-waveclip-fig3: $(READY) ## WaveCLIP's Figure 3: cached against naive re-encoding
	$(PY) -m benchmarks waveclip-fig3

reproduce-waveclip-fig4: $(READY) ## WaveCLIP's Figure 4: margin against maximum probability
	$(PY) -m benchmarks waveclip-fig4

reproduce: $(READY) ## every table and figure above, in one process
	$(PY) -m benchmarks all

speed: $(READY) ## our towers against open_clip's on this machine
	$(PY) -m benchmarks speed

report: $(READY) ## write the README's tables from benchmarks/results
	$(PY) -m benchmarks report
