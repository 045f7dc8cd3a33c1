# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ZOO ?= $(VENV)-zoo
# Of each property test and state machine in test-slow; without a seed, one is chosen, and printed.
EXAMPLES ?= 5000
SEED ?=

BIN := $(abspath $(VENV))/bin
PY := $(BIN)/python
PY_ZOO := $(abspath $(ZOO))/bin/python
RUN := $(PY) -m torch_ext run
LONG := --timeout 14400 --examples $(EXAMPLES) $(if $(SEED),--hypothesis-seed $(SEED))
TYPED := $(PY) -m mypy --config-file $(abspath pyproject.toml) --cache-dir $(abspath .mypy_cache)

.PHONY: demo test test-slow test-zoo lint types test-graft test-tree clean

demo: $(VENV)/installed
	$(PY) -m torch_ext demo $(ARGS)

# The suite runs twice, grafted and in a tree; at the same time, since there mostly are two cores. In a tree without the
# tests of several ranks, which take as long as all others: the code is the same, and a tree's children are tested.
test: lint types
	$(MAKE) --jobs=2 --output-sync=target test-graft test-tree

test-slow: $(VENV)/installed
	$(PY) -m pytest -m slow $(LONG) --ignore test/zoo --ignore test/distributed $(ARGS)
	$(RUN) --tree -- $(PY) -m pytest test/distributed -m "slow or not slow" $(LONG) $(ARGS)
	$(MAKE) test-zoo

# The models of timm, torchvision and diffusers, too. NB: next to a torch without CUDA, the torchvision that pip finds
# cannot be imported as it is, and transformers would try: a venv of its own. Naming torch keeps pip from replacing it.
test-zoo: $(ZOO)/installed
	$(ZOO)/bin/python -m pytest test/zoo -m "slow or not slow" $(ARGS)
	rm -f $(ZOO)/sweep.jsonl  # else it goes on where that one ended
	$(PY_ZOO) -m torch_ext run -- $(PY_ZOO) test/zoo/sweep.py --out $(ZOO)/sweep.jsonl --every 40 --strict

lint: $(VENV)/installed
	$(PY) -m ruff check
	$(PY) -m ruff format --check

# The new files are checked where they belong: inside a tree, next to the torch modules that they import.
types: $(VENV)/installed
	$(TYPED) torch_ext
	$(RUN) --tree -- sh -c 'cd "$$TORCH_EXT_TREE" && MYPYPATH=. $(TYPED) \
		$$(cd $(CURDIR)/torch_ext/overlay && find torch -name "*.py")'

test-graft: $(VENV)/installed
	$(PY) -m pytest $(ARGS)

test-tree: $(VENV)/installed
	$(RUN) --tree -- $(PY) -m pytest --ignore test/distributed $(ARGS)

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(TORCH)
	$(PY) -m pip install --quiet --editable ".[test,demo,bench]"
	touch $@

$(ZOO)/installed: setup.py
	$(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/python -m pip install --quiet $(TORCH)
	$(ZOO)/bin/python -m pip install --quiet --editable ".[test,zoo]" $(TORCH)
	touch $@

clean:
	rm -rf $(VENV) $(ZOO) .mypy_cache .pytest_cache .ruff_cache .hypothesis demo_out
