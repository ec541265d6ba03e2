# `make demo` and `make test` need Python 3.11+, a C++ compiler and a package registry, nothing else.
# Everything they write stays below this folder, but for pip's own cache.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := $(CURDIR)/.cache
RUN := TMPDIR=$(CACHE)/tmp XDG_CACHE_HOME=$(CACHE) MPLCONFIGDIR=$(CACHE)/matplotlib \
       TORCHINDUCTOR_CACHE_DIR=$(CACHE)/inductor TRITON_CACHE_DIR=$(CACHE)/triton
SOURCES := pyproject.toml constraints.txt

.PHONY: demo test lint bench gpu clean

demo: $(VENV)/.installed
	$(RUN) $(BIN)/fquant demo $(ARGS)

test: $(VENV)/.installed
	$(RUN) $(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.lint-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(RUN) $(BIN)/mypy

bench: $(VENV)/.installed
	$(RUN) $(BIN)/python -m benches $(ARGS)

# For a machine with an NVIDIA GPU (compute capability 8.0 or newer), torch and Triton; no venv.
gpu:
	if $(PYTHON) -c 'import pytest' 2>/dev/null; then \
		PYTHONPATH=.:kernels $(PYTHON) -m pytest -W default tests/gpu; fi
	PYTHONPATH=.:kernels $(PYTHON) -m benches.gpu $(ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(CACHE)/tmp

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.lint-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt '.[lint]'
	touch $@

clean:
	rm -rf $(VENV) $(CACHE) build dist
