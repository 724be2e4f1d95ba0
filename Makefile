# `make book` builds everything and trains the demo model; `make test` checks everything.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
export GPTLIB_RUNS := $(CURDIR)/runs
export PYTHONPATH := $(CURDIR)
export PYTHONHASHSEED := 0
export PYTHONWARNINGS := ignore
export HF_HUB_DISABLE_TELEMETRY := 1
# Jupyter Book's own command, told which executed notebooks the pages show
BUILD = $(BIN)/jupyter-book build --quiet . --path-output .
# JupyterLab of this environment asks for no news and looks for no update of itself
LABCONFIG = $(VENV)/etc/jupyter/labconfig
QUIET = mkdir -p $(LABCONFIG) && cp tools/jupyterlab.json $(LABCONFIG)/default_setting_overrides.json

.PHONY: help book test check pytest coverage notebooks site pdf lab tangle weave format clean

help:
	@echo "make book    execute every notebook, train the demo model, render the site; changes no file that git knows"
	@echo "make lab     JupyterLab on your own copies of the notebooks, in lab/"
	@echo "make test    everything that must hold: check, pytest, nbval on all notebooks, the site without a warning"
	@echo "make check   manuscripts, notebooks and gptlib agree; references; numbers; style (under a minute)"
	@echo "make weave   after editing a manuscript: gptlib, the library index and the notebooks that changed"
	@echo "make site    render the stored notebooks"
	@echo "make pdf     the whole book as one PDF, _build/book.pdf; needs Chromium"
	@echo "make coverage  pytest once more, and how many lines and branches of gptlib it takes"
	@echo "make tangle  rewrite gptlib     make format  ruff, in manuscripts too     make clean"

# a marker newer than the requirements says that the environment is complete
$(VENV)/.complete: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	$(QUIET)
	touch $@

book: $(VENV)/.complete
	$(PY) tools/tangle.py --check
	$(PY) tools/weave.py --jobs 2 --to _build/notebooks
	BOOK_NOTEBOOKS=_build/notebooks $(BUILD)
	@$(PY) tools/weave.py --to _build/notebooks --summary

test: check pytest notebooks site

check: $(VENV)/.complete
	$(PY) tools/tangle.py --check
	$(PY) tools/library_index.py --check
	$(PY) tools/toc.py --check
	$(PY) tools/plain.py
	$(PY) tools/weave.py --check
	$(PY) tools/front.py --check
	$(PY) tools/check_numbers.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check gptlib tools ledger tests book
	$(PY) tools/format.py --check

pytest: $(VENV)/.complete
	$(PY) -m pytest --ignore=tests/test_site.py

coverage: $(VENV)/.complete
	$(PY) -m coverage run -m pytest --ignore=tests/test_site.py
	$(PY) -m coverage report

notebooks: $(VENV)/.complete
	$(PY) -m pytest --nbval --nbval-current-env --nbval-cell-timeout=1800 -p no:cacheprovider notebooks

site: $(VENV)/.complete
	$(PY) tools/plain.py
	$(BUILD) -W -n --keep-going
	$(PY) -m pytest tests/test_site.py

pdf: $(VENV)/.complete
	$(BUILD)
	$(PY) tools/pdf.py

tangle: $(VENV)/.complete
	$(PY) tools/tangle.py
	$(PY) tools/library_index.py
	$(PY) tools/toc.py

weave: tangle
	$(PY) tools/weave.py
	$(PY) tools/front.py

format: $(VENV)/.complete
	$(BIN)/ruff check --fix --quiet tools ledger tests book
	$(BIN)/ruff format --quiet tools ledger tests book
	$(PY) tools/format.py

lab: $(VENV)/.complete
	@$(QUIET)
	$(PY) tools/lab.py
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/lab/00_start.ipynb

clean:
	rm -rf _build runs/cache
