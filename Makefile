# What a developer does here; each target does its own set-up, which is quick
# once it has been done. Needed beforehand: make, and Python 3.11 or later.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: soak help demo test bench check setup peers lock clean

# The first that is recent enough; where there is none, python3, to be complained about.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && echo "$$python" && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST_FLAGS ?=
# Those that start programs mostly wait for them: the others run meanwhile.
PROGRAM_TESTS := tests/e2e tests/resilience tests/bench
BENCH_FLAGS ?=

# Programs that tests use as peers where they are installed, and their packages.
PEER_PROGRAMS := Orthanc findscu movescu getscu echoscu storescu storescp dcmqrscp dcmqridx dciodvfy
PEER_PACKAGES := orthanc orthanc-dicomweb dcmtk dicom3tools

help: ## say what there is
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

demo: $(READY) ## run the main job on an embedded region
	@$(BIN)/dicomproxy demo

test: $(READY) peers ## run all tests (PYTEST_FLAGS="-k something" for some)
ifeq ($(strip $(PYTEST_FLAGS)),)
	@log=$$(mktemp); others=; failed=0; \
	trap 'kill $$others 2>/dev/null || true; rm -f "$$log"' EXIT; \
	DICOMPROXY_TEST_PORTS=1/2 $(BIN)/python -m pytest tests $(PROGRAM_TESTS:%=--ignore=%) \
	  >"$$log" 2>&1 & others=$$!; \
	DICOMPROXY_TEST_PORTS=0/2 $(BIN)/python -m pytest $(PROGRAM_TESTS) || failed=$$?; \
	wait "$$others" || failed=$$?; \
	others=; cat "$$log"; exit "$$failed"
else
	@$(BIN)/python -m pytest $(PYTEST_FLAGS)
endif

bench: $(READY) peers ## measure it beside what there would be without (BENCH_FLAGS=--quick)
	@$(BIN)/python -m bench $(BENCH_FLAGS)

check: $(READY) ## format, lint, types, architecture, configuration files
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_architecture.py tests/config/test_shipped.py
	@$(BIN)/dicomproxy check config/dicomproxy.example.yaml

soak: $(READY) peers ## hurt a whole region for a while (MINUTES=60 SEED=7)
	@$(BIN)/python -m soak --minutes $(or $(MINUTES),3) $(if $(SEED),--seed $(SEED))

setup: $(READY) ## make the virtual environment

# Hashes are required, so that what is installed is what was locked. The package
# itself is installed in place, with the locked setuptools.
$(READY): pyproject.toml requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "dicomproxy needs Python 3.11 or later, $(PYTHON) is: $$($(PYTHON) -V 2>&1 || true)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Setting up $(VENV)" >&2
	@[ -x $(BIN)/python ] && $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  rm -rf $(VENV); $(PYTHON) -m venv $(VENV) || { \
	  echo "Python's venv module is missing (Debian: apt-get install python3-venv)." >&2; exit 1; }; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
	  --require-hashes -r requirements-dev.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
	  --no-deps --no-build-isolation -e .
	@touch $(READY)

# Real peers make the tests worth more, but their absence only skips some,
# unless CI=true asks for all of them.
peers:
	@missing=; export PATH="$$PATH:/usr/sbin:/usr/local/sbin"; \
	for program in $(PEER_PROGRAMS); do \
	  command -v "$$program" >/dev/null || missing="$$missing $$program"; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing peers for the tests: $(PEER_PACKAGES)" >&2; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  if apt-get -qq update && apt-get -qq install -y --no-install-recommends \
	    $(PEER_PACKAGES) >/dev/null; then exit 0; fi; \
	fi; \
	echo "Missing as peers for the tests:$$missing (Debian: apt-get install $(PEER_PACKAGES))" >&2; \
	[ "$${CI:-}" != true ]

# Locked with the oldest Python that is supported: what it needs, later ones need too.
lock: $(READY) ## lock dependencies anew (UPGRADE=--upgrade for newer versions)
	@options="--quiet --generate-hashes --strip-extras --no-header --no-emit-index-url \
	  --no-emit-trusted-host --no-emit-find-links $(UPGRADE)"; \
	$(BIN)/pip-compile $$options --extra uvloop --extra isal --extra pixels \
	  --output-file requirements.lock pyproject.toml; \
	$(BIN)/pip-compile $$options --allow-unsafe --extra dev --constraint requirements.lock \
	  --output-file requirements-dev.lock pyproject.toml

clean: ## remove what was built; the virtual environment too
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
