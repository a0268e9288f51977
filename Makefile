# make setup | demo | test | test-all | test-gpu | lint | bench | lock. Everything lives in .venv; nothing outside this
# folder is touched.

# The first Python of a version that all dependencies have wheels for.
PYTHON ?= $(shell for name in python3 python3.12 python3.11 python3.13 python3.10; do \
	"$$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { echo "$$name"; break; }; done)

# A driver decides: with one, CUDA builds; without, a set that runs on a CPU.
DEVICE := $(if $(wildcard /proc/driver/nvidia/version),gpu,cpu)

# Packages are those of constraints/, and each file's hash is checked. HASHES=no takes the same versions from an index
# whose files are others, unchecked, with the CUDA libraries that its torch asks for.
HASHES ?= yes

BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: setup demo test test-all test-gpu lint bench lock clean

setup: $(INSTALLED)

LOCKED := $(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps
UNCHECKED := make setup: no packages with the hashes in constraints/ (see above). From an index that has them in other \
	files, as PyTorch's own has torch, make setup HASHES=no takes the same versions without that check

NO_CPU_BUILD := make setup: no locked CPU build of torch from here (see above), so the default index's, with CUDA's \
	libraries, several GB. With PyTorch's own CPU index, make setup HASHES=no takes a CPU build for any Python

# Where hashes are checked, so are those of what builds packages, which pip would otherwise fetch unchecked. The lock is
# whole, so pip has nothing to resolve. Of two builds of torch whose hashes it knows pip takes the default index's, so the
# CPU build has a lock of its own and comes first; it does without CUDA's libraries.
$(INSTALLED): setup.py $(wildcard constraints/*.txt)
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 found; name one: make setup PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
ifeq ($(HASHES),no)
	sed -E -e '/^(-r |nvidia-|cuda-)|\+cpu/d' -e '/--hash=/d' -e 's/ \\$$//' constraints/*.txt > .venv/versions.txt
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check -c .venv/versions.txt -e '.[$(DEVICE),test,dev]'
ifeq ($(DEVICE),gpu)
# milvus-lite, of the tests, has pip install faiss-cpu too, whose files have the same names.
	$(BIN)/pip uninstall --quiet --yes faiss-cpu
	$(BIN)/pip install --quiet --disable-pip-version-check -c .venv/versions.txt --no-deps --force-reinstall faiss-gpu
endif
else
	$(LOCKED) -r constraints/build.txt
ifeq ($(DEVICE),cpu)
	$(LOCKED) -r constraints/torch-cpu.txt || echo "$(NO_CPU_BUILD)" >&2
endif
	DS_BUILD_OPS=0 $(LOCKED) --no-build-isolation -r constraints/$(DEVICE).txt -r constraints/dev.txt \
		|| { echo "$(UNCHECKED)" >&2; exit 1; }
	if $(BIN)/python -c 'from importlib import metadata; raise SystemExit("+cpu" in metadata.version("torch"))'; \
		then $(LOCKED) -r constraints/cuda.txt; fi
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
endif
	@touch $@

demo: setup
	$(BIN)/namr train homeware --run-dir runs/demo --overwrite
	$(BIN)/namr evaluate runs/demo
	$(BIN)/namr report runs/demo

# Whole files go to one process, with what they set up, in the order that tests/conftest.py gives. One process more than
# cores, for tests wait a good deal; four at most, for a file may start several ranks.
TEST := PYTEST_XDIST_AUTO_NUM_WORKERS=$$(($$(nproc) + 1)) \
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: setup
	$(TEST)

# With the tests that take minutes each: kernels compiled for every architecture, type and width.
test-all: setup
	$(TEST) -m "whole or not whole"

# What needs a GPU or uses one, the kernels compiled. Most of the time goes into compiling them, so one GPU serves many
# processes; tests of one group share what they set up.
test-gpu: setup
	@$(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' \
		|| { echo "make test-gpu: torch sees no NVIDIA GPU here; run it where namr doctor names one" >&2; exit 2; }
	$(BIN)/python -m pytest -m gpu -n auto --maxprocesses 12 --dist loadgroup

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/shellcheck -x launchers/*.sh slurm/*.sh slurm/lab/*.sh tools/*.sh .ci/run

bench: setup
	$(BIN)/namr bench kernels

# After a change of setup.py's requirements; tools/lock.py names the options. Versions that still fit stay.
lock:
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv "$$folder" \
		&& "$$folder/bin/pip" install --quiet --disable-pip-version-check uv==0.13.9 \
		&& PATH="$$folder/bin:$$PATH" PYTHONPATH=. "$$folder/bin/python" tools/lock.py $(LOCK_OPTIONS)

clean:
	rm -rf .venv build dist *.egg-info
