# Needs Python 3.11 or newer, git and make. Everything is installed into .venv, nothing outside it.

PYTHON ?= python3
ARGS ?=
BENCH ?=
DEVICE ?=
BIN := .venv/bin
STAMP := .venv/.stamp
DOCS_STAMP := .venv/.stamp-docs
TORCH := torch==2.13.0
CODE := igpt_lab tests $(wildcard benchmarks docs/*.py)

# uv and the interpreter should write bytecode: without it every notebook's kernel compiles torch again.
unexport PYTHONDONTWRITEBYTECODE
export UV_COMPILE_BYTECODE := 1
# A folder of wheels kept for pip serves uv as well; empty elsewhere.
export UV_FIND_LINKS := $(PIP_FIND_LINKS)

.PHONY: help reproduce test coverage lowest lab bench gpu lint lock reference docs

help:
	@echo "make reproduce   run notebooks 0 to 4 and 6 into results/mine/, compare with the shipped run   (ARGS=--all, --quick)"
	@echo "make test        run the tests                                           (ARGS='-k model' for some of them)"
	@echo "                 ARGS=\"-m 'not slow'\" leaves out the slow ones; CONTRIBUTING.md has the other markers"
	@echo "make coverage    run the tests, and list which lines of igpt_lab/ they reach"
	@echo "make lowest      run the tests with the lowest versions that pyproject.toml allows    (needs uv)"
	@echo "make lab         open JupyterLab on a copy of the notebooks in workbench/        (ARGS=FOLDER for another)"
	@echo "make bench       measure against other software, to results/mine/         (BENCH=extract for one of them)"
	@echo "make gpu         test every path on the accelerator, and measure it          (DEVICE=cpu ARGS=--quick to try it)"
	@echo "make docs        build the documentation site into build/site/"
	@echo "make lint        check style, formatting and types"
	@echo "make reference   for maintainers: replace the shipped run and the executed notebooks by those of this machine"
	@echo "make lock        write requirements.lock and docs/requirements.lock again (ARGS=--upgrade for newer versions)"
	@echo "Each installs requirements.lock into .venv first, when that is absent or out of date."
	@echo "Another interpreter: make test PYTHON=python3.12"

reproduce: $(STAMP)
	@echo "make reproduce: notebooks/ -> results/mine/"
	@$(BIN)/igpt-lab reproduce $(ARGS)

# Never part of what a user runs: it writes over files that git keeps.
reference: $(STAMP)
	@echo "make reference: notebooks/ -> results/ and notebooks/"
	@$(BIN)/igpt-lab reproduce --all --renew-reference $(ARGS)
	@$(BIN)/python docs/make_results.py

# A process a core, each of one thread; at most 8, as each takes about 1 GB of memory.
PYTEST := -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

test: $(STAMP)
	@echo "make test: pytest on tests/"
	@OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(ARGS)

# Lines that only a process of its own reaches, such as a worker or a notebook's kernel, do not count.
coverage: $(STAMP)
	@echo "make coverage: pytest on tests/, lines of igpt_lab/ -> build/coverage/index.html"
	@OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) --cov --cov-report term --cov-report html:build/coverage $(ARGS)

# In an environment of its own. torch stays the pinned one, by hand as for `lock`: of its builds the lowest is CUDA's.
lowest:
	@echo "make lowest: the lowest versions that pyproject.toml allows -> build/lowest/, pytest on tests/"
	@mkdir -p build && echo "$(TORCH)" | uv pip compile - pyproject.toml --extra test --resolution lowest-direct \
		--python "$(PYTHON)" --quiet --no-annotate --no-header --no-emit-package torch | \
		grep -vE '^(cuda|nvidia|triton)' > build/lowest.txt
	@uv venv --quiet --clear --python "$(PYTHON)" build/lowest
	@uv pip install --quiet --python build/lowest/bin/python -r build/lowest.txt "$(TORCH)" "setuptools>=77" pip
	@uv pip install --quiet --python build/lowest/bin/python --no-deps --no-build-isolation -e .
	@OMP_NUM_THREADS=1 build/lowest/bin/python $(PYTEST) $(ARGS)

lab: $(STAMP)
	@echo "make lab: JupyterLab on workbench/, stop it with Ctrl-C"
	@$(BIN)/igpt-lab lab $(ARGS)

bench: $(STAMP)
	@echo "make bench: benchmarks/ -> results/mine/benchmarks/"
	@$(BIN)/python -m benchmarks $(BENCH) $(ARGS)

# Tests with the marker gpu, then the benchmark gpu; DEVICE is by default the accelerator of this machine.
gpu: $(STAMP)
	@echo "make gpu: tests/test_gpu.py on $(or $(DEVICE),the accelerator), then benchmarks -> results/mine/benchmarks/gpu/"
	@IGPT_LAB_DEVICE=$(DEVICE) $(BIN)/python -m pytest -m gpu tests/test_gpu.py
	@IGPT_LAB_DEVICE=$(DEVICE) $(BIN)/python -m benchmarks gpu $(ARGS)

# Notebooks are shown as they are committed. A warning fails, so a broken link inside does too.
docs: $(DOCS_STAMP)
	@echo "make docs: docs/ and notebooks/ -> build/site/"
	@$(BIN)/python docs/make_results.py --check
	@$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet --conf-dir docs . build/site $(ARGS)
	@echo "make docs: open build/site/docs/index.html"

lint: $(STAMP)
	@echo "make lint: ruff check and ruff format on $(CODE), mypy on igpt_lab"
	@$(BIN)/ruff check $(CODE) $(wildcard notebooks)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/mypy

# The stamp comes last, so that an interrupted installation is done again.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "setup: Python 3.11 or newer is needed, '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | tail -1);" \
			"name another with PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setup: installing requirements.lock into .venv (once; takes minutes when packages must be downloaded)"
	@rm -rf .venv
	@$(PYTHON) -m venv .venv || { \
		echo "setup: '$(PYTHON) -m venv' failed; Debian and Ubuntu have it in the package python3-venv"; exit 1; }
	@uv=$$(command -v uv) || { $(BIN)/python -m pip install --quiet uv && uv=$(BIN)/uv; } || uv=; \
	{ [ -n "$$uv" ] && "$$uv" pip install --quiet --python $(BIN)/python -r requirements.lock; } || { \
		echo "setup: uv did not install the packages, pip does it now (slower)"; \
		$(BIN)/python -m pip install --quiet -r requirements.lock; }
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(DOCS_STAMP): $(STAMP) docs/requirements.lock
	@echo "setup: installing docs/requirements.lock into .venv (once)"
	@$(BIN)/python -m pip install --quiet --no-deps -r docs/requirements.lock
	@touch $@

# torch is put in by hand: a resolved pin would be one machine's build (+cpu), or bring the CUDA packages to all.
# Pins that still fit are kept; ARGS=--upgrade chooses the newest.
lock:
	@echo "make lock: pyproject.toml -> requirements.lock (needs uv)"
	@mkdir -p build && { cp requirements.lock build/ 2>/dev/null || true; }
	@echo "$(TORCH)" | uv pip compile - pyproject.toml --extra test --universal --python-version 3.11 --quiet \
		--fork-strategy fewest --no-annotate --no-emit-package torch --output-file build/requirements.lock $(ARGS)
	@{ echo "# Every package that pyproject.toml and its extra \`test\` need, for Python 3.11 and newer."; \
		echo "# Made again from pyproject.toml by \`make lock\`, with newer versions by \`make lock ARGS=--upgrade\`."; \
		{ grep -vE '^(#|cuda|nvidia|torch=|triton)' build/requirements.lock; echo "$(TORCH)"; } | LC_ALL=C sort; \
	} > requirements.lock
	@uv pip compile pyproject.toml --extra docs --universal --python-version 3.11 --quiet --fork-strategy fewest \
		--no-annotate --no-header --constraint requirements.lock --output-file build/docs.lock
	@{ echo "# What the extra \`docs\` of pyproject.toml needs besides requirements.lock. Made by \`make lock\`."; \
		LC_ALL=C sort build/docs.lock | grep -vE '^(cuda|nvidia|torch=|triton)' | grep -vxFf requirements.lock; \
	} > docs/requirements.lock
