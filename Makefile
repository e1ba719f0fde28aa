# make demo   create the environment, build what there is to build, run the whole method on a generated world
# make test   create the environment if it is not there, check style and types, run the tests that take no more than minutes
# make test-all   make test, then what it left out: the tests marked slow, whose reasons it prints
# make test-real   fetch two real models (0.35 GB, kept in ~/.cache/shifcon_fast) and run the tests that need them
# make sanitize   run the operator tests on CPU libraries compiled with address, undefined-behaviour and thread sanitizers
# make bench  run the benchmarks of this device in at most MINUTES (40), and write the tables of docs/performance.md anew
# make performance   write those tables alone, from the records under benchmarks/results
# make experiment   run what experiments/real_models lacks (hours; it goes on where it was stopped); make experiment-report
# make architectures   write the table of docs/architectures.md anew, from the rows and their tests
# make aot    print what every kernel variant compiles to; make format, make clean, make lock

PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= demo-output
MINUTES ?= 40
BIN    := $(VENV)/bin
# Everything that decides what the environment holds; when one changes, the environment is brought up to date.
INPUTS := pyproject.toml setup.py requirements.lock $(shell find csrc -type f -not -name "*.pyc" -not -name "*.md")

.PHONY: demo test test-all test-real lint sanitize experiment experiment-report bench performance architectures aot format clean lock

demo: $(VENV)/.ready
	$(BIN)/shifcon demo --output $(DEMO)

# One worker a core, each with one thread: the models are tiny. The tests of a file share fixtures, so they stay with one
# worker; files go in their order, because the one with the most tests is not the one that takes longest. `pytest`, not
# `python -m pytest`, which would put this folder on sys.path, where kernels/ hides the package of that name which
# bitsandbytes imports.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

test: $(VENV)/.ready lint
	$(PYTEST) -m "not slow"

# One after the other, and no test twice, also as `make test test-all`. The marker takes a reason: pyproject.toml.
test-all: test
	$(PYTEST) -m slow

# One process: the models are opened once, and use all cores.
test-real: $(VENV)/.ready
	$(BIN)/pytest tests/real

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sanitize: $(VENV)/.ready
	$(BIN)/python scripts/sanitize.py address
	$(BIN)/python scripts/sanitize.py thread

# The tables are made of what was measured, also where a suite had no time left; make says so after it.
bench: $(VENV)/.ready
	$(BIN)/python -P benchmarks/bench.py --minutes $(MINUTES); status=$$?; \
		$(BIN)/python -P benchmarks/document.py --write && exit $$status

GROWTH := $(wildcard benchmarks/results/growth/*.json benchmarks/results/processes/processes.json)
performance: $(VENV)/.ready
	$(BIN)/python -P benchmarks/document.py --write
	$(if $(GROWTH),$(BIN)/python -P benchmarks/growth_plot.py $(GROWTH))

experiment: $(VENV)/.ready
	$(BIN)/python experiments/real_models/run.py

experiment-report: $(VENV)/.ready
	$(BIN)/python experiments/real_models/report.py

architectures: $(VENV)/.ready
	$(BIN)/python -P scripts/architecture_table.py --write

# Registers, spills, shared memory and access widths of every kernel variant; no GPU needed.
aot: $(VENV)/.ready
	$(BIN)/python scripts/aot.py

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and by its pin: a range would resolve to the newest CUDA build, and an isolated build would fetch it again.
$(VENV)/.ready: $(INPUTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock setuptools ninja torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock \
		--no-build-isolation --editable '.[test]'
	@touch $@

# The lock: what the environment resolves to now, without this package itself.
lock:
	$(BIN)/python -m pip freeze --exclude-editable --all | grep -viE '^(pip|shifcon)' | sed 's/+cpu$$//' > requirements.lock

clean:
	rm -rf $(VENV) build dist shifcon_fast/_native/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache $(DEMO)
