# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Bytecode is made as modules are first imported, of the few that are: where none may be kept, each start costs twice.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint infra/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check bench chaos up down clean

help: ## Say what there is to make
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 14

demo: $(VENV)/.demo ## Restore real photographs with the bundled weights; results in demo-output/
	@$(BIN)/nafnet demo demo-output

test: $(VENV)/.dev ## Run all tests
	@$(BIN)/python -m pytest -n 2 --dist loadscope

check: $(VENV)/.dev ## Lint, format, strict types, import rules, known vulnerabilities
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python infra/audit.py

bench: $(VENV)/.dev ## Measure this machine, as ratios to plain implementations; PARTS="networks pictures" for some
	@$(BIN)/python -m tests.benchmarks $(PARTS)

chaos: $(VENV)/.dev ## Kill the real command, its actors, nodes and S3 server at random moments; 15 minutes, SEED=0
	@$(BIN)/python -m tests.chaos --seed $(or $(SEED),0)

up: $(VENV)/.dev ## Start a console on this machine: Prefect, Ray, S3, worker, deployments; state in .console/
	@$(BIN)/python infra/console.py up

down: ## Stop what `make up` started
	@$(BIN)/python infra/console.py down

clean: ## Remove the environment and everything that was made
	rm -rf $(VENV) .console demo-output build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
	  || { echo "Python 3.11 to 3.13 is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.11 ..."; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml infra/constraints.txt | $(VENV)/bin/python
	@echo "installing the package, torch, Ray and Prefect into $(VENV) (a minute or two, once)"
	@$(PIP) --editable '.[pipelines,demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "installing the tools for tests and checks"
	@$(PIP) --editable '.[pipelines,demo,dev]'
	@touch $@
