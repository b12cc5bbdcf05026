# Everything runs in a virtual environment that the first target to need it creates.
#   make demo      the main job: early stopping rollouts against full rollouts, with a report
#   make test      the tests
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Tests run on all cores, up to eight, and each on one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

.PHONY: demo test lint sanitize gpu-exp fuzz static static-all predict smollm2 tally bench \
	gpu docs wheel-check clean

demo: $(VENV)/.train
	$(BIN)/esr-train compare configs/demo.yaml --out runs/demo

test: $(VENV)/.train
	$(PYTEST) tests

lint: $(VENV)/.train
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The GPU's code path without a GPU: the tests of kernels, on compiled kernels executed on the CPU
# with bounds and races checked. ttsem declares Python 3.12, and works on 3.11.
sanitize: $(VENV)/.train $(VENV)/.sanitize
	ESR_TRITON_ON_CPU=1 $(PYTEST) tests/kernels

# The kernels' numerics with exponentials that err as a GPU's do (conftest.py).
gpu-exp: $(VENV)/.train
	ESR_GPU_EXP=1 $(PYTEST) tests/kernels/divergence tests/kernels/scoring -k triton

# A minute of random calls of every op against the references in fp64; other calls every time.
fuzz: $(VENV)/.train
	ESR_FUZZ_SECONDS=$${ESR_FUZZ_SECONDS:-60} OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q -m slow tests/kernels/test_fuzz.py

# Compiles every Triton kernel for sm_80, sm_90, sm_100 and gfx942, and fails on spilled registers.
static: $(VENV)/.train
	$(BIN)/python -m bench.gpu_static

# The same for sm_90 and gfx942 with every other Triton that is supported: minutes a version.
static-all: $(VENV)/.train
	$(BIN)/python -m bench.static_all

# What a GPU's time is predicted to be, and where it goes; writes a table into docs/gpu.md. NVIDIA's
# model of its matrix products is a tool of this target only, under NVIDIA's licence; without it a
# stated rate takes its place.
predict: $(VENV)/.train
	-$(PIP) nvidia-matmul-heuristics
	$(BIN)/python -m bench.predict

smollm2: $(VENV)/.train
	$(BIN)/esr-train compare configs/smollm2.yaml --out runs/smollm2

tally: $(VENV)/.train
	$(BIN)/esr-train compare configs/tally.yaml --jobs 2 --out runs/tally

bench: $(VENV)/.train $(VENV)/.bench
	$(BIN)/python -m pytest bench -q -s

# Checks and times everything on the GPU of this machine.
gpu: $(VENV)/.train $(VENV)/.bench
	$(BIN)/python -m bench.gpu_suite

# The pages of docs/ and the API's as a site in site/; fails on a link to nowhere.
docs: $(VENV)/.train $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Builds sdist and wheel, and runs examples/ with the wheel in a fresh environment without a C compiler.
wheel-check:
	PYTHON=$(PYTHON) tools/check_wheel.sh

$(VENV)/.train: pyproject.toml constraints.txt
	@echo "Installing into $(VENV); the first time takes a minute or two."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP) -e '.[train,dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.train
	$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/.docs: $(VENV)/.train
	$(PIP) -e '.[docs]'
	@touch $@

$(VENV)/.sanitize: $(VENV)/.train
	$(PIP) --no-deps --ignore-requires-python ttsem==0.1.0
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
