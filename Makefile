# `make demo` and `make test` need only Python 3.10+ and make: they set up .venv themselves (about 6 GB).
# With PYTHON=python3 they use that interpreter as it is and download nothing.
VENV := .venv
PYTHON := $(VENV)/bin/python
SYSTEM_PYTHON := python3
ifeq ($(PYTHON),$(VENV)/bin/python)
ENVIRONMENT := $(VENV)/installed
endif

.PHONY: demo test test-slow test-report test-gpu ablations lint

demo: $(ENVIRONMENT)
	$(PYTHON) pretrain.py --output-dir runs/demo
	$(PYTHON) cluster_eval.py --checkpoint runs/demo/checkpoint.pth --output-dir runs/demo/classes --pixel-kmeans
	$(PYTHON) embed.py --checkpoint runs/demo/checkpoint.pth --output-dir runs/demo/features
	$(PYTHON) report.py runs/demo

test: $(ENVIRONMENT)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal -m "not slow and not browser"

test-slow: $(ENVIRONMENT)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -m slow

# The page of report.py in a browser, if Chromium is installed.
test-report: $(ENVIRONMENT)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -rs -m browser

# Checks and measures on a CUDA GPU, and prints a page; without one it says so and does nothing.
test-gpu: $(ENVIRONMENT)
	$(PYTHON) benchmarks/gpu.py

# docs/ablations.md: 45 runs, about an hour on two cores; the same command resumes.
ablations: $(ENVIRONMENT)
	$(PYTHON) benchmarks/ablations.py

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check .

$(VENV)/installed: requirements-dev.txt
	@$(SYSTEM_PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" \
	  || { echo "Python 3.10 or newer is needed: make $(MAKECMDGOALS) SYSTEM_PYTHON=/path/to/python3"; exit 2; }
	$(SYSTEM_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --requirement requirements-dev.txt
	@touch $@
