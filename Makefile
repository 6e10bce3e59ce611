# Everything on a fresh machine: `make demo` and `make test` set themselves up in .venv first.
PYTHON ?= python3
# Anything pip accepts for torch; set it to another build or a wheel's path where this one is not wanted.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PEER := .venv-llmcompressor
MODELOPT := .venv-modelopt

.PHONY: setup demo test test-slow lint bench-memory bench-quantize bench-encode clean
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[data,demo,dev]'
	touch $@

# Other tools live in environments of their own: their pins are not ours.
$(PEER)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet $(TORCH)
	$(PEER)/bin/python -m pip install --quiet llmcompressor==0.14.0.1
	touch $@

$(MODELOPT)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(MODELOPT)
	$(MODELOPT)/bin/python -m pip install --quiet $(TORCH)
	$(MODELOPT)/bin/python -m pip install --quiet 'nvidia-modelopt[hf]==0.47.0'
	touch $@

demo: setup
	$(BIN)/python demo/demo.py $(if $(QUICK),--quick)

test: setup
	$(BIN)/python -m pytest

test-slow: setup $(PEER)/.ready $(MODELOPT)/.ready
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-memory: setup
	$(BIN)/python benchmarks/memory.py

bench-quantize: setup $(PEER)/.ready
	$(BIN)/python benchmarks/quantize.py --peer-python $(PEER)/bin/python

bench-encode: setup
	$(BIN)/python benchmarks/encode.py

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
