# Everything runs in an environment of its own, .venv, made on first use and kept until what it depends on changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test laws check docs picture bench bench-quick demo-model format clean

demo: $(VENV)/.run  ## talk to the battle-mage; without a terminal, let it answer once
	@if [ -t 0 ] && [ -t 1 ]; then $(BIN)/lmoe chat --loadout recipes/battlemage.yaml; \
	else echo "> A goblin blocks the bridge."; $(BIN)/lmoe chat --loadout recipes/battlemage.yaml --prompt "A goblin blocks the bridge."; fi

test: $(VENV)/.test  ## the test suite; `make laws` asks its laws of everything
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q

laws: $(VENV)/.test  ## each law of each kind of adapter, on each architecture and each path: an hour or two
	$(BIN)/python -m pytest tests/laws --every -n 2 --dist loadgroup -q

check: $(VENV)/.check  ## layout, mistakes, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.docs  ## the documentation site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

picture: $(VENV)/.docs  ## docs/chat.svg, drawn from the running program
	$(BIN)/python docs/picture.py

bench: $(VENV)/.test  ## the tables of docs/benchmarks.md, but for the experiment and a GPU's; wants a quiet machine, and hours
	$(BIN)/python -m benchmarks

bench-quick: $(VENV)/.run  ## a few ratios in half a minute; fails where one is far under what it was
	$(BIN)/python -m benchmarks.quick

demo-model: $(VENV)/.test  ## train the embedded model again from nothing; hours without 16-bit instructions
	$(BIN)/python -m demo_model

format: $(VENV)/.check  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) site dist build

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("lmoe needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

# mergekit is an oracle of the tests; of what it depends on, its merge methods need only what is here already.
$(VENV)/.test: $(VENV)/.run
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps mergekit
	@touch $@

$(VENV)/.check: $(VENV)/.run
	$(PIP) --editable '.[check]'
	@touch $@

$(VENV)/.docs: $(VENV)/.run
	$(PIP) --editable '.[docs]'
	@touch $@
