# make demo    train, generate and measure small hybrid models on this machine's CPU
# make test    everything a change must pass
# make test-fast  a part of it for the edit loop: one case of everything
# make docs    the documentation as a site in site/; broken links and pages that are not listed fail
# make notebooks  two of the examples as notebooks
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

# Idle OpenMP threads wait in a loop: long enough to be there for the next operation, not so long that they keep a core
# from whatever else runs on the machine.
export GOMP_SPINCOUNT := 10000

.PHONY: venv demo test test-fast test-oldest lint docs notebooks clean

venv: $(STAMP)

# The stamp is touched last, so an interrupted install is simply taken up again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/hybridattn demo $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

# Kernels run in Triton's interpreter in a process of their own, since Triton reads TRITON_INTERPRET when it is imported.
test: lint
	$(PYTEST) $(ARGS)
ifeq ($(ARGS),)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter
endif

test-fast: $(STAMP)
	$(BIN)/ruff check .
	$(PYTEST) -m "not slow" $(ARGS)
ifeq ($(ARGS),)
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" tests/interpreter
endif

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# A notebook is a script with cells: the scripts are the source.
notebooks: $(STAMP)
	$(BIN)/jupytext --to ipynb $$(grep -l '^# %%' examples/*.py)

# The models with the oldest transformers that is supported, in a virtual environment of its own; and with torchao, which
# every program that imports transformers would pay for.
test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n $(WORKERS) $(or $(ARGS),tests/models)

.venv-oldest/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	sed -e '/^transformers==/d' -e '/^huggingface_hub==/d' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install -c .venv-oldest/constraints.txt 'transformers==5.17.*' torchao -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-oldest build dist site .pytest_cache .ruff_cache .hypothesis
	find hybridattn tests -name __pycache__ -type d -prune -exec rm -rf {} +
