# Set-up is part of every target: a fresh machine needs Python 3.11 or newer, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: train test test-slow parity lint lock

train: $(INSTALLED)  ## A convex Mixer on real digits, about a minute on two cores.
	$(BIN)/python -m convex_jax.main --config=configs/mixer_ioc.py:digits

test: $(INSTALLED)  ## The default tests, a few minutes.
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)  ## The tests that the default leaves out.
	$(BIN)/python -m pytest -m slow --ignore=tests/test_parity.py

parity: $(INSTALLED)  ## Every architecture against timm or torchvision; installs them, gigabytes.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[parity]'
	$(BIN)/python -m pytest -m '' --dist load tests/test_parity.py

lint: $(INSTALLED)  ## Style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Python 3.11 gets exactly the locked versions; a newer one what setup.cfg allows.
$(INSTALLED): setup.cfg pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("make: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; cure: make PYTHON=python3.11 $(MAKECMDGOALS)" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; \
	then $(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock; fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,notebooks]'
	touch $(INSTALLED)

lock: $(INSTALLED)  ## Renews requirements.lock; run with Python 3.11.
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile setup.cfg --extra test --extra notebooks --python-version 3.11 \
	  --no-header --no-annotate --output-file requirements.lock
