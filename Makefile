# make install   the environment .venv (Python 3.11+, about 4 minutes); a no-op afterwards
# make demo      BN, GN and SN over several settings on bundled digits, table and figures
# make test      lint, format and type check and the test suite (about 5 minutes on 2 cores)
# make test-slow the longer checks
# make wheel     sdist and wheel, tested as one without the clone gets them (38 s of CPU time)
# Another interpreter: make install PYTHON=python3.12; more processes for the tests: make test JOBS=8

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-color -c constraints.txt
STAMP := .venv/.installed

.PHONY: install demo lint test test-slow wheel

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard sn/kernels/*.[ch] sn/kernels/*.cpp)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; try: make install PYTHON=python3.12")'
	@echo "1 of 3: the environment .venv"
	@$(PYTHON) -m venv .venv
	@echo "2 of 3: PyTorch, most of about 6 GB where there is a build for CUDA"
	@$(INSTALL) 'setuptools>=77' torch
	@echo "3 of 3: the other packages, and this one with its kernels compiled"
	@$(INSTALL) --no-build-isolation -e '.[dev]'
	@$(BIN)/python -c 'from sn.kernels.native import extension, library; print("compiled kernels for the CPU:", "yes" if extension() else "without C++ (g++, clang++ and Python.h); small maps are slower" if library() else "no, there was no C compiler (gcc, clang): a training step of a ResNet takes 1.27 to 1.38 of the time with batch norm, channels_last 1.43 to 1.65, instead of about 1")'
	@touch $@

demo: install
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo.sh

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n $(JOBS) --dist worksteal

wheel: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n0 tests/packaging
