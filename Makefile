# make quickstart · test · test-fast · lint · bench · ladder · peers-bench · docs · kernel-report · gpu-check · gpu-wheels · sglang-cpu · env-check. Each makes .venv if it is not there; nothing else is needed.
#   TORCH="torch==2.13.0"     another torch than constraints/ name, which then do not apply: any requirement pip understands, or a wheel's path
#   PIP_ARGS="--index-url …"  where torch is from (a CPU-only or CUDA build)
#   EXTRAS=dev,gpu            optional parts, see setup.py
PYTHON ?= python3
VENV ?= .venv
ifdef TORCH
CONSTRAINTS ?=
else
CONSTRAINTS ?= constraints/python$(shell $(PYTHON) -c "import sys; print('3.%d' % min(sys.version_info.minor, 12))").txt
TORCH := $(shell grep '^torch==' $(CONSTRAINTS))
endif
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
	$(VENV)/bin/dapo train examples/arithmetic/config.yaml --nproc $(NPROC) parallel.tensor=$(NPROC) run.dir=$(RUN) \
		engine.kind=$(ENGINE) $(if $(filter sglang,$(ENGINE)),engine.python=$(or $(SGLANG_PYTHON),$(SGLANG_CPU)))

# in two processes: tests wait for servers and time limits half of their time
test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -n $(TEST_JOBS) --no-loadscope-reorder

# without torchrun and servers: see the marks in tests/conftest.py
test-fast: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -n $(TEST_JOBS) --no-loadscope-reorder -m "not gpu and not slow"

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/step_time.py
	$(VENV)/bin/python benchmarks/arithmetic_seeds.py

# the paper's ladder and a setting for each technique: benchmarks/ladder/. What has run is in runs/ladder and is not run again
#   SEEDS=3  the short form, into runs/ladder/short; five are published
SEEDS ?= 5
ladder: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/ladder/mechanisms.py
	$(VENV)/bin/python benchmarks/ladder/run.py $(SEEDS)

# beside TRL and ms-swift, each in an environment of its own, outside the clone, that is made where it is absent
peers-bench: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/beside_peers.py

# the documentation's site, in build/docs, by mkdocs-material in an environment of its own, outside the clone
DOCS_VENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dapo/docs
docs: $(DOCS_VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

$(DOCS_VENV)/.ready: constraints/docs.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --requirement constraints/docs.txt
	touch $@

kernel-report: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/kernel_report.py

# SGLang 0.5.23 for CPU, outside the clone; the tests make it too
sglang-cpu: $(VENV)/.ready
	TORCH="$(TORCH)" PIP_ARGS="$(PIP_ARGS)" $(VENV)/bin/python tests/sglang/environment/build.py

# Check and measure a CUDA GPU in at most nine minutes, without network (benchmarks/gpu_check.py)
#   make gpu-wheels; make gpu-check OUT=checked WHEELS=wheels GPU_PYTHON=python3
#   STAGES="train-0.5b loss"  only these
GPU_PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON))
OUT ?= checked
WHEELS ?=
STAGES ?=
gpu-check:
	$(GPU_PYTHON) benchmarks/gpu_check.py --out $(OUT) $(if $(WHEELS),--wheels $(WHEELS)) $(STAGES)

# what a machine with Python 3.12, torch and transformers may still lack
gpu-wheels:
	$(PYTHON) -m pip download --quiet $(PIP_ARGS) --no-deps --only-binary :all: --python-version 3.12 --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		--dest $(or $(WHEELS),wheels) --requirement benchmarks/gpu_wheels.txt
	du --apparent-size --block-size=KiB --all $(or $(WHEELS),wheels)

# all of trainer and servers in one environment, outside the clone, as far as a machine without a GPU can: is every module there?
env-check:
	$(PYTHON) tests/sglang/environment/check.py

# torch first: another requirement would choose its build. Then Transformer Engine, which is compiled against it
PIP = $(VENV)/bin/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
comma := ,
$(VENV)/.ready: setup.py $(CONSTRAINTS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(PIP_ARGS) "$(TORCH)"
	$(if $(filter gpu,$(subst $(comma), ,$(EXTRAS))),$(PIP) setuptools packaging ninja && $(PIP) --no-build-isolation "transformer-engine[core_cu13$(comma)pytorch]==2.20.2")
	$(PIP) --editable ".[$(EXTRAS)]"
	# its metadata want Python 3.12, so pip would refuse it on 3.11, where it has a wheel and runs
	$(VENV)/bin/python -c "import sys; sys.exit(sys.version_info < (3, 12))" || $(PIP) --no-deps --ignore-requires-python megatron-core==0.19.2
	touch $@

.PHONY: quickstart test test-fast lint bench ladder peers-bench docs kernel-report gpu-check gpu-wheels sglang-cpu env-check
