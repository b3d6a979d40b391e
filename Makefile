# Every target works from a fresh clone: it makes the environment first when it is missing or out of date.
# Variables given on the line (make reproduce-table2 IMAGENET=/data/imagenet) reach the commands through the
# environment, as does what is exported in the shell.

PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
READY = $(VENV)/.ready
NEWER = install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11

.DEFAULT_GOAL := help
.PHONY: help setup lint test smoke data data-check retrain reproduce speed report test-report screenshots

help: ## explain every target and variable
	@awk -F ':.*## ' '/^[a-z0-9%-]+:.*## / { printf "%-28s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "tables and figures:"
	@$(PYTHON) -c 'from benchmarks.registry import listing; print(listing("reproduce-"))'
	@echo
	@echo "variables, as in make retrain ONLY=shapes-teacher-0:"
	@awk -F '## = ' '/^## = / { print "  " $$2 }' Makefile
## = SMOKE=1          benchmarks at their smallest, for a check that takes minutes
## = IMAGENET=DIR     ImageNet's val folder: fills the accuracies of paper scale
## = WEIGHTS=DIR      one weights file per row of the table, for the same
## = EFFCLIP_DATA=DIR folder of the catalogue's data sets: reproduce-fashion-mnist, effclip evaluate
## = DOWNLOAD=1       reproduce-fashion-mnist fetches its data into EFFCLIP_DATA
## = PHOTOS=DIR       reproduce-photos: pictures, one folder a class; OUT=DIR takes its results (docs/photos.md)
## = DENSE=DIR WAVECLIP=DIR FIRST=DIR DATA=NAME EVERY=N  reproduce-deploy measures these too (docs/deploy.md)
## = TIMES=NAME,NAME    reproduce-deploy measures the times of these stored tables again, and nothing else
## = CLIP=DIR MLIP=DIR DATA=NAME  reproduce-mlip-fig2, -fig5, -fig6, -fig7 show these model directories (docs/mlip.md)
## = SEEDS=N          training seeds of reproduce-photos and reproduce-fashion-mnist (default 1)
## = COMPILE=1        speed and reproduce-deploy also measure torch.compile, which needs a C++ compiler and minutes
## = ONLY=NAME        retrain this run alone, or ONLY='shapes-*' those; reproduce-photos and -fashion-mnist too
## = CONFIG=FILE      the recipe of data-check, or an overlay on the recipes of retrain
## = EFFCLIP_RUNS=DIR run directories and caches (default runs)
## = PYTHON, VENV     the Python that makes the environment (python3), and where it is made (.venv)

setup: $(READY) ## make the environment with everything the other targets need

# The stamp is written last, so that an interrupted installation is done again.
$(READY): setup.cfg pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there; $(NEWER)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; $(NEWER)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module; install it (Debian: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -e '.[dev,embedded,data,export]'
	touch $@

lint: $(READY) ## ruff's rules and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Two processes of one thread each: most tests are small, and threads that wait for one another cost more than they give.
test: $(READY) ## the whole test suite, without a network, in two processes
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

smoke: $(READY) ## every benchmark at its smallest, and a page with every cell of MLIP's tables filled by a miniature
	SMOKE=1 $(PY) -m benchmarks all
	$(PY) -m benchmarks mlip-dry-run

data: $(READY) ## draw and pack the embedded benchmark's pictures now (otherwise on first use)
	$(PY) -m common.data.embedded

data-check: $(READY) ## is a recipe's data all there? (CONFIG=FILE.yaml; exit code 1 when something is wrong)
	$(PY) -m common.data.check $(CONFIG)

retrain: $(READY) ## train the embedded models that are not finished (resumes; ONLY=NAME: one, also a committed one)
	$(PY) -m benchmarks retrain
	$(if $(ONLY)$(CONFIG),,$(PY) -m benchmarks patchrank-runs)

reproduce-%: $(READY) ## one table or figure, by its name below; trains first what it lacks
	$(PY) -m benchmarks $*

reproduce: $(READY) ## every table and figure above, in one process (those that need data where it is named)
	$(PY) -m benchmarks all

speed: $(READY) ## our towers, MLIP's training step and our shard loader, each against its references on this machine
	$(PY) -m benchmarks speed
	$(PY) -m benchmarks loading

report: $(READY) ## write the tables of README and docs, and all results as one HTML page (runs/report.html)
	$(PY) -m benchmarks report

test-report: $(READY) ## drive that page in headless Chromium, apart from make test (Debian: apt-get install chromium)
	$(PY) -m pytest tests/browser

screenshots: $(READY) ## photograph that page for the README, docs/report*.png (needs chromium too)
	$(PY) -m benchmarks screenshots
