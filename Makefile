# `make help` lists what there is. On a fresh machine: python3 (3.11 or newer), python3-venv, make and git are enough.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2

PY := $(VENV)/bin/python
PIP_INSTALL := -m pip install --disable-pip-version-check --no-compile
# Bytecode is made afterwards, by all cores. Some packages hold files of other Pythons, which pip passes over as well.
COMPILED = @$(@D)/bin/python -m compileall -q -j 0 $(@D)/lib >/dev/null 2>&1; touch $@
# The tests of one file stay in one process, since they share what is costly to build.
PYTEST := -m pytest -n $(JOBS) --dist loadfile
# Environments of their own, for tests that need other packages than the rest.
OLDEST := .venv-oldest
FAMILIES := .venv-families
HARNESSES := .venv-harnesses
DEEPSPEED := .venv-deepspeed

.DEFAULT_GOAL := help
.PHONY: help demo space space-export space-pictures test test-slow test-space test-oldest test-families test-harnesses test-deepspeed lint format wheel benchmark-import clean distclean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z][a-z-]*:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  ARGS=… is handed on, as in: make test ARGS='-k summary -x'; JOBS=… is the number of processes of tests, 2 by default"

demo: $(VENV)/.installed ## Compress the gallery, then search it and ask about it from the summaries alone
	$(PY) -m fwd2bot.pipelines.demo $(ARGS)

space: $(VENV)/.installed-space ## Start the Space in a browser, on the checkpoint inside the package
	$(PY) -m fwd2bot_cli demo $(ARGS)

space-export: $(VENV)/.installed-space ## Write a folder that runs as a Space of its own to dist/space, or ARGS="--to DIR"
	rm -rf dist/space-wheel
	$(PY) -m build --wheel --outdir dist/space-wheel .
	$(PY) -m fwd2bot.space_app.export --wheel dist/space-wheel/*.whl --pictures docs --to dist/space $(ARGS)

space-pictures: $(VENV)/.installed-space ## Take the pictures of the Space in docs/ anew; needs Chromium
	FWD2BOT_SPACE_PICTURES=docs $(PY) -m pytest tests/space/browser -m browser -k picture_of_each_tab $(ARGS)

# Their models are tiny: a second thread only waits for the first.
test test-slow test-space test-oldest test-families test-harnesses test-deepspeed: export OMP_NUM_THREADS ?= 1

test: $(VENV)/.installed-dev ## Run the tests (without those marked slow or gpu)
	$(PY) $(PYTEST) $(ARGS)

test-slow: $(VENV)/.installed-ray ## Run the tests marked slow; installs Ray
	$(PY) -m pytest -m "slow and not gpu" $(ARGS)

test-space: $(VENV)/.installed-space ## Run the tests of the Space in a browser; needs Chromium
	@command -v chromium >/dev/null || { echo "error: the browser 'chromium' was not found. On Debian: apt-get install chromium" >&2; exit 1; }
	$(PY) $(PYTEST) tests/space/browser -m "browser and not slow" $(ARGS)

# How pictures are drawn, and that a killed job goes on, has nothing to do with the versions of what is installed; the
# comparison's baselines and the Space use of it what the model, its trainer and its pipelines use.
test-oldest: $(OLDEST)/.installed ## Run the tests with the oldest versions that are allowed (constraints-oldest.txt)
	$(OLDEST)/bin/python $(PYTEST) --ignore-glob="tests/training/test_scene*" --ignore=tests/training/test_several.py --ignore=tests/space \
		--ignore-glob="tests/training/test_baselines*" --ignore=tests/store/test_store_interrupted.py $(ARGS)

test-families: $(FAMILIES)/.installed ## Run the tests of all families of backbones, of quantisation and of reports, with what these need
	$(FAMILIES)/bin/python $(PYTEST) -p tests.torchvision_on_cpu tests/families tests/modeling/quantised tests/training/test_reports.py $(ARGS)

# Not as `tests.…`: one of the packages there installs a package `tests`.
test-harnesses: $(HARNESSES)/.installed ## Run the tests of mteb and lmms-eval with what these need
	PYTHONPATH=tests $(HARNESSES)/bin/python $(PYTEST) -p torchvision_on_cpu tests/training/test_mteb.py tests/training/test_lmms_eval.py tests/training/test_answer_figures.py $(ARGS)

test-deepspeed: $(DEEPSPEED)/.installed ## Run the tests of a backbone divided by DeepSpeed's ZeRO-3; needs a C++ compiler
	$(DEEPSPEED)/bin/python $(PYTEST) -m "slow or not slow" -k "zero3 or ZeRO" tests/training tests/families/test_family_sharding.py $(ARGS)

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
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -not -path "./.venv-*" -not -path "./.git/*" -prune -exec rm -rf {} +

distclean: clean ## The same, and the virtual environments
	rm -rf "$(VENV)" $(OLDEST) $(FAMILIES) $(HARNESSES) $(DEEPSPEED)

# The stamps: an environment is made once, and installed again when what it is made from has changed.
%/.created:
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' was not found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old; Python 3.11 or newer is needed. Name another one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: '$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv "$*"
	@touch $@

# Of the same Python as $(VENV), and with a file that makes its packages seen, so that only the rest is installed. When
# something was installed into $(VENV) they are made anew.
PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))
$(FAMILIES)/.created $(HARNESSES)/.created $(DEEPSPEED)/.created: $(VENV)/.installed-dev
	$(PY) -m venv --clear "$(@D)"
	@dev=$$($(PY) -c '$(PACKAGES)') && own=$$("$(@D)/bin/python" -c '$(PACKAGES)') && echo "$$dev" > "$$own/dev.pth"
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	$(PY) $(PIP_INSTALL) -c constraints.txt -e .
	$(COMPILED)

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PY) $(PIP_INSTALL) -c constraints.txt -e ".[dev]"
	$(COMPILED)

$(VENV)/.installed-space: $(VENV)/.installed-dev
	$(PY) $(PIP_INSTALL) -c constraints.txt -e ".[dev,browser]"
	$(COMPILED)

$(VENV)/.installed-ray: $(VENV)/.installed-dev
	$(PY) $(PIP_INSTALL) -c constraints.txt -e ".[dev,ray]"
	$(COMPILED)

$(OLDEST)/.installed: $(OLDEST)/.created pyproject.toml constraints-oldest.txt
	$(OLDEST)/bin/python $(PIP_INSTALL) -c constraints-oldest.txt -e ".[dev]"
	$(COMPILED)

$(FAMILIES)/.installed: $(FAMILIES)/.created
	$(FAMILIES)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[dev,quantization]" torchvision num2words trackio wandb
	$(COMPILED)

$(HARNESSES)/.installed: $(HARNESSES)/.created
	$(HARNESSES)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[dev,mteb,lmms-eval]"
	$(COMPILED)

$(DEEPSPEED)/.installed: $(DEEPSPEED)/.created
	$(DEEPSPEED)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[dev,deepspeed]"
	$(COMPILED)
