# Every target makes its own environment in .venv; it needs Python 3.10-3.12 (Composer's) and PyPI.
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.10,$(shell python$(v) -c 'import sys; print("python$(v)")' 2>/dev/null)) python3)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all test-torch test-llm-foundry gpu benchmarks docs docs-serve check format lint types hooks build clean

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not ((3, 10) <= sys.version_info[:2] <= (3, 12)))' \
		|| { echo 'Python 3.10-3.12 is needed, found:'; $(PYTHON) --version; exit 1; }
	@echo 'making the environment in $(VENV) (once, a few minutes) ...'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/composer-sam demo

# Two processes: more would wait for each other where tests start ranks of their own.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m ''

# Methods, engine, vectors, diagnostics, distribution and the other trainers under another torch, in an environment of its
# own without Composer, so with the newest transformers too: make test-torch TORCH=2.15.0 PYTHON=python3.13. PIP_INDEX_URL may name an index of CPU wheels.
TORCH ?= 2.15.0
TORCH_VENV := .venv-torch-$(TORCH)

$(TORCH_VENV)/.installed: pyproject.toml
	@echo 'making the environment in $(TORCH_VENV) (once, a few minutes) ...'
	@test -x $(TORCH_VENV)/bin/python || $(PYTHON) -m venv $(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(TORCH_VENV)/bin/python -m pip install --quiet torch==$(TORCH) -e '.[diagnostics,hosts,test]'
	@touch $@

test-torch: $(TORCH_VENV)/.installed
	$(TORCH_VENV)/bin/python -c 'import sys, torch; print("torch", torch.__version__, "Python", sys.version.split()[0])'
	$(TORCH_VENV)/bin/python -m pytest tests/conformance tests/diagnostics tests/distributed tests/hosts tests/reference tests/unit

# LLM Foundry in an environment of its own, because it pins most of what it needs.
FOUNDRY_VENV := .venv-llm-foundry

$(FOUNDRY_VENV)/.installed: pyproject.toml
	@echo 'making the environment in $(FOUNDRY_VENV) (once, a few minutes) ...'
	@test -x $(FOUNDRY_VENV)/bin/python || $(PYTHON) -m venv $(FOUNDRY_VENV)
	$(FOUNDRY_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(FOUNDRY_VENV)/bin/python -m pip install --quiet llm-foundry==0.22.0 -e '.[test]'
	@touch $@

test-llm-foundry: $(FOUNDRY_VENV)/.installed
	$(FOUNDRY_VENV)/bin/python -m pytest tests/hosts/test_llm_foundry.py tests/hosts/test_llm_foundry_runs.py

gpu: $(VENV)/.installed
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python -m pytest -m gpu tests/gpu && $(BIN)/python -m benchmarks.gpu; \
	else echo 'no GPU here: nothing to run'; fi

# Every figure of README and docs: within an hour on two cores that do nothing else; the same command goes on where it
# was cut off. SET=long has what takes longer, IMAGES=DIR is CIFAR-10 as DIR/train/<class>/ and DIR/test/<class>/
# (otherwise torchvision downloads it).
SET ?= cpu
benchmarks: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[benchmarks]'
	$(BIN)/python -m benchmarks --set $(SET) $(if $(IMAGES),--images '$(IMAGES)')

# The documentation as a site: site/index.html, built without warnings; and served on this machine while pages are written.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.installed
	$(BIN)/mkdocs serve --dev-addr 127.0.0.1:8000

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(VENV)/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pyright --pythonpath $(BIN)/python --project pyrightconfig.strict.json

check: lint types test

# What needs neither torch nor the package: packaging, and the hooks of .pre-commit-config.yaml, which come from GitHub.
TOOLS_VENV := .venv-tools

$(TOOLS_VENV)/.installed: Makefile
	@test -x $(TOOLS_VENV)/bin/python || $(PYTHON) -m venv $(TOOLS_VENV)
	$(TOOLS_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(TOOLS_VENV)/bin/python -m pip install --quiet 'build>=1.2' 'twine>=6.1' 'pre-commit>=4'
	@touch $@

hooks: $(TOOLS_VENV)/.installed
	$(TOOLS_VENV)/bin/pre-commit run --all-files --show-diff-on-failure

# The source distribution and the wheel, in dist/.
build: $(TOOLS_VENV)/.installed
	rm -rf build dist
	$(TOOLS_VENV)/bin/python -m build
	$(TOOLS_VENV)/bin/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) .venv-torch-* $(FOUNDRY_VENV) $(TOOLS_VENV) build dist site demo runs .pytest_cache .ruff_cache .hypothesis
