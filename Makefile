# One command a chore. `make run` needs Python 3.11 or newer with pip and venv, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVING := $(VENV)/.serving
COMPLETE := $(VENV)/.complete
INSTALL = PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet -c constraints.txt
NAME ?= $(RECIPE)

.PHONY: help run test chaos fuzz check bench bench-triton train export clean

help:
	@echo 'make run                    install what serving needs into $(VENV) and start the service'
	@echo 'make test                   add training and test dependencies to $(VENV) and run the tests'
	@echo 'make chaos                  break things under many clients and check every session; ARGS="--minutes 10" for longer'
	@echo 'make fuzz                   throw mangled bytes at every route; ARGS="--minutes 10" for longer'
	@echo 'make check                  formatting, lint, types, import contracts'
	@echo 'make bench                  measure the service beside limits and peers; BENCH=posts for one, ARGS=--help for options'
	@echo 'make bench-triton           install Triton, so that `make bench` measures it too'
	@echo 'make train RECIPE=who       train by a recipe into runs/who; ARGS="--max-minutes 5" adds options'
	@echo 'make export RECIPE=who      publish runs/who as the next version of models/who; NAME=... renames it'
	@echo 'make clean                  remove $(VENV) and caches; sessions, runs and models stay'

run: $(SERVING)
	@exec $(BIN)/python -m service

# Two at a time: much of the suite waits, and tests of one file share what they start.
test: $(COMPLETE)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

chaos: ARGS ?= --minutes 2
chaos: $(COMPLETE)
	$(BIN)/python -m pytest tests/chaos -q $(ARGS)

fuzz: ARGS ?= --minutes 2
fuzz: $(COMPLETE)
	$(BIN)/python -m pytest tests/e2e/test_fuzz.py -q -s $(ARGS)

check: $(COMPLETE)
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

bench: $(COMPLETE)
	@$(BIN)/python -m benchmarks$(if $(BENCH),.$(BENCH)) $(ARGS)

bench-triton: $(SERVING)
	@echo 'installing Triton into $(VENV)/triton'
	@test -x $(VENV)/triton/bin/pip || $(BIN)/python -m venv $(VENV)/triton
	@$(VENV)/triton/bin/python -m pip install --quiet --disable-pip-version-check nvidia-pytriton==0.7.0 \
		"$$($(BIN)/python -m pip freeze | grep '^onnxruntime==')"

train: $(COMPLETE)
	@test -n '$(RECIPE)' || { echo 'which recipe? make train RECIPE=who; there are:'; $(BIN)/python -m training recipes; exit 2; }
	@exec $(BIN)/python -m training train --recipe '$(RECIPE)' --out 'runs/$(RECIPE)' $(ARGS)

export: $(COMPLETE)
	@test -n '$(RECIPE)' || { echo 'which run? make export RECIPE=who takes runs/who'; exit 2; }
	@exec $(BIN)/python -m training export 'runs/$(RECIPE)' --name '$(NAME)' $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than what it was installed from, or the install is made again.
$(SERVING): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Recurra needs Python 3.11 or newer. Name one: make PYTHON=python3.13 ...' >&2; exit 1; }
	@test -x $(BIN)/pip || { echo 'creating $(VENV)'; $(PYTHON) -m venv $(VENV); }
	@echo 'installing what serving needs'
	@$(INSTALL) -e .
	@touch $@

$(COMPLETE): $(SERVING) client/pyproject.toml
	@echo 'installing what training and the tests need'
	@$(INSTALL) -e '.[training,parquet,redis,otel,dev]' -e ./client
	@touch $@
