# The commands of a contributor: `make` lists them. They use the environment in .venv, which `make setup` makes.

.PHONY: help setup test slow without-vnni lint format types imports docs check ci

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup:  ## make .venv with the pinned versions and the git hooks
	python3 -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e '.[test]'
	.venv/bin/pre-commit install

test:  ## run the default tests, on all cores
	.venv/bin/python -m pytest

slow:  ## run the slow tests
	.venv/bin/python -m pytest -m slow

without-vnni:  ## run the default tests with the kernels of a CPU that only has AVX2
	.venv/bin/python tools/without_vnni.py -m pytest

lint:  ## check style
	.venv/bin/ruff check
	.venv/bin/ruff format --check

format:  ## mend style
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

types:  ## check types
	.venv/bin/mypy --strict

imports:  ## check the direction of imports
	.venv/bin/lint-imports

docs:  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

check: lint types imports  ## check style, types and imports

ci:  ## run everything that must pass before a merge, on a clean clone
	.ci/run
