# Two commands do everything on a fresh machine with Python 3.11+, a C++17 compiler and make:
#   make demo   fine-tunes a real model with its state on the disk
#   make test   the test suite
# Both make their own virtual environment in .venv (set PYTHON to choose the interpreter).

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
PYTEST = $(VENV)/bin/python -m pytest
NATIVE = $(shell find csrc -type f) CMakeLists.txt pyproject.toml constraints.txt
CPP = $(shell find csrc -name '*.cpp' -o -name '*.hpp')
# Bytecode is made of what is imported, the first time: of a whole environment it takes longer than the rest of its installation.
INSTALL = $(PIP) install --quiet --no-compile --constraint constraints.txt
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test check check-native prove clean

demo: $(VENV)/.installed
	$(VENV)/bin/python examples/demo/run.py

# Two workers with one thread each: what two cores do best, and bits do not depend on it. Each has one half of the files and takes from
# the other's when it is done, so that what a module sets up is set up once.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist worksteal

# Ruff (lint and format), types, import contracts, C++ format.
check: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --num-workers auto
	$(VENV)/bin/lint-imports
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

# The C++ core's own tests, each under the address and undefined-behaviour sanitizers and under the thread sanitizer. Needs no Python but
# for cmake and ninja, which are in the virtual environment or already installed.
check-native:
	for sanitizers in address,undefined thread; do \
	  PATH="$(abspath $(VENV))/bin:$$PATH"; folder=build/$$(echo $$sanitizers | tr , -); \
	  cmake -S . -B $$folder -G Ninja -DCMAKE_BUILD_TYPE=Release -DOVERSPILL_SANITIZE=$$sanitizers > /dev/null && \
	  ninja -C $$folder --quiet && ctest --test-dir $$folder --output-on-failure --timeout 120 || exit 1; \
	done

# Proofs that take minutes; their results go on file.
prove: $(VENV)/.installed
	mkdir -p benchmarks/results
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 -m "slow and not gpu and not multi_gpu" --durations=0 -q --no-header 2>&1 | tee benchmarks/results/prove.txt

# torch before what asks for it, and by itself: a range would fetch a CUDA build of gigabytes. The core is built meanwhile.
$(VENV)/.installed: $(NATIVE)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile --upgrade pip
	$(INSTALL) scikit-build-core nanobind ninja cmake
	$(INSTALL) --no-build-isolation --no-deps --editable . & core=$$!; \
	  $(INSTALL) torch && $(INSTALL) --no-build-isolation --only-deps '.[demo,dev]'; others=$$?; \
	  wait $$core && exit $$others
	touch $@

clean:
	rm -rf build $(VENV)/.installed .pytest_cache .mypy_cache .ruff_cache
