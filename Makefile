# `make demo` and `make test` need Python 3.11+, a C++ compiler and a package registry, nothing else.
# Everything they write stays below this folder, but for pip's own cache.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := $(CURDIR)/.cache
# HOME too, below which ONNX Runtime writes when it is imported.
RUN := HOME=$(CACHE) TMPDIR=$(CACHE)/tmp XDG_CACHE_HOME=$(CACHE) MPLCONFIGDIR=$(CACHE)/matplotlib \
       TORCHINDUCTOR_CACHE_DIR=$(CACHE)/inductor TRITON_CACHE_DIR=$(CACHE)/triton
SOURCES := pyproject.toml constraints.txt $(wildcard kernels/CMakeLists.txt kernels/csrc/*)

.PHONY: demo test lint bench gpu sanitize emulated clean

demo: $(VENV)/.installed
	$(RUN) $(BIN)/fquant demo $(ARGS)

test: $(VENV)/.installed
	$(RUN) $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

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
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lint]'
	touch $@

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, by the tests of the kernels.
SANITIZERS := $(foreach name,libasan.so libubsan.so,$$($(CXX) -print-file-name=$(name)))
sanitize: $(VENV)/.installed
	cmake -S kernels -B build/sanitize -DFQUANT_SANITIZE=ON
	cmake --build build/sanitize --parallel
	$(RUN) LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 FQUANT_LIBRARY_FOLDER=build/sanitize \
	  $(BIN)/python -m pytest -q tests/kernels/test_conv_int8_cpu.py \
	  tests/kernels/test_kernel_map*.py tests/kernels/test_abs_histogram.py $(ARGS)

# The paths of every instruction set on any CPU with AVX2: make emulated SIMDE=its-folder
emulated: $(VENV)/.installed
	test -f "$(SIMDE)/simde/x86/avx512.h" # https://github.com/simd-everywhere/simde
	cmake -S kernels -B build/emulated -DFQUANT_SIMDE="$(SIMDE)"
	cmake --build build/emulated --parallel
	$(RUN) FQUANT_LIBRARY_FOLDER=build/emulated $(BIN)/python -m pytest -q \
	  tests/kernels/test_conv_int8_cpu.py tests/kernels/test_kernel_map*.py $(ARGS)

clean:
	rm -rf $(VENV) $(CACHE) build dist
