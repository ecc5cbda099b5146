# Each target but gpu sets up .venv from constraints.txt by itself, and again when a pin changes.
#   make setup       .venv, with all that the others need; they do it by themselves
#   make demo        train on the built-in digits into runs/digits
#   make demo-media  the same from video files with sound and captions, into runs/media
#   make test        all tests; TESTS="-k name" picks some, JOBS=1 runs them in one process
#   make lint        ruff, mypy, and pyright for types that users miss
#   make docs        the site, into site/
#   make package     wheel and sdist, into dist/, and a trial of the wheel alone
#   make gpu         tests, times and sanitizer on a GPU, in 8 minutes, into docs/benchmarks/gpu/;
#                    STAGES="tests figures" picks some, GPU_PYTHON=python takes another than python3,
#                    GPU_OUTPUT=results another folder
#   make oldest      tests of the library on the oldest releases of what it needs, in .venv-oldest;
#                    TORCH=torch==2.13.0 takes another torch: the oldest is a download of 3 GB

# The first interpreter of these that runs and is new enough; `make PYTHON=...` overrides.
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
JOBS ?= auto
BIN := .venv/bin
READY := .venv/.ready
MEDIA := .venv/.media
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
GPU_PYTHON ?= python3
GPU_OUTPUT ?= docs/benchmarks/gpu
TORCH ?= $(shell grep '^torch==' .ci/oldest.txt)
LIBRARY := mmvq mmvq_kernels $(addprefix tests/,functional golden kernels modules properties)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-media test lint docs package gpu oldest

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

demo: $(READY)
	@$(BIN)/python examples/cmg_pretrain.py --output runs/digits

demo-media: $(MEDIA)
	@test -d runs/media/files || $(BIN)/python examples/cmg_media.py runs/media/files --clips 400 250 150
	@test -d runs/media/store || \
		$(BIN)/python examples/cmg_features.py runs/media/files --output runs/media/store --resume
	@$(BIN)/python examples/cmg_pretrain.py --data runs/media/store --output runs/media/run
	@$(BIN)/python examples/cmg_encode.py runs/media/run --data runs/media/store \
		--output runs/media/tokens.parquet --labels-from audio

test: $(MEDIA)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(TESTS)

lint: $(READY)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@for package in mmvq mmvq_kernels; do \
		said=$$(PATH="$(CURDIR)/$(BIN):$$PATH" pyright --verifytypes $$package --ignoreexternal) \
			|| { echo "$$said"; exit 1; }; \
	done

docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

package: $(READY)
	@$(BIN)/python .ci/package.py

gpu:
	@PYTHONUNBUFFERED=1 $(GPU_PYTHON) -m examples.benchmarks.gpu --output $(GPU_OUTPUT) $(STAGES)

oldest: BIN := .venv-oldest/bin
oldest: PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
oldest:
	@$(PYTHON) -m venv --clear .venv-oldest
	@$(PIP) $(TORCH)
	@grep -v '^torch==' .ci/oldest.txt > .venv-oldest/pins.txt
	@$(PIP) -r .venv-oldest/pins.txt $(TORCH) -e . hypothesis matplotlib onnxruntime pytest \
		pytest-xdist tensorboard vector-quantize-pytorch
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(LIBRARY)

# torch comes first and alone, by its exact pin, so that no other version is ever looked at.
$(READY): pyproject.toml constraints.txt
	@$(if $(PYTHON),$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))',false) || \
		{ echo 'mmvq needs Python 3.11 or newer: install it, or run make PYTHON=/path/to/python'; exit 1; }
	@echo 'Setting up .venv ...'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) -e '.[dev]'
	@touch $@

# what reads video, sound and text, which the digits do without
$(MEDIA): $(READY)
	@$(PIP) -e '.[media]'
	@touch $@
