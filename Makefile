# `make` alone lists the targets, from the comments beside them. Each sets up .venv when it is missing or
# requirements.lock has changed.

PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo repository test check audit experiments lock

help:
	@awk -F ' *## ' '/^[a-z]+:.*## / { sub(/:.*/, "", $$1); printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: repository $(BIN)/ready  ## the whole pipeline on the demo: minutes on two cores
	python -m fintune check
	dvc repro

# DVC wants a git repository, which a downloaded archive is not.
repository:
	@test -e .git || grep -qsE '^ *no_scm *= *true' .dvc/config .dvc/config.local || { echo "error: $(CURDIR) is not a git repository, which DVC wants: clone the project, or run \`git init && git add . && git commit -m start\`; without git: write \`no_scm = true\` under [core] in .dvc/config" >&2; exit 1; }

test: $(BIN)/ready  ## the tests
	python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

check: $(BIN)/ready  ## lint, format and types of the code; for a run: fintune check
	ruff check .
	ruff format --check .
	mypy

# AUDIT: other options of pip-audit, such as --ignore-vuln ID or another database.
audit: $(BIN)/ready  ## known vulnerabilities of the packages, by a public database
	pip-audit --requirement requirements.lock --no-deps --disable-pip --progress-spinner off $(AUDIT)

experiments: $(BIN)/ready  ## those on this commit, what each changed, and its figures
	python -m fintune experiments

$(BIN)/ready: requirements.lock
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@

# Resolve pyproject.toml's dependencies anew and write what was installed, without addresses.
lock:  ## requirements.lock anew, from pyproject.toml
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet $$($(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["dev"], *p["optional-dependencies"]["harness"])')
	$(BIN)/python -m pip freeze | sed 's/+cpu$$//' > requirements.lock
	touch $(BIN)/ready
