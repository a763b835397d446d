# make quickstart: install, then the study of sweeps/quickstart.yaml.  make test: install the dev extra, run the suite.
# make studies: the studies of sweeps/ that only a longer test can run, at their smallest scale.
# make test-dist: trainings by several processes on this machine.
# TORCH: what pip installs as torch, e.g. TORCH='torch --index-url <the CPU index of pytorch.org>'
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN = .venv/bin

.PHONY: quickstart setup setup-dev test test-slurm test-dist studies lint
quickstart: setup
	$(BIN)/zexp run +sweeps=quickstart

setup: .venv/.setup

.venv/.setup: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else "zexp needs Python 3.11 or 3.12, this is " + sys.version.split()[0] + "; name one with PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e .
	touch $@

setup-dev: .venv/.setup-dev

.venv/.setup-dev: .venv/.setup
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

test: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# A real SLURM cluster on this machine, brought up by the tests: as root, with the packages that tests/slurm/cluster.py names.
# Two of them, a file of tests each: most of the time is waiting for SLURM.
test-slurm: setup-dev
	$(BIN)/python -m pytest -m "slurm and not studies" -n 2 --dist loadfile tests/slurm

test-dist: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m dist tests/train tests/study

studies: setup-dev
	$(BIN)/python -m pytest -m studies tests/studies tests/slurm

lint: setup-dev
	$(BIN)/ruff check zexp hydra_plugins tests benchmarks
	$(BIN)/mypy
