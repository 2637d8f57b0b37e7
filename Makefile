# Every target sets up what it needs: a virtual environment in .venv with the pinned packages and this project, editable.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export OMP_NUM_THREADS ?= 1

.PHONY: test demo lint format wheel cards setup clean

setup: $(READY)

# torch goes first and pinned: left to the resolver, a newer one with gigabytes of CUDA libraries would come.
$(READY): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p zoo

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Two threads for the demo: it trains.
demo: $(READY)
	OMP_NUM_THREADS=2 $(BIN)/zoo demo

cards: $(READY)
	$(BIN)/zoo card

# The wheel is built from the source archive, so that no stale build folder takes part.
wheel: $(READY)
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf build dist hybrid_zoo.egg-info zoo-demo .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
