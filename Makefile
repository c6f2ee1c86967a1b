# make serve: install into .venv, build the kernels, serve the demo model on 127.0.0.1:8188
# make test:  everything CI runs
# make kernels-cuda: compile the CUDA kernels (needs nvcc, and no GPU)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find fdserve kernels -type f -not -name '*.pyc' -not -name '*.so' -not -name '*.o') \
	setup.py pyproject.toml MANIFEST.in
ARGS ?=

.PHONY: serve test kernels-cuda clean

serve: $(VENV)/installed
	$(BIN)/python -m fdserve $(ARGS)

test: $(VENV)/tox
	$(BIN)/python -m tox run

kernels-cuda: $(VENV)/installed
	$(BIN)/python kernels/cuda/build.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' \
		|| { echo "fdserve needs Python 3.10, 3.11 or 3.12: say which by make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	@echo "installing fdserve into $(VENV) and building its kernels: a minute or two"
	$(BIN)/python -m pip install --quiet '.[cpu]'
	@touch $@

$(VENV)/tox: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet 'tox>=4.20'
	@touch $@

clean:
	rm -rf $(VENV) .tox build dist *.egg-info
	find fdserve -name '*.so' -delete
