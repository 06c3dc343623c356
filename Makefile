# Every target sets up what it needs: a fresh machine needs Python 3.11 or newer, and make.
# PYTHON: the newest supported one that runs (version managers leave commands that only print an
# error) and can make an environment (Debian's lacks ensurepip); `make PYTHON=PATH` any other.
ifndef PYTHON
PYTHON := $(or $(shell for python in python3.13 python3.12 python3.11; do \
  $$python -c 'import ensurepip, venv' >/dev/null 2>&1 && echo $$python && break; done),python3)
endif
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed
LOCKED := 3.11 3.13
SMOKE := $(BIN)/python -m convex_jax.main --config=configs/mixer_ioc.py:digits \
  --workdir=runs/smoke --config.steps=20

.PHONY: train test smoke test-slow test-aot parity lint docs wheel lock

train: $(INSTALLED)  ## A convex Mixer on real digits, under a minute on two cores.
	$(BIN)/python -m convex_jax.main --config=configs/mixer_ioc.py:digits

test: $(INSTALLED)  ## The default tests, about ten minutes on two cores.
	$(BIN)/python -m pytest

smoke: $(INSTALLED)  ## Trains for a moment, resumes, certifies.
	rm -rf runs/smoke
	$(SMOKE) --config.time_limit=1e-4; test $$? = 75
	$(SMOKE)
	$(BIN)/python -m convex_jax certify --workdir=runs/smoke

test-slow: $(INSTALLED)  ## The tests that the default leaves out; the wheel's are among them.
	$(BIN)/python -m pytest -m slow --ignore=tests/models/test_parity.py

# In a folder of its own: JAX would look for the devices of what is in the environment.
test-aot: $(INSTALLED)  ## Programs compile for TPUs and GPUs; installs their compilers, 1.5 GB.
	$(PIP) install --no-deps --upgrade --target .aot $$($(BIN)/python -m tests.support.compilers)
	PYTHONPATH=.aot $(BIN)/python -m pytest -m slow -n 1 tests/training/test_compile_ahead.py

parity: $(INSTALLED)  ## Against timm, torchvision and OTT-JAX; installs them, gigabytes.
	$(PIP) install --editable '.[parity]'
	$(BIN)/python -m pytest -m '' --dist load tests/models/test_parity.py tests/proof/test_ott.py

lint: $(INSTALLED)  ## Style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(INSTALLED)  ## The documentation site, in docs/_build/html; a warning is an error.
	$(PIP) install --editable '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

wheel: $(INSTALLED)  ## The source archive and the wheel, in dist/, checked as PyPI does.
	rm -rf build dist
	$(PIP) install build twine
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# Python 3.11 and 3.13 get exactly the locked versions; another the newest that setup.cfg allows.
$(INSTALLED): setup.cfg pyproject.toml $(LOCKED:%=requirements-%.lock)
	@$(PYTHON) -c 'import sys; sys.exit("make: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11 $(MAKECMDGOALS)" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	lock=$$($(BIN)/python -c 'import sys; print("requirements-%d.%d.lock" % sys.version_info[:2])'); \
	if test -f $$lock; then $(PIP) install -r $$lock; fi
	$(PIP) install --editable '.[train,test,notebooks]'
	touch $(INSTALLED)

lock: $(INSTALLED)  ## Renews the lock files, keeping the versions that still fit.
	$(PIP) install uv
	for version in $(LOCKED); do \
	  $(BIN)/uv pip compile setup.cfg --extra train --extra test --extra notebooks --no-header \
	    --no-annotate --python-version $$version --output-file requirements-$$version.lock \
	    || exit; done
