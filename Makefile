# make quickstart · test · test-fast · lint · bench · kernel-report · gpu-check · sglang-cpu. Each makes .venv if it is not there; nothing else is needed.
#   TORCH="torch==2.13.0"     which torch: any requirement pip understands, or a wheel's path
#   PIP_ARGS="--index-url …"  where from (a CPU-only or CUDA build)
#   EXTRAS=dev,gpu            optional parts, see setup.py
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_ARGS ?=
EXTRAS ?= dev
NPROC ?= 2
RUN ?= runs/arithmetic
TEST_JOBS ?= 2
#   ENGINE=sglang             sample from a real SGLang server: the one of SGLANG_PYTHON, or for CPU, in an environment that is made once
ENGINE ?= embedded
SGLANG_PYTHON ?=
SGLANG_CPU = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dapo/sglang-0.5.23-cpu/bin/python
export OMP_NUM_THREADS ?= 1
# seconds that torchrun leaves its ranks to save after Ctrl-C or SIGTERM; its own default is 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT ?= 600

quickstart: $(VENV)/.ready $(if $(filter sglang,$(ENGINE)),$(if $(SGLANG_PYTHON),,sglang-cpu))
	$(VENV)/bin/python -m torch.distributed.run --standalone --nproc-per-node $(NPROC) -m dapo train examples/arithmetic/config.yaml \
		parallel.tensor=$(NPROC) run.dir=$(RUN) engine.kind=$(ENGINE) $(if $(filter sglang,$(ENGINE)),engine.python=$(or $(SGLANG_PYTHON),$(SGLANG_CPU)))

# in two processes: tests wait for servers and time limits half of their time
test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -n $(TEST_JOBS) --dist loadgroup --no-loadscope-reorder

# without torchrun and servers: see the marks in tests/conftest.py
test-fast: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -m "not gpu and not slow"

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/step_time.py
	$(VENV)/bin/python benchmarks/arithmetic_seeds.py

kernel-report: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/kernel_report.py

# SGLang 0.5.23 for CPU, outside the clone; the tests make it too
sglang-cpu: $(VENV)/.ready
	TORCH="$(TORCH)" PIP_ARGS="$(PIP_ARGS)" $(VENV)/bin/python tests/sglang/environment/build.py

# On a machine with a CUDA GPU, without network: uses the Python that is there, and SITE for packages that it lacks
#   pip install --target wheels --no-deps megatron-core==0.19.2 …; make gpu-check GPU_PYTHON=python3 SITE=wheels
GPU_PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON))
SITE ?=
gpu-check: export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(CURDIR)/benchmarks:$(SITE):$(PYTHONPATH)
gpu-check:
	$(GPU_PYTHON) -m pytest -m gpu tests/gpu
	$(GPU_PYTHON) benchmarks/policy_loss.py --short
	$(GPU_PYTHON) benchmarks/train_gpu.py

# torch first: another requirement would choose its build
$(VENV)/.ready: setup.py
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(PIP_ARGS) "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	# its metadata want Python 3.12, so pip would refuse it on 3.11, where it has a wheel and runs
	$(VENV)/bin/python -c "import sys; sys.exit(sys.version_info < (3, 12))" || $(VENV)/bin/python -m pip install --quiet --no-deps --ignore-requires-python megatron-core==0.19.2
	touch $@

.PHONY: quickstart test test-fast lint bench kernel-report gpu-check sglang-cpu
