# Every target sets up what it needs: a fresh machine needs Python 3.11 or newer, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed

.PHONY: train test test-slow test-aot parity lint docs wheel lock

train: $(INSTALLED)  ## A convex Mixer on real digits, under a minute on two cores.
	$(BIN)/python -m convex_jax.main --config=configs/mixer_ioc.py:digits

test: $(INSTALLED)  ## The default tests, a few minutes.
	$(BIN)/python -m pytest

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

# Python 3.11 gets exactly the locked versions; a newer one the newest that setup.cfg allows.
$(INSTALLED): setup.cfg pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("make: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11 $(MAKECMDGOALS)" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; \
	then $(PIP) install -r requirements.lock; fi
	$(PIP) install --editable '.[train,test,notebooks]'
	touch $(INSTALLED)

lock: $(INSTALLED)  ## Renews requirements.lock, keeping the versions that still fit; Python 3.11.
	$(PIP) install uv
	$(BIN)/uv pip compile setup.cfg --extra train --extra test --extra notebooks \
	  --python-version 3.11 --no-header --no-annotate --output-file requirements.lock
