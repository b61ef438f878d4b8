# `make train` and `make test` each set themselves up: Python 3.10 to 3.14, git and make are enough.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: help install train test slow claims figures clean

help:           ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 12

install: .venv/.installed   ## make .venv and install the dependencies

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than 3.10; name another: make PYTHON=python3.12 ..."; exit 2; }
	@$(PYTHON) -m venv .venv || \
		{ echo "$(PYTHON) cannot make a virtual environment;" \
			"on Debian and Ubuntu: apt install python3-venv"; exit 2; }
	@echo "installing dependencies into .venv (PyTorch is large: a minute or more)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

train: install  ## the default run: the four stages on generated clips, into runs/default
	$(RUN) train.py

test: install   ## the quick test suite
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 8 --dist loadfile

slow: install   ## the tests that take minutes
	$(RUN) -m pytest -m slow

claims: install  ## the paper's claims in miniature, one to three hours; SEEDS=1 for one seed
	$(RUN) tools/claims.py --seeds $(or $(SEEDS),5)

figures: install  ## the figures of README.md and docs/ from runs/default and runs/claims
	$(RUN) tools/figures.py

clean:          ## remove runs and the environment
	rm -rf .venv runs *.egg-info .pytest_cache
