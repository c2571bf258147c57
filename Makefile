# Everything lives in .venv; stamp files make a repeated call cost nothing.
#   make run ARGS="--port 9000"      make test ARGS="tests/unit -k sse"      make PYTHON=python3.12 test
PYTHON ?= python3
ARGS ?=

# Called as `$(PY) -m …`, never through the scripts beside it: their #! lines hold an
# absolute path and break when the checkout moves.
PY := .venv/bin/python
# Pins are complete, so nothing is resolved (--no-deps) and every file's hash is checked.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-input
PIP_LOCKED := $(PIP) --require-hashes --no-deps

.DEFAULT_GOAL := help
.PHONY: help run test test-deps check fmt proofs breaks fuzz bench lock image clean
.DELETE_ON_ERROR:

help:
	@echo 'make run        start the proxy with ./config.yaml; ARGS="--port 9000" for more'
	@echo 'make test       all tests this machine can run; ARGS="tests/unit -k sse" for some'
	@echo 'make test-deps  install the real parts that some tests need (apt-get, npm)'
	@echo 'make check      lint, format and types'
	@echo 'make fmt        format, and mend what the linter can'
	@echo 'make proofs     stories of several upstreams on both loops, and ten seeds of upstreams that die'
	@echo 'make breaks     break the relay in many ways; the tests must notice each'
	@echo 'make fuzz       100,000 mutated requests, and as many answers; ARGS="--inputs 1000 --seed 2"'
	@echo 'make bench      the benchmarks'
	@echo 'make lock       compile the requirements files anew; ARGS="--upgrade" for newer ones'
	@echo 'make image      build the container image sluice'
	@echo 'make clean      remove the environment and all caches'

run: .venv/.core
	@$(PY) -m proxy $(ARGS)

test: .venv/.dev
	@$(PY) -m pytest $(ARGS)

test-deps: .venv/.core
	@PYTHON=$(PY) bash tests/real/install-parts

check: .venv/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

fmt: .venv/.dev
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .

proofs: .venv/.dev
	@$(PY) -m pytest --slow tests/flow tests/process/test_failover.py $(ARGS)

breaks: .venv/.dev
	@$(PY) -m tests.breaks $(ARGS)

fuzz: .venv/.dev
	@$(PY) -m tests.hostile.fuzz $(ARGS)
	@$(PY) -m tests.hostile.fuzz_answers $(ARGS)

bench: .venv/.dev
	@$(PY) -m bench $(ARGS)

# --universal: one file for every platform and Python from 3.11 on. No index's address is written.
# With the redis extra: what make run and the image install has every store.
LOCK = $(PY) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-annotate --custom-compile-command "make lock" $(ARGS)
lock: .venv/.dev
	$(PIP) uv
	$(LOCK) pyproject.toml --extra redis -o requirements.txt
	$(LOCK) pyproject.toml --extra dev -c requirements.txt -o requirements-dev.txt
	echo 'setuptools>=77' | $(LOCK) - -o requirements-build.txt

image:
	docker build -t sluice $(ARGS) .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info tests/real/node_modules
	find proxy tests bench -name __pycache__ -prune -exec rm -rf {} +

# The interpreter is a link to the system's: once that is gone or replaced by a newer one, the
# link dangles or looks newer than the stamps, and the environment is made afresh.
$(PY):
	@command -v '$(PYTHON)' >/dev/null || { echo >&2 'Sluice needs Python 3.11 or newer: no $(PYTHON) found. Name one: make PYTHON=/path/to/python3'; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Sluice needs Python 3.11 or newer: $(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=/path/to/python3")'
	@rm -rf .venv
	@# Debian splits ensurepip off into python3-venv; an installed pip can stand in for it.
	@'$(PYTHON)' -m venv .venv >/dev/null 2>&1 || { rm -rf .venv; \
	  '$(PYTHON)' -m venv --without-pip .venv && '$(PYTHON)' -m pip --python $(PY) install --quiet pip; } || { rm -rf .venv; \
	  echo >&2 'Could not make a virtual environment: install python3-venv or pip for $(PYTHON).'; exit 1; }

.venv/.core: requirements.txt requirements-build.txt pyproject.toml $(PY)
	@$(PY) -m pip --version >/dev/null 2>&1 || { rm -rf .venv && $(MAKE) --no-print-directory $(PY); }
	@echo 'Installing Sluice into .venv …'
	@$(PIP_LOCKED) -r requirements.txt -r requirements-build.txt
	@PYTHONWARNINGS=ignore $(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.dev: .venv/.core requirements-dev.txt
	@echo 'Installing the development tools into .venv …'
	@$(PIP_LOCKED) -r requirements-dev.txt
	@touch $@
