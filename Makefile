# make demo      see it work, on real processes and a real database
# make demo UI=1 the same, and leave Prefect's UI and fresh orphans up to click on
# make bench     how fast it is, against its goals and its peers; what proof of life costs
#                (QUICK=1: small, judges nothing; ONLY="rates flow": some of it)
# make test      lint, types and the whole suite, against a real Postgres
#                (two files at a time, each with servers of its own; AT_ONCE=1: one after the other)
#
# The suite and the demo start a Postgres of their own; TEST_DATABASE_URL names another for the suite.

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
AT_ONCE ?= 2

.PHONY: demo test bench lint setup constraints clean

demo: setup
	$(BIN)/orphan-recovery demo $(if $(UI),--ui)

test: lint
	$(BIN)/python -m pytest --numprocesses $(AT_ONCE) --dist loadfile

bench: setup
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null \
	|| $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick) \
		$(if $(ONLY),--only $(ONLY),$(if $(QUICK),,--json benchmarks/results.json --docs docs))
	$(if $(QUICK)$(ONLY),,$(BIN)/python benchmarks/signs_of_life.py)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found: install one, or name it with make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON); the first time takes a minute or two ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null \
	&& $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]' 2>/dev/null \
	|| { echo "uv could not (it does not read pip's configuration); pip can, in some minutes more ..."; \
	     $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'; }
	@touch $@

# Renew the pins: what a fresh resolution of pyproject.toml gives, without addresses.
constraints: setup
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras \
		--no-emit-index-url --no-header --no-annotate pyproject.toml --output-file constraints.txt

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
