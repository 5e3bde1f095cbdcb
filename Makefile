# make quickstart: from nothing but Python to a trained model that drafts for itself.
# make test: the tests. make check: formatter, linter, type checker.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m mtp_jax
STDLIB = $(shell $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('stdlib'))")
QUICKSTART := runs/quickstart

.PHONY: quickstart test check lock clean

quickstart: .venv/installed
	$(RUN) prepare --input=$(STDLIB) --output=data/stdlib --force \
	    --exclude=site-packages --exclude=test --exclude=tests \
	    --exclude=idlelib --exclude=lib2to3 --exclude=turtledemo
	$(RUN) train --config=configs/quickstart.py --workdir=$(QUICKSTART)
	$(RUN) evaluate --workdir=$(QUICKSTART)
	$(RUN) generate --workdir=$(QUICKSTART) --heldout=16 --max_new_tokens=128 --compare
	$(RUN) generate --workdir=$(QUICKSTART) --prompt='def read_' --max_new_tokens=200

test: .venv/installed
	$(BIN)/python -m pytest -n 2

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"mtp_jax needs Python 3.11 or newer, this is {v.major}.{v.minor}; try make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# The exact versions for every Python, from the ranges in pyproject.toml.
lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	    --no-header --no-annotate --upgrade --output-file requirements.txt

clean:
	rm -rf .venv data runs .pytest_cache .mypy_cache .ruff_cache
