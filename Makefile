# make demo       real cells -> corpus -> pretraining -> checkpoint -> embeddings
# make test       everything that needs the core install (two cores: < 12 min)
# make test-full  also slow tests and optional readers; reported with every
#                 finished piece of work
# Each makes its own .venv on first use; nothing else has to be set up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FULL := $(VENV)/.installed-full
DATA ?=
SPECIES ?= auto
OUT ?= demo_output
JOBS ?= 2
# XLA asks for its temporaries anew at every step on a CPU; huge pages save most
# of the time that this costs (glibc 2.35 and newer, elsewhere without effect).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-full lint format clean

demo: $(STAMP)
	$(BIN)/genecompass demo -o $(OUT) $(if $(DATA),--data $(DATA) --species $(SPECIES))

test: $(STAMP) lint
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-full: $(FULL) lint
	$(BIN)/python -m pytest -n $(JOBS) --durations=15

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One environment for all three. It is made again when the requirements change.
# Compatible mode: a folder of the package's name on the path, such as the clone
# seen from above, does not hide the package.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...'; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt \
	  --config-settings editable_mode=compat -e '.[test]'
	touch $(STAMP)

# The optional readers, Beam and gensim, in the same environment.
$(FULL): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt \
	  --config-settings editable_mode=compat -e '.[test,full]'
	touch $(FULL)

clean:
	rm -rf $(OUT) build *.egg-info
