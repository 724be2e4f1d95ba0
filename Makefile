# `make book` builds everything and trains the demo model; `make test` checks everything.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAGE := _build/stage
export GPTLIB_RUNS := $(CURDIR)/runs
export PYTHONHASHSEED := 0
export PYTHONWARNINGS := ignore
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: book test check pytest notebooks site lab tangle weave format clean help

help:
	@echo "make book    tangle, execute every notebook, pretrain the demo model, render the site"
	@echo "make test    everything that must hold: check, pytest, nbval on all notebooks, the site with warnings as errors"
	@echo "make check   manuscripts, notebooks and gptlib agree; style; links (under a minute)"
	@echo "make weave   execute the notebooks whose chapter or library changed     make tangle   rewrite gptlib/"
	@echo "make site    render the stored notebooks     make lab   JupyterLab     make format   ruff     make clean"

# a marker newer than the requirements says that the environment is complete
$(VENV)/.complete: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

book: $(VENV)/.complete
	$(BIN)/python tools/tangle.py
	$(BIN)/python tools/weave.py --inputs
	$(BIN)/python tools/stage.py $(STAGE)
	$(BIN)/python tools/weave.py --to $(STAGE)/notebooks
	$(BIN)/jupyter-book build --quiet $(STAGE) --path-output .
	@$(BIN)/python tools/stage.py --report $(STAGE)

test: check pytest notebooks site

check: $(VENV)/.complete
	$(BIN)/python tools/tangle.py --check
	$(BIN)/python tools/library_index.py --check
	$(BIN)/python tools/weave.py --check
	$(BIN)/python tools/links.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check gptlib tools tests

pytest: $(VENV)/.complete
	$(BIN)/python -m pytest

notebooks: $(VENV)/.complete
	$(BIN)/python -m pytest --nbval --nbval-current-env --nbval-cell-timeout=600 -p no:cacheprovider notebooks

site: $(VENV)/.complete
	$(BIN)/jupyter-book build --quiet -W -n --keep-going . --path-output .

tangle: $(VENV)/.complete
	$(BIN)/python tools/tangle.py
	$(BIN)/python tools/library_index.py

weave: tangle
	$(BIN)/python tools/weave.py

format: $(VENV)/.complete
	$(BIN)/ruff check --fix --quiet tools tests
	$(BIN)/ruff format --quiet tools tests

lab: $(VENV)/.complete
	$(BIN)/python tools/weave.py --inputs
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf _build runs/cache
