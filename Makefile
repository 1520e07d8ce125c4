# Everything from a clone to the result: each target makes what it needs. PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-long check format facts clean
setup: .venv/.done

.venv/.done: pyproject.toml setup.py calibration/count.c runtime/replay.c
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[rtx,vision,dev]'
	touch $@

demo: setup
	$(BIN)/python examples/digits/demo.py

test: setup
	$(BIN)/python -m pytest -q -m 'not slow and not gpu'

test-long: setup
	$(BIN)/python -m pytest -q -m 'not gpu'

# On the release that is installed, and on the older one, which runs on Hopper.
OTHER_RTX ?= 1.6.1.120
facts: setup
	$(BIN)/python -m pytest -q tests/facts
	test -d .venv/rtx-$(OTHER_RTX) || \
		$(BIN)/pip install --quiet --target .venv/rtx-$(OTHER_RTX) tensorrt-rtx==$(OTHER_RTX)
	PYTHONPATH=.venv/rtx-$(OTHER_RTX) $(BIN)/python -m pytest -q tests/facts

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist artifacts *.egg-info .mypy_cache .ruff_cache .pytest_cache
