# Every target does its own set-up in .venv from a bare python3 with pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train demo test test-slow lint bench docs pictures clean help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[training,dev]'
	@touch $@

train: $(VENV)/.installed  ## train TD-MPC2 on Pendulum-v1 through Ray and say how well it does
	$(BIN)/python -m launch.train --config configs/tdmpc2_pendulum.yaml $(ARGS)

demo: $(VENV)/.installed  ## train DreamerV3 on images of Catch and film what it imagines: docs/pictures/catch.gif
	$(BIN)/python docs/pictures/make.py --only catch.gif $(ARGS)

test: $(VENV)/.installed  ## run the test suite (without the slow learning tests), in three processes
	$(BIN)/python -m pytest -n 3 --dist loadgroup $(ARGS)

test-slow: $(VENV)/.installed  ## run the tests that show learning (minutes each)
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed  ## build the documentation into site/
	$(BIN)/python -m mkdocs build --strict

pictures: $(VENV)/.installed  ## train three agents and make the pictures of README and documentation from them
	$(BIN)/python docs/pictures/make.py

bench: $(VENV)/.installed  ## measured comparisons: replay and runtime
	$(BIN)/python -m benchmarks.replay
	$(BIN)/python -m benchmarks.runtime

clean:  ## remove the virtual environment and caches (runs are kept)
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
