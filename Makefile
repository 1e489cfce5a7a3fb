# make demo      set up, then the whole job on the bundled images: cache, three stages, sampling, scores, comparison
# make demo-fast the same with less training
# make picture   the README's picture, docs/demo.png, by a bundled model
# make test      set up, then the tests;  make test-all: also the slow ones
# make test-numeric  the tests that compare numbers, as an older processor with two cores would run them
# make test-lowest  the tests with the lowest versions that requirements.txt allows;  make test-newest: with the newest
# make lint      ruff and mypy; hadolint for the Dockerfile, and the schema of compose.yaml
# make constraints  constraints.txt anew from the versions in the environment, when it has passed the tests

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Tests run in two processes of one thread each; WORKERS=0 runs them in one. Slow ones wait so often that three keep two
# cores busy. A process takes a file at a time, in the order of tests/conftest.py.
WORKERS ?= 2
SLOW_WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

OTHER_CPU ?= ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=2

# The dependencies of requirements.txt, each at its lowest version.
LOWEST := sed -n 's/^\([A-Za-z0-9-]*\)>=\([0-9.]*\).*/\1==\2/p' requirements.txt

.PHONY: demo demo-fast picture test test-numeric test-slow test-all test-lowest test-newest constraints lint install clean

install: $(READY)

$(READY): requirements.txt constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "lit_transdiff needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Setting up $(VENV) (PyTorch and its friends: several GB, some minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[dev]" --constraint constraints.txt
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # on all cores; pip has one, and some templates are no Python
	@touch $@

demo: install
	$(BIN)/lit-transdiff run experiments/fashion/pipeline.yaml

demo-fast: install
	$(BIN)/lit-transdiff run experiments/fashion/pipeline_fast.yaml

# The README's picture is drawn by a bundled model; its table is that of make demo, runs/fashion/comparison.md.
picture: install
	rm -rf runs/bundled/picture
	$(BIN)/lit-transdiff sample --checkpoint data/fashion/mrar --output runs/bundled/picture
	$(BIN)/python -c 'from PIL import Image; Image.open("runs/bundled/picture/grid.png").quantize(64).save("docs/demo.png", optimize=True)'

test: install
	$(PYTEST) -n $(WORKERS) -m "not slow"

test-numeric: install
	$(OTHER_CPU) $(BIN)/python -m pytest -m "numeric and not slow"

test-slow: install
	$(PYTEST) -n $(SLOW_WORKERS) -m slow

test-all: install
	$(PYTEST) -n $(WORKERS)

# Each in an environment of its own, .venv-lowest or .venv-newest; the lowest versions need Python 3.10 to 3.12.
test-lowest test-newest: test-%:
	$(PYTHON) -m venv .venv-$*
	{ [ $* = newest ] || $(LOWEST); } > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --upgrade --editable ".[dev]" --constraint .venv-$*/constraints.txt
	.venv-$*/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

# uv keeps the versions of the file that it is given where a Python allows them, and finds others for that Python.
constraints:
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m pip freeze --exclude-editable > constraints.txt
	$(BIN)/uv pip compile setup.py --all-extras --universal --python-version 3.10 --no-annotate --quiet \
	  --custom-compile-command "make constraints" --output-file constraints.txt

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest runs build *.egg-info
