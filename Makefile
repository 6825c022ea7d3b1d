# Every target sets up what it needs: Python 3.11, pip and make are enough.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Containers often forbid Python to keep what it compiled. Every process here would then compile torch and transformers
# again: twice the time to start, in hundreds of processes.
export PYTHONDONTWRITEBYTECODE :=

BENCHMARKS := augment capture read train scale write verify startup

.PHONY: quickstart test faults check bench bench-quick docs clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-compile -c constraints.txt -e ".[dev]"
	$(BIN)/python -c "import kd.stages.train_student.training, transformers.models.bert.modeling_bert"  # compiled once
	touch $@

.links/kd:
	mkdir -p .links && ln -sfn .. $@

quickstart: $(READY)  ## the main job on real text: Banking77, MiniLM teacher, three students, one table
	$(BIN)/kd run workflows/quickstart.yaml

test: $(READY)  ## all tests, with a small part of what `make faults` does
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

faults: $(READY)  ## the store broken on purpose: kills, flipped bits, hostile files (at most ten minutes on two cores)
	$(BIN)/python -m pytest -q -m faults tests/faults

check: $(READY) .links/kd  ## format, lint, types, layers, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p kd
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

bench: $(READY)  ## speed and memory, as ratios within one run: 20 minutes on two cores that do nothing else
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done

bench-quick: $(READY)  ## the same at small sizes, in 3 minutes: coarser figures
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --quick || exit 1; done

docs: $(READY)  ## regenerate the pages that are made from the code
	$(BIN)/python docs/generate.py

clean:
	rm -rf .links build *.egg-info .mypy_cache .ruff_cache .hypothesis
