# `make tables` and `make test` do everything from a fresh clone; `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON  ?= python3
PROFILE ?= quick
TABLES  ?= 1 2 3 4 5 6 7 8 9
VENV    := .venv
BIN     := $(VENV)/bin
PY      := $(BIN)/python
READY   := $(VENV)/.ready-dev
# What tables need is less than what everything needs; whoever has everything has them, too.
TABLES_READY := $(if $(wildcard $(READY)),$(READY),$(VENV)/.ready-tables)
export MATPLOTLIBRC := $(CURDIR)/nbs/matplotlibrc
export PATH := $(CURDIR)/$(BIN):$(PATH)

## ---- installation ----------------------------------------------------------------------------
# An environment that was interrupted, or whose Python has gone, is made anew: .installing is there while pip works.
$(shell if [ -d $(VENV) ]; then { [ ! -e $(VENV)/.installing ] && $(PY) -c '' 2>/dev/null; } || rm -f $(VENV)/.ready-*; fi)

$(VENV)/.ready-%: settings.ini setup.py pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "rab_nb needs Python >= 3.11, but there is no '$(PYTHON)'; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "rab_nb needs Python >= 3.11, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1); name a newer one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@if [ -e $(VENV)/.installing ] || ! $(PY) -m pip --version >/dev/null 2>&1; then rm -rf $(VENV); $(PYTHON) -m venv $(VENV); fi
	@touch $(VENV)/.installing
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@rm -f $(VENV)/.installing && touch $@

install: $(READY) ## create .venv and install the package with everything it needs

## ---- tables ----------------------------------------------------------------------------------
modules = $(filter-out rab_nb/_modidx.py rab_nb/__init__.py $(1:%=rab_nb/%.py),$(wildcard rab_nb/*.py)) rab_nb/paper.csv
STAMPS := $(TABLES:%=.stamps/$(PROFILE)/table%)
known  := $(filter $(TABLES),1 2 3 4 5 6 7 8 9)
ifneq ($(words $(known)),$(words $(TABLES)))
$(error TABLES="$(TABLES)": the paper has tables 1 2 3 4 5 6 7 8 9; choose from these, for example TABLES="1 9")
endif
ifeq ($(wildcard nbs/experiments/profiles/$(PROFILE).yaml),)
$(error PROFILE=$(PROFILE) is unknown; choose one of: $(basename $(notdir $(wildcard nbs/experiments/profiles/*.yaml))))
endif

tables: $(STAMPS) .stamps/$(PROFILE)/report ## regenerate the paper's tables [PROFILE=quick|cpu|paper] [TABLES="1 9"]; quick computes, cpu and paper draw what `rab-nb run` has computed
	@$(PY) -m rab_nb.report where $(PROFILE) $(TABLES)

.stamps/$(PROFILE)/report: $(STAMPS)
	@$(PY) -m rab_nb.report report
	@touch $@

# Tables 1 to 6 of cpu and paper take hours to days: they are drawn from the blocks that are there, and `rab-nb run` computes more.
# Tables 7 to 9 take minutes: what is missing is computed.
finished := $(if $(filter cpu paper,$(PROFILE)),--finished)
blocks = $(wildcard results/*/$(@F).safetensors)
.SECONDEXPANSION:

dnn_needs = nbs/experiments/dnn.ipynb nbs/experiments/profiles/$(PROFILE).yaml $(call modules,cli defences knn chi bins votes quantised)
knn_needs = nbs/experiments/knn.ipynb nbs/experiments/profiles/$(PROFILE).yaml $(call modules,cli defences dp)
make_table = @mkdir -p $(@D) && $(PY) -m rab_nb.report make $(1) $(@F:table%=%) $(PROFILE) && touch $@

$(addprefix .stamps/$(PROFILE)/table,1 2 3 4 5 6): $(dnn_needs) $$(blocks) | $(TABLES_READY)
	$(call make_table,$(finished))
$(addprefix .stamps/$(PROFILE)/table,7 8 9): $(knn_needs) $$(blocks) | $(TABLES_READY)
	$(call make_table,)

## ---- tests -----------------------------------------------------------------------------------
test: $(READY) ## notebooks as tests, then pytest
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 pytest -q -n 2 --dist loadscope

test-slow: $(READY) ## the Monte Carlo and real-data checks (minutes; real data where RAB_DATA is set)
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --flags slow --file_re '^\d\d'
	pytest -q -m slow

test-faults: $(READY) ## kill workers, corrupt files, fill disks: every run must survive
	pytest -q -n 2 -m faults tests/test_faults.py

check: $(READY) ## notebooks clean, modules and README in step with them
	rm -f rab_nb/[a-z]*.py rab_nb/_modidx.py && nbdev_export && nbdev_clean && $(MAKE) -s readme
	ruff check
	@test -z "$$(git status --porcelain rab_nb nbs README.md)" || { git status --porcelain rab_nb nbs README.md; \
	  echo 'notebooks, modules or README differ from what is committed: run `make export readme`, then commit' >&2; exit 1; }

## ---- notebooks and documentation -------------------------------------------------------------
NOTEBOOKS = $(wildcard nbs/[0-9]*.ipynb nbs/index.ipynb nbs/internals/*.ipynb nbs/tutorials/*.ipynb nbs/experiments/*.ipynb)

export: $(READY) ## notebooks -> rab_nb/
	nbdev_export && nbdev_clean

run-nbs: $(READY) ## execute every notebook in place and save its outputs
	$(PY) -W ignore docs/notebooks.py $(NOTEBOOKS)

readme: $(READY) ## nbs/index.ipynb -> README.md
	@$(PY) -W ignore docs/readme.py

docs: $(READY) ## the documentation site -> _site/index.html
	$(PY) -W ignore docs/build.py

test-site: docs ## the site in Chromium: two widths, light and dark (screenshots in build/screenshots)
	pytest -q -rs -m slow tests/test_site.py

outputs-check: $(READY) ## run every notebook again: fails where an output is not the saved one
	OMP_NUM_THREADS=1 $(PY) -W ignore docs/notebooks.py --check

lab: $(READY) ## open JupyterLab on the notebooks
	jupyter lab nbs

clean: ## remove the environment and every derived file, but not results/ and not the run store
	rm -rf $(VENV) .stamps _proc _site build dist *.egg-info

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: install tables test test-slow test-faults check export run-nbs readme docs test-site outputs-check lab clean help
