# Every target works from a fresh clone: it makes the environment first when it is missing or out of date.
# Variables given on the line (make reproduce-table2 IMAGENET=/data/imagenet) reach the commands through the
# environment, as does what is exported in the shell.

PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
READY = $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup lint test smoke data data-check retrain reproduce speed report test-report screenshots \
	reproduce-table2 reproduce-waveclip-table1 reproduce-waveclip-fig1 reproduce-waveclip-fig3 \
	reproduce-waveclip-fig4 reproduce-waveclip-highres reproduce-frontier \
	reproduce-embedded-models reproduce-fashion-mnist \
	reproduce-mlip-table1 reproduce-mlip-table2 reproduce-mlip-table3 reproduce-mlip-table4 reproduce-mlip-table5 \
	reproduce-mlip-table6 reproduce-mlip-table7 reproduce-mlip-table8 reproduce-mlip-table9 reproduce-mlip-table10 \
	reproduce-mlip-fig2 reproduce-mlip-fig5 reproduce-mlip-fig6 reproduce-mlip-fig7 \
	reproduce-patchrank-table1 reproduce-patchrank-fig1 reproduce-patchrank-fig3 reproduce-patchrank-fig4 \
	reproduce-patchrank-fig5 reproduce-patchrank-costs

help: ## explain every target and variable
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-28s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "variables, as in make retrain ONLY=teacher:"
	@awk -F '## = ' '/^## = / { print "  " $$2 }' Makefile
## = SMOKE=1          benchmarks at their smallest, for a check that takes minutes
## = IMAGENET=DIR     ImageNet's val folder: fills the accuracies of paper scale
## = WEIGHTS=DIR      one weights file per row of the table, for the same
## = EFFCLIP_DATA=DIR folder of the catalogue's data sets: reproduce-fashion-mnist, effclip evaluate
## = DOWNLOAD=1       reproduce-fashion-mnist fetches its data into EFFCLIP_DATA
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

# Two processes of one thread each: most tests are small, and threads that wait for one another cost more than they give.
test: $(READY) ## the whole test suite, without a network, in two processes
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

smoke: $(READY) ## every benchmark at its smallest, in one process
	SMOKE=1 $(PY) -m benchmarks all

data: $(READY) ## draw and pack the embedded benchmark's pictures now (otherwise on first use)
	$(PY) -m common.data.embedded

data-check: $(READY) ## is a recipe's data all there? (CONFIG=FILE.yaml; exit code 1 when something is wrong)
	$(PY) -m common.data.check $(CONFIG)

retrain: $(READY) ## train the embedded models again (ONLY=NAME for one; resumes, skips what is finished)
	$(PY) -m benchmarks retrain
	$(if $(ONLY)$(CONFIG),,$(PY) -m benchmarks patchrank-runs)

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

reproduce-waveclip-highres: $(READY) ## WaveCLIP with two and three levels at 448 and 512 px; the embedded one at 96 px
	$(PY) -m benchmarks waveclip-highres

reproduce-frontier: $(READY) ## the three methods and their compositions: accuracy against multiply-adds and time
	$(PY) -m benchmarks frontier

reproduce-embedded-models: $(READY) ## the embedded models' zero-shot accuracy, retrieval and linear probe
	$(PY) -m benchmarks embedded-models

reproduce-fashion-mnist: $(READY) ## train a CLIP and a WaveCLIP on Fashion-MNIST (EFFCLIP_DATA=DIR) and test both
	$(PY) -m benchmarks fashion-mnist

reproduce-mlip-table1: $(READY) ## MLIP's Table 1, ImageNet: the paper's, and ours from what `effclip evaluate` found
	$(PY) -m benchmarks mlip-table1

reproduce-mlip-table2: $(READY) ## MLIP's Table 2, ten data sets: the same
	$(PY) -m benchmarks mlip-table2

reproduce-mlip-table3: $(READY) ## MLIP's Table 3, data of several sizes; trains what is missing
	$(PY) -m benchmarks mlip-ablations --table 3
	$(PY) -m benchmarks mlip-table3

reproduce-mlip-table4: $(READY) ## MLIP's Table 4, retrieval: as Table 1
	$(PY) -m benchmarks mlip-table4

reproduce-mlip-table5: $(READY) ## MLIP's Table 5, label smoothing and nearest neighbours; trains what is missing
	$(PY) -m benchmarks mlip-ablations --table 5
	$(PY) -m benchmarks mlip-table5

reproduce-mlip-table6: $(READY) ## MLIP's Table 6, frequency transform and token alignment; trains what is missing
	$(PY) -m benchmarks mlip-ablations --table 6
	$(PY) -m benchmarks mlip-table6

reproduce-mlip-table7: $(READY) ## MLIP's Table 7, matchings of tokens; trains what is missing
	$(PY) -m benchmarks mlip-ablations --table 7
	$(PY) -m benchmarks mlip-table7

reproduce-mlip-table8: $(READY) ## MLIP's Table 8, with and without the Guide; trains what is missing
	$(PY) -m benchmarks mlip-ablations --table 8
	$(PY) -m benchmarks mlip-table8

reproduce-mlip-table9: $(READY) ## MLIP's Table 9: multiply-adds of CLIP and MLIP beside the paper's
	$(PY) -m benchmarks mlip-table9

reproduce-mlip-table10: $(READY) ## MLIP's Table 10: time of a training step of every row, and accuracy for the time
	$(PY) -m benchmarks mlip-table10

reproduce-mlip-fig2: $(READY) ## MLIP's Figure 2: likeness of tokens by layer, and removing some at random
	$(PY) -m benchmarks mlip-fig2

reproduce-mlip-fig5: $(READY) ## MLIP's Figure 5: the ten pictures found for a caption
	$(PY) -m benchmarks mlip-fig5

reproduce-mlip-fig6: $(READY) ## MLIP's Figure 6: what the Lego-Filter passes
	$(PY) -m benchmarks mlip-fig6

reproduce-mlip-fig7: $(READY) ## MLIP's Figure 7: the embedding space by t-SNE
	$(PY) -m benchmarks mlip-fig7

reproduce-patchrank-table1: $(READY) ## Patch Ranking's table: methods x tasks at keep .6, and the headline
	$(PY) -m benchmarks patchrank-table1

reproduce-patchrank-fig1: $(READY) ## Patch Ranking's Figure 1: accuracy against multiply-adds by keep rate
	$(PY) -m benchmarks patchrank-fig1

reproduce-patchrank-fig3: $(READY) ## Patch Ranking's Figure 3: the three scores, patch by patch
	$(PY) -m benchmarks patchrank-fig3

reproduce-patchrank-fig4: $(READY) ## Patch Ranking's Figure 4: the patches kept at 50 %
	$(PY) -m benchmarks patchrank-fig4

reproduce-patchrank-fig5: $(READY) ## Patch Ranking's Figure 5: pruning before the first block, without tuning
	$(PY) -m benchmarks patchrank-fig5

reproduce-patchrank-costs: $(READY) ## Patch Ranking's costs: every method by keep rate, and golden rankings
	$(PY) -m benchmarks patchrank-costs

reproduce: $(READY) ## every table and figure above, in one process (Fashion-MNIST where EFFCLIP_DATA is set)
	$(PY) -m benchmarks all

speed: $(READY) ## our towers, MLIP's training step and our shard loader, each against its reference on this machine
	$(PY) -m benchmarks speed
	$(PY) -m benchmarks loading

report: $(READY) ## write the tables of README and docs, and all results as one HTML page (runs/report.html)
	$(PY) -m benchmarks report

test-report: $(READY) ## drive that page in headless Chromium, apart from make test (Debian: apt-get install chromium)
	$(PY) -m pytest tests/browser

screenshots: $(READY) ## photograph that page for the README, docs/report*.png (needs chromium too)
	$(PY) -m benchmarks screenshots
