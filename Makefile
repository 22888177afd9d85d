# make demo, make test: each sets up what it needs in .venv the first time.
PYTHON ?= python3
VENV ?= .venv
# Installed only where $(PYTHON) has no PyTorch of 2.10 or later; one that it has is used as it is.
TORCH ?= torch==2.13.0

BIN := $(abspath $(VENV))/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint bench format clean

demo: $(VENV)/.installed
	python -m robustfast demo

test: lint
	python -m pytest -n 2 --dist worksteal -q

lint: $(VENV)/.installed
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(SOURCES)
	mypy

bench: $(VENV)/.installed
	python -m pytest benchmarks -q --benchmark-columns=min,median,rounds

format: $(VENV)/.installed
	ruff check --fix .
	ruff format .
	clang-format -i $(SOURCES)

clean:
	rm -rf $(VENV) build robustfast/*.so *.egg-info

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "robustfast needs Python 3.10 or later")'
	if $(PYTHON) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)' 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV) && python -m pip install -q '$(TORCH)'; fi
	python -m pip install -q 'setuptools>=77' wheel 'pybind11>=2.13' ninja
	touch $@

# --no-build-isolation: the extension is built against the PyTorch that will load it.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	python -m pip install -q --no-build-isolation -e '.[test]'
	touch $@
