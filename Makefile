# Each target is a line or two that a person could type. Needs Python 3.11 or later, make and git.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: install install-dev install-parity demo test test-all commands devices faults parity slurm lint bench clean

install: $(VENV)/installed            ## make the environment: exact pins, then normlab itself

$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "normlab needs Python 3.11 or later, not " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

install-dev: $(VENV)/installed-dev    ## the same, with what tests and lint need

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

install-parity: $(VENV)/installed-parity  ## the same, with PyTorch, timm, Keras and dm-haiku

$(VENV)/installed-parity: $(VENV)/installed-dev requirements-parity.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-parity.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps timm==1.0.31  # no hub client
	@touch $@

demo: install                         ## compare six normalizers on digits, three settings, three seeds
	$(BIN)/normlab compare configs/digits.py --workdir=runs/demo --seeds=3 \
	  --norms=none,batch_norm,layer_norm,group_norm,instance_norm,batch_renorm \
	  --setting='lr 0.1:' --setting='lr 0.5:optim.base_lr=0.5' \
	  --setting='batch of 1:batch_stats.scope=ghost,batch_stats.ghost_size=1'

test: install-dev                     ## the fast tests
	$(BIN)/python -m pytest -m 'not slow and not commands and not devices and not faults and not slurm and not parity' -n auto

test-all: install-dev                 ## all tests; NORMLAB_DATA=DIR adds those on CIFAR-10 and MNIST
	$(BIN)/python -m pytest -n auto

commands: install-dev                 ## the README's commands, and what else a user types
	$(BIN)/python -m pytest -m 'commands and not slow' -n auto

devices: install-dev                  ## every layout: eight virtual devices, several processes
	$(BIN)/python -m pytest -m 'devices and not slow' -n auto

faults: install-dev                   ## what happens to a run when something breaks
	$(BIN)/python -m pytest -m 'faults and not slow' -n auto

parity: install-parity                ## agreement with PyTorch, timm, Keras, flax.linen and dm-haiku
	$(BIN)/python -m pytest -m parity tests/parity -n auto

slurm: install-dev                    ## sweeps on a SLURM of one node, started here; as root
	$(BIN)/python -m pytest -m 'slurm and not slow' tests/launchers -n 0

lint: install-dev                     ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install                        ## a training step against plain Flax (and PyTorch if installed), and the usual normalizers
	$(BIN)/python scripts/bench_step.py
	$(BIN)/normlab bench norms --norms=batch_norm,layer_norm,rms_norm,group_norm,instance_norm

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
