# Everything a user does with this repository. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# A file of tests stays in one process, so that what its tests share is made once.
WORKERS := -n logical --dist loadfile
# See parallel/malloc.py; told here, no process has to begin anew.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help train test test-full plan-setup test-gpu-compile test-gpu bench-plan bench-setup test-peers bench-peers lint bench clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 18

# Each stamp is newer than the requirements it installed.
$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

train: $(VENV)/installed ## install, then train experiments/tiny.py on real text; again: resume
	$(RUN) -m experiments.run experiments/tiny.py $(ARGS)

test: $(VENV)/installed-dev ## the tests, in a few minutes
	$(RUN) -m pytest $(WORKERS) -m "not slow" $(ARGS)

test-full: $(VENV)/installed-dev ## all tests, the slow ones too
	$(RUN) -m pytest $(WORKERS) $(ARGS)

lint: $(VENV)/installed-dev ## formatting, style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy moe parallel experiments benchmarks

plan-setup: .venv-plan/installed ## what compiling for GPUs needs, on a machine without one (about 5 GB into .venv-plan)

.venv-plan/installed: requirements.txt requirements-dev.txt requirements-plan.txt
	$(PYTHON) -m venv .venv-plan
	.venv-plan/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-plan.txt
	@touch $@

test-gpu-compile: .venv-plan/installed ## what concerns GPUs: compile for H20s and others, without one
	JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 JAX_PLATFORMS=cpu .venv-plan/bin/python -m pytest tests/gpu_compile $(ARGS)

test-gpu: .venv-plan/installed ## what concerns GPUs, on the one at hand: kernels against oracles, steps against CPU's
	LEVERAGE_TEST_PLATFORMS=cuda,cpu .venv-plan/bin/python -m pytest -k "not refused" tests/gpu \
		tests/moe/ops/test_grouped_matmul.py tests/moe/ops/scaled/test_contract.py $(ARGS)

bench-plan: .venv-plan/installed ## plans beside what the GPU at hand takes
	.venv-plan/bin/python -m benchmarks.measured_plan $(ARGS)

bench-setup: .venv-peers/installed ## what rivals and comparisons need (torch and transformers, into .venv-peers)

.venv-peers/installed: requirements.txt requirements-dev.txt requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-peers.txt
	@touch $@

test-peers: .venv-peers/installed ## compare with Hugging Face's implementations
	.venv-peers/bin/python -m pytest tests/peers $(ARGS)

bench-peers: $(VENV)/installed .venv-peers/installed ## train and decode beside Hugging Face's models, in turns
	$(RUN) -m benchmarks.peers $(ARGS)

bench: $(VENV)/installed ## measure: ratios against named rivals, with their spread
	$(RUN) -m benchmarks.train_step
	$(RUN) -m benchmarks.moe_layer
	$(RUN) -m benchmarks.scaling
	$(RUN) -m benchmarks.overheads
	$(RUN) -m benchmarks.serving
	$(RUN) -m benchmarks.checkpoint_memory
	$(RUN) -m benchmarks.parity
	$(RUN) -m benchmarks.bytes_per_parameter

clean: ## remove caches, and nothing that a run wrote
	rm -rf .cache .mypy_cache .ruff_cache .pytest_cache
