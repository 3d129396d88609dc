# make demo | test | lint | gpu | bench | sanitize | clean; each does its own set-up.
# PYTHON names the interpreter to start from: make PYTHON=python3.12 test

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.10 python3.13; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
ifeq ($(strip $(PYTHON)),)
PYTHON := python3
endif

VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -type f 2>/dev/null) setup.py
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' 2>/dev/null)

.PHONY: setup demo test lint gpu bench sanitize clean

setup: $(VENV)/built

$(VENV)/installed: pyproject.toml constraints.txt .ci/environment.py
	$(PYTHON) .ci/environment.py $(VENV)
	@touch $@

$(VENV)/built: $(VENV)/installed $(NATIVE)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

demo: setup
	$(BIN)/sparsemtl demo --out runs/demo

# Triton kernels run in the interpreter and are compiled ahead of time, each in its own process:
# the interpreter must be asked for before triton is imported, and rules out compiling.
test: setup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m interpreter tests/ops tests/sparsity tests/engine \
	  tests/test_gpu_bench.py
	$(BIN)/python -m bench.aot
	$(BIN)/python -m pytest -q -m "not interpreter"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/lint-imports --no-cache

# A Python whose torch sees a GPU is taken as it is: a bare machine may have no way to install.
gpu:
	@if $(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	then $(PYTHON) -m bench.gpu; \
	else $(MAKE) --no-print-directory setup && $(BIN)/python -m bench.gpu; fi

bench: setup
	$(BIN)/python -m pytest -q bench --benchmark-json=bench/results/bench.json

# Python itself is not instrumented, so the sanitizers' runtime is loaded first; leaks are
# the interpreter's own. One thread, and waiting ones that sleep: tests ask for more by themselves.
# An error ends the process with pytest's capture, so it is written to a file and shown from there.
sanitize: setup
	SPARSEMTL_SANITIZE=1 SPARSEMTL_CUDA=0 $(BIN)/python setup.py -q build_ext \
	  --build-temp build/sanitize --build-lib build/sanitize/lib
	rm -f build/sanitize/report.*
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive SPARSEMTL_TEST_NATIVE=build/sanitize/lib \
	  ASAN_OPTIONS=detect_leaks=0:log_path=build/sanitize/report \
	  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:log_path=build/sanitize/report \
	  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest -q -m "not interpreter" tests/ops \
	  tests/engine/test_native_steps.py tests/engine/test_native_program.py \
	  || { cat build/sanitize/report.* 2>/dev/null; exit 1; }

clean:
	rm -rf $(VENV) build dist *.egg-info sparsemtl/_C*.so runs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
