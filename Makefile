# `make run` and `make test` work from a fresh clone: they build .venv first, once.

PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install run test lint check clean

help:
	@echo "make install create .venv and install into it"
	@echo "make run     run experiments/quickstart.yaml from teacher to ranked students"
	@echo "make test    run the tests; PYTEST_ARGS='-m \"not ray and not real\"' chooses among them"
	@echo "make lint    ruff, mypy and the import contracts"
	@echo "make check   lint, then test"
	@echo "make clean   remove .venv and every tool's cache; results/ stays"

install: $(INSTALLED)

run: $(INSTALLED)
	$(BIN)/minitron-ray run experiments/quickstart.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

check: lint test

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find minitron_ray tests -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is taken up again. pip keeps what is
# already installed and within the ranges of pyproject.toml, torch above all.
$(INSTALLED): pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is missing or older than 3.11; name another: make PYTHON=python3.12 run" >&2; exit 3; }; \
		echo "creating $(VENV)" >&2; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing minitron-ray and its dependencies into $(VENV); the first time takes minutes" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
