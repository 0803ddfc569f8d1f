# `make help` lists what there is. On a fresh machine: python3 (3.11 or newer), python3-venv, make and git are enough.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format wheel benchmark-import clean distclean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z][a-z-]*:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  ARGS=… is handed on, as in: make test ARGS='-k summary -x'"

demo: $(VENV)/.installed ## Compress the gallery, then search it and ask about it from the summaries alone
	$(PY) -m fwd2bot.pipelines.demo $(ARGS)

test: $(VENV)/.installed-dev ## Run the tests (without those marked slow or gpu)
	$(PY) -m pytest $(ARGS)

test-slow: $(VENV)/.installed-dev ## Run the tests marked slow
	$(PY) -m pytest -m "slow and not gpu" $(ARGS)

lint: $(VENV)/.installed-dev ## Check style and formatting; changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.installed-dev ## Mend style and formatting in place
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

wheel: $(VENV)/.installed-dev ## Build the source archive and the wheel into dist/
	$(PY) -m build --outdir dist .

benchmark-import: $(VENV)/.installed ## Time `import fwd2bot` against `import transformers`
	$(PY) benchmarks/import_time.py $(ARGS)

clean: ## Remove what builds and tests leave behind
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -not -path "./.git/*" -prune -exec rm -rf {} +

distclean: clean ## The same, and the virtual environment
	rm -rf "$(VENV)"

# The stamps: an environment is made once, and installed again when what it is made from has changed.
$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' was not found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old; Python 3.11 or newer is needed. Name another one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: '$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv "$(VENV)"
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@
