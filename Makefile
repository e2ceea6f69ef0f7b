# make demo       real cells -> corpus -> pretraining -> checkpoint -> embeddings;
#                 DATA=my.h5ad SPECIES=mouse: of your own; ARGS: any other flag of
#                 `genecompass demo`, such as ARGS='--label timepoint'
# make env        the environment alone: source .venv/bin/activate
# make test       everything that needs the core install (two cores: 16 min)
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
ARGS ?=
JOBS ?= 2
# XLA asks for its temporaries anew at every step on a CPU; huge pages save most
# of the time that this costs (glibc 2.35 and newer, elsewhere without effect).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo env test test-full lint format clean

demo: $(STAMP)
	$(BIN)/genecompass demo -o $(OUT) $(if $(DATA),--data $(DATA) --species $(SPECIES)) $(ARGS)

env: $(STAMP)

# The tests of a file run in one worker: what they share is made once.
test: $(STAMP) lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

test-full: $(FULL) lint
	GENECOMPASS_LIBTPU=$(CURDIR)/$(VENV)/plan/libtpu/libtpu.so \
	  GENECOMPASS_CUDA=$(CURDIR)/$(VENV)/plan-gpu \
	  $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations=15

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One environment for all three. It is made again when the requirements change.
# Compatible mode: a folder of the package's name on the path, such as the clone
# seen from above, does not hide the package. Its warning that setuptools may end
# it one day is for us, not for a user.
QUIETLY := PYTHONWARNINGS='ignore:Compat editable'
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...'; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing into $(VENV): a minute or more, 1.7 GB, silently'
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(QUIETLY) $(BIN)/python -m pip install --quiet -c constraints.txt \
	  --config-settings editable_mode=compat -e '.[test]'
	@touch $(STAMP)

# The optional readers, Beam and gensim, in the same environment. The compilers of
# plans stand apart: where JAX can import one, every process looks for its devices.
$(FULL): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt \
	  --config-settings editable_mode=compat -e '.[test,full]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps \
	  --upgrade --target $(VENV)/plan libtpu
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps \
	  --upgrade --target $(VENV)/plan-gpu jax-cuda12-plugin jax-cuda12-pjrt \
	  nvidia-cuda-nvcc-cu12
	touch $(FULL)

clean:
	rm -rf $(OUT) build *.egg-info
