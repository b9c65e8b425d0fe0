# Two commands on a bare machine with Python 3.11+, pip and make: `make demo` and `make test`.
# PYTHON chooses the interpreter that .venv is made with: make demo PYTHON=python3.12

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

NOTEBOOKS := 01_prepare 02_train 03_evaluate 04_watch 05_compare
# The demo is one run, which has nothing to be compared with.
DEMO_NOTEBOOKS := $(filter 01_% 02_% 03_%,$(NOTEBOOKS))
DEMO := outputs/demo
DEMO_RUN := $(DEMO)/lora_weights

.PHONY: help demo test browser torture readers bench notebooks schema lint lab lock clean
.DELETE_ON_ERROR:

help: ## Say what each command does
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

# What the cells print goes to the console as they run, without what ipykernel says about its ports and
# its end.
demo: export BUNNY_LORA_PROGRESS := lines
# A model so small gains by a second thread, where that waits awake for a moment (LOG.md, 2026-11-30).
demo: export OMP_NUM_THREADS := 2
demo: export GOMP_SPINCOUNT := 10000
demo: $(INSTALLED) ## Teach the demo's characters: prepare, train, evaluate, headless
	@rm -rf $(DEMO_RUN) $(DEMO)/training_data
	@mkdir -p $(DEMO_RUN)/notebooks
	@for name in $(DEMO_NOTEBOOKS); do \
	    echo "--- notebooks/$$name.ipynb"; \
	    $(BIN)/papermill notebooks/$$name.ipynb $(DEMO_RUN)/notebooks/$$name.ipynb \
	        -p config_path params/demo.yaml --kernel python3 --cwd . \
	        --no-progress-bar --log-level ERROR --stdout-file /dev/stdout --stderr-file /dev/stderr \
	        2>&1 | { grep --line-buffered -v '^\[IPKernelApp\]' || true; }; \
	done
	@echo
	@echo "The demo is done. Look at"
	@echo "  all on one page     $(DEMO_RUN)/report.html"
	@echo "  executed notebooks  $(DEMO_RUN)/notebooks/"
	@echo "  LoRA weights        $(DEMO_RUN)/final/"
	@echo "  before / after      $(DEMO_RUN)/evaluation/before_after.png"
	@echo "  scores              $(DEMO_RUN)/evaluation/eval.json"

# Tests that are processes of one run themselves, and are timed, have the machine for themselves.
ALONE := tests/test_processes.py
test: export HF_HUB_OFFLINE := 1
test: lint ## Lint, types, fast tests, and the notebooks at smoke size
	$(BIN)/python -m pytest tests --ignore $(ALONE) --ignore $(IN_BROWSER) \
	    -n logical --maxprocesses 4 --dist loadfile
	$(BIN)/python -m pytest $(ALONE)
	@rm -rf outputs/smoke
	BUNNY_LORA_PARAMS=params/smoke.yaml $(BIN)/python -m pytest --nbval-lax --nbval-current-env \
	    $(NOTEBOOKS:%=notebooks/%.ipynb)
	@if [ -n "$(CHROMIUM)" ]; then $(MAKE) --no-print-directory browser; \
	    else echo "Skipped: the notebooks in a browser, because $(NO_CHROMIUM)"; fi
	@echo "All passed: lint, format, types, tests, notebooks $(NOTEBOOKS)."

# Chromium is the system's, for instance by apt-get install chromium; Playwright's own is not fetched.
IN_BROWSER := tests/browser
CHROMIUM ?= $(shell for name in chromium chromium-browser google-chrome chrome; do \
    command -v $$name && break; done)
NO_CHROMIUM := no chromium or google-chrome was found; CHROMIUM=path names one.
browser: export CHROMIUM := $(CHROMIUM)
browser: $(INSTALLED) ## Open and run the notebooks in Chromium; screenshots go to outputs/browser
	@[ -n "$(CHROMIUM)" ] || { echo "make browser: $(NO_CHROMIUM)" >&2; exit 1; }
	@$(BIN)/python -c "import playwright" 2> /dev/null || \
	    $(PIP) install --no-build-isolation --editable ".[browser]"
	$(BIN)/python -m pytest $(IN_BROWSER)

torture: $(INSTALLED) ## Kill training 55 times, resume, and compare every byte; about ten minutes
	$(BIN)/python tests/torture.py --kills 50 --papermill 5

# Beside .venv, so that what they bring never reaches it; stable-diffusion.cpp is compiled, which takes
# cmake, a C++ compiler and some minutes.
READERS := .readers
$(READERS):
	CMAKE_ARGS="-DSD_WEBP=OFF -DSD_WEBM=OFF" $(PIP) install --no-deps --target $@ \
	    stable-diffusion-cpp-python==0.4.7 lycoris-lora==4.1.3 einops==0.8.2 toml==0.10.2

readers: $(INSTALLED) | $(READERS) ## Have other programs draw with what we export, and compare
	PYTHONPATH=$(READERS) $(BIN)/python tests/readers.py

# The plan comes last, since it fails where it is too far from its run.
# RESOLUTION makes it smaller where 512 px takes too long: make bench RESOLUTION=128
RESOLUTION ?= 512
BENCH := --append docs/benchmarks.md
bench: $(INSTALLED) ## Measure training, drawing, starting, growth and memory, and add it to docs/benchmarks.md
	$(BIN)/python benchmarks/train_step.py --resolution $(RESOLUTION) $(BENCH)
	$(BIN)/python benchmarks/train_step.py --resolution $(RESOLUTION) $(BENCH) \
	    --mixed-precision no --fast-path off --sides ancestor plain --repeats 3
	$(BIN)/python benchmarks/profile_step.py --resolution $(RESOLUTION) $(BENCH)
	$(BIN)/python benchmarks/draw.py --resolution $(RESOLUTION) $(BENCH)
	if [ -d $(READERS) ]; then PYTHONPATH=$(READERS) $(BIN)/python benchmarks/draw_cpp.py $(BENCH); \
	    else echo "Left out: stable-diffusion.cpp, which 'make readers' builds."; fi
	$(BIN)/python benchmarks/start.py --resolution $(RESOLUTION) $(BENCH)
	$(BIN)/python benchmarks/growth.py $(BENCH)
	$(BIN)/python benchmarks/memory.py --resolution $(RESOLUTION) $(BENCH)
	$(BIN)/python benchmarks/plan.py $(BENCH)

# What nbval compares with: outputs of the marked cells only, at the size that nbval runs.
NBCONVERT := jupyter nbconvert --log-level ERROR --to notebook --inplace
notebooks: export BUNNY_LORA_PARAMS := params/smoke.yaml
notebooks: $(INSTALLED) ## Execute the notebooks anew and keep the outputs that the tests compare
	@rm -rf outputs/smoke
	$(BIN)/$(NBCONVERT) --execute --ExecutePreprocessor.record_timing=False \
	    --ExecutePreprocessor.store_widget_state=False $(NOTEBOOKS:%=notebooks/%.ipynb)
	$(BIN)/$(NBCONVERT) --TagRemovePreprocessor.enabled=True \
	    --TagRemovePreprocessor.remove_all_outputs_tags=strip-output $(NOTEBOOKS:%=notebooks/%.ipynb)
	$(BIN)/ruff format notebooks

schema: $(INSTALLED) ## Write params/schema.json, by which editors know the configuration's keys
	$(BIN)/bunny-lora config --schema > params/schema.json

lint: $(INSTALLED) ## Lint, format check and types alone
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: $(INSTALLED) ## Open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks/$(firstword $(NOTEBOOKS)).ipynb

# One throwaway environment resolves everything at once; what it ends with is the lock.
lock: ## Resolve pyproject.toml anew into requirements.lock
	@venv=$$(mktemp -d); trap 'rm -rf "$$venv"' EXIT; \
	$(PYTHON) -m venv "$$venv"; \
	"$$venv/bin/python" -m pip install --quiet --upgrade "pip>=25.1" "setuptools>=77"; \
	"$$venv/bin/python" -m pip install --no-build-isolation --editable . --group dev; \
	{ \
	    echo "# Every version this project runs and is tested with. Made by \`make lock\` from pyproject.toml;"; \
	    echo "# do not edit by hand. CUDA packages are left out: torch itself names those that it needs."; \
	    "$$venv/bin/python" -m pip list --format=freeze --exclude-editable --exclude pip \
	        | sed -E 's/\+[a-z0-9.]+$$//' | grep -Eiv '^(nvidia|cuda|triton)'; \
	} > "$$venv/requirements.lock"; \
	cp "$$venv/requirements.lock" requirements.lock; \
	wc -l requirements.lock

clean: ## Remove what the demo, the tests and the tools left; never your own outputs, nor .venv
	rm -rf $(DEMO) outputs/smoke outputs/browser build .mypy_cache .ruff_cache \
	    .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The stamp comes last, so an interrupted installation is taken up again by the next command.
$(INSTALLED): requirements.lock pyproject.toml
	@$(BIN)/python -m pip --version &> /dev/null || { \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	        echo "bunny_lora needs Python 3.11 or newer, and PYTHON=$(PYTHON) is not one." \
	             "Name a newer one: make PYTHON=python3.12" >&2; exit 1; }; \
	    $(PYTHON) -m venv --clear $(VENV); }
	$(PIP) install --requirement requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
