# On a fresh machine with Python 3.11 or newer:
#   make demo      pictures and a table in out/demo/
#   make test      lint, type check and the whole suite
# Both make .venv and install the tested versions first; that part is skipped until pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
PACKAGES := attn_processors pipelines distill ui bench emoji_world

# Nothing here may need a download of weights.
export HF_HUB_OFFLINE := 1

.PHONY: setup demo test lint types suite format browser clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python is %d.%d, need 3.11 or newer: make PYTHON=python3.11 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,dev]'
	@touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: lint types suite

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# What users get is the wheel, so that is what is checked.
types: setup
	rm -rf build && mkdir -p build/types
	$(BIN)/python -m build --wheel --no-isolation --outdir build/types . >build/types/log 2>&1 || { cat build/types/log; exit 1; }
	$(BIN)/python -m zipfile -e build/types/*.whl build/types/wheel
	MYPYPATH=build/types/wheel $(BIN)/mypy $(PACKAGES:%=-p reattend.%)

suite: setup
	$(BIN)/pytest

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

browser:
	@if command -v chromium || command -v google-chrome; then exit 0; fi; \
	command -v apt-get >/dev/null || { echo 'no Chromium and no apt-get here: install Chromium and put it on PATH'; exit 1; }; \
	$(SUDO) apt-get update -q && \
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium fonts-liberation

# Leaves .venv, runs/ and out/ alone.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
