# Two commands do everything on a fresh machine with Python >= 3.11, git and make:
#   make demo    set up .venv, run the main job on data it makes, compare with the truth
#   make test    set up .venv, run ruff, mypy and every test that needs no GPU
# And one measures: speed, memory, the output's size, in about half an hour on two cores:
#   make bench
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup demo test lint bench clean

setup: $(READY)

$(READY): pyproject.toml deploy/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "FlareField needs Python >= 3.11; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint deploy/constraints.txt --editable '.[development]'
	@# Its metadata demands a NumPy of 2021, which nothing here could be installed beside.
	$(BIN)/python -m pip install --quiet --constraint deploy/constraints.txt --no-deps sst-crispy
	@touch $(READY)

demo: $(READY)
	$(BIN)/flarefield demo demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -m "not gpu" --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

bench: $(READY)
	$(BIN)/python -m pip install --quiet --constraint deploy/constraints.txt --editable '.[benchmark]'
	$(BIN)/python -m tests.benchmarks.posterior
	$(BIN)/python -m tests.benchmarks.levers
	$(BIN)/python -m tests.benchmarks.training
	$(BIN)/python -m tests.benchmarks.end_to_end
	$(BIN)/python -m tests.benchmarks.output_size
	$(BIN)/python -m tests.benchmarks.scale

clean:
	rm -rf $(VENV) demo dist build
