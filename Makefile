# Two commands matter: `make demo` trains a model and talks to it, `make test` checks the checkout.
# Both make their own `.venv` and install into it; a second call finds it there and starts at once.

SHELL := /bin/bash
# The first Python that is new enough; `make demo PYTHON=/path/to/python3` chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP := .venv/bin/python -m pip --disable-pip-version-check --quiet
PICOLLM := .venv/bin/picollm
QUESTIONS := "Who are you?" "What is 7 plus 5?" "How many r are in strawberry?"

.DELETE_ON_ERROR:
.PHONY: help demo test test-all setup lint clean

help:  ## show these targets
	@sed -n 's/^\([a-z-]*\):.*##\(.*\)/  make \1\t\2/p' Makefile | expand -t 18

demo: .venv/.installed  ## train a small model from scratch on this CPU, then ask it three questions
	$(PICOLLM) speedrun --preset demo --run demo
	@for question in $(QUESTIONS); do \
		printf '\n> %s\n' "$$question"; \
		$(PICOLLM) chat --run demo -p "$$question" || exit; \
	done
	@printf '\nTalk to it: %s chat --run demo\n' $(PICOLLM)

test: lint  ## lint, then every test that needs minutes at most and no GPU
	.venv/bin/python -m pytest

test-all: lint  ## also the slow tests: the full demo, kills in every stage
	.venv/bin/python -m pytest -m "not gpu and not multi_gpu and not browser and not node"

setup: .venv/.installed  ## make .venv and install picollm into it

lint: .venv/.installed-dev  ## ruff, rules and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:  ## remove .venv and caches; runs and datasets stay where they are
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo 'error: no Python 3.11 or newer on PATH' >&2; exit 3; }
	$(PYTHON) -m venv .venv

# Stamps instead of checks: pip takes seconds to find out that there is nothing to do.
.venv/.installed: pyproject.toml | .venv/bin/python
	$(PIP) install --editable .
	@touch $@

.venv/.installed-dev: pyproject.toml | .venv/bin/python
	$(PIP) install --editable '.[dev]'
	@touch .venv/.installed $@
