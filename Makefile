# make demo, make test: each sets up what it needs in .venv the first time.
PYTHON ?= python3
VENV ?= .venv
# Installed only where $(PYTHON) has no PyTorch of 2.10 or later; one that it has is used as it is.
TORCH ?= torch==2.13.0

BIN := $(abspath $(VENV))/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Releases of PyTorch whose headers `make abi` compiles against, and under which `make check-wheel` runs the tests.
ABI_TORCH ?= 2.10.0 2.11.0 2.13.0 2.14.1
WHEEL_TORCH ?= 2.10.0 2.14.1
WHEEL_PYTHONS ?= python
HEADERS := $(or $(ROBUSTFAST_TORCH_HEADERS),build/torch-headers)

.PHONY: demo test lint bench format clean abi wheel check-wheel

demo: $(VENV)/.installed
	python -m robustfast demo

test: lint
	python -m pytest -n 2 --dist worksteal -q

lint: $(VENV)/.installed
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(SOURCES)
	mypy

# About 1.5 GB of downloads the first time, of which a few MB are kept.
abi: $(VENV)/.installed
	python tests/torch_headers.py $(HEADERS) $(ABI_TORCH)
	ROBUSTFAST_TORCH_HEADERS=$(HEADERS) python -m pytest -q tests/test_abi.py

# A wheel for each of WHEEL_PYTHONS, for every PyTorch from 2.10 on. Each has what building needs, as $(VENV) has it.
wheel: $(VENV)/.torch
	rm -rf build/lib* dist
	for python in $(WHEEL_PYTHONS); do $$python -m pip wheel -q --no-build-isolation --no-deps -w dist . || exit 1; done

# The tests with the installed wheel, under each release in an environment of its own: gigabytes where those are of CUDA.
check-wheel: wheel
	for release in $(WHEEL_TORCH); do \
	  $(PYTHON) -m venv build/torch-$$release && \
	  build/torch-$$release/bin/python -m pip install -q "torch==$$release" && \
	  build/torch-$$release/bin/python -m pip install -q --force-reinstall --no-deps dist/robustfast-*.whl && \
	  build/torch-$$release/bin/python -m pip install -q "$$(ls dist/robustfast-*.whl)[test]" && \
	  build/torch-$$release/bin/pytest -n 2 -q tests || exit 1; \
	done

bench: $(VENV)/.installed
	@echo 'This takes about 5 minutes on 2 idle cores; each row is shown when it is measured.'
	python -m pytest benchmarks -q --tb=short --show-capture=no --benchmark-columns=min,median,rounds

format: $(VENV)/.installed
	ruff check --fix .
	ruff format .
	clang-format -i $(SOURCES)

clean:
	rm -rf $(VENV) build dist robustfast/*.so robustfast/_build.json *.egg-info

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "robustfast needs Python 3.10 or later")'
	if $(PYTHON) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)' 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV) && python -m pip install -q '$(TORCH)'; fi
	python -m pip install -q 'setuptools>=64' wheel 'pybind11>=2.13' ninja
	touch $@

# --no-build-isolation: the extension is built against the PyTorch that will load it.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	python -m pip install -q --no-build-isolation -e '.[test]'
	touch $@
