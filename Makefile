# make demo: distil a tiny translation model.  make test: the test suite; make test-all: kernels for every GPU too.
# make docs: docs/api.md from the code, docs/evidence.md from results.  Each sets up .venv first; make gpu alone does not.
# make compat: kernels and tests with every Triton, the oldest NVRTC, and the oldest and newest torch that are supported;
# downloads about 10 GB into build/ (20 GB unpacked) the first time.  make compat-fast: with the oldest Triton, for sm_90.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Small operations: threads that wait for each other cost more than they give.
TEST_ENV := OMP_NUM_THREADS=1
WORKERS ?= 2
# Of make gpu: where its results go, and how long it may take.
OUT ?= build/gpu
MINUTES ?= 6

.PHONY: demo demo-quick test test-all compat compat-fast lint types docs gpu bench clean

demo: $(STAMP)
	$(PY) examples/distill.py --preset demo --output runs/demo

demo-quick: $(STAMP)
	$(PY) examples/distill.py --preset quick --output runs/demo-quick

test: $(STAMP)
	$(TEST_ENV) $(PY) -m pytest -n $(WORKERS) --dist worksteal

test-all: $(STAMP)
	$(TEST_ENV) $(PY) -m pytest -n $(WORKERS) --dist worksteal -m ""

compat: $(STAMP)
	$(TEST_ENV) WORKERS=$(WORKERS) $(PY) -m tests.compat

compat-fast: $(STAMP)
	$(TEST_ENV) $(PY) -m tests.compat triton --oldest --fast --targets sm_90

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)
	$(VENV)/bin/mypy

docs: $(STAMP)
	$(PY) docs/objectives.py
	$(PY) docs/api.py
	$(PY) docs/evidence.py

# From a plain checkout, with the Python that is given: no network, no .venv, nothing installed.
gpu:
	PYTHONPATH=. $(PYTHON) -m bench gpu --out $(OUT) --minutes $(MINUTES)

bench: $(STAMP)
	$(PY) -m bench run

clean:
	rm -rf $(VENV) build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --upgrade pip
	$(PY) -m pip install --constraint constraints.txt --editable '.[train,lora,report,bench,peers,triton,cuda,dev]'
	DS_BUILD_OPS=0 $(PY) -m pip install --constraint constraints.txt --no-build-isolation deepspeed
	touch $@
