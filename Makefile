# SPDX-License-Identifier: Apache-2.0
# `make demo` is all a new machine needs. Settings: PYTHON=python3.11, KFLOC_TORCH=cuda, KFLOC_TORCH_INDEX=URL.

BIN := .venv/bin
TESTS ?= test
WORKERS ?= 2

# Tests that talk over DDS wait for each other's answers: they run alone, the others in WORKERS processes (pytest-xdist).
PARALLEL = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Tests and the demo talk over DDS: with this machine only.
export ROS_AUTOMATIC_DISCOVERY_RANGE ?= LOCALHOST

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test test-quick test-all lint types clean distclean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-10s %s\n", $$1, $$2 }'

setup:  ## make .venv with everything in it
	@sh scripts/setup.sh

setup-dev:
	@sh scripts/setup.sh --dev

demo: setup  ## render a room, map it, and localize in it with live ROS 2 nodes
	$(BIN)/kfloc demo

test: lint types  ## set-up, checks and the fast tests
	$(PARALLEL) -m "not slow and not ros" $(TESTS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest -m "not slow and ros" $(TESTS) || [ $$? -eq 5 ]

test-quick:  ## the tests that need neither ROS nor a second each, in a minute; no set-up
	$(PARALLEL) -q -m "not (slow or thorough or ros or data)" $(TESTS)

test-all: lint types  ## the slow tests, too
	$(BIN)/python -m pytest $(TESTS)

lint: setup-dev  ## ruff, format and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: setup-dev
	$(BIN)/mypy

clean:  ## remove caches and what colcon built; results stay
	rm -rf build install log .pytest_cache .mypy_cache .ruff_cache

distclean: clean  ## remove the environment, too
	rm -rf .venv kfloc_ros.egg-info
