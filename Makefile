# Three commands do everything on a machine with Python, pip and make: `make quickstart`, `make finetune`, `make test`.
PYTHON ?= python3
VENV ?= .venv
# the versions to install, and more for pip
CONSTRAINTS ?= constraints.txt
PIP ?=
BIN = $(VENV)/bin
# bf16 where the CPU knows it: without AVX-512 it is emulated, ten times slower
PRECISION ?= $(shell grep -q avx512 /proc/cpuinfo 2>/dev/null && echo bf16 || echo no)

.PHONY: quickstart finetune test test-lowest test-tomorrow pytest lint slow docs dist clean

# The virtual environment, installed from the package index under the tested versions of constraints.txt.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@echo 'Installing into $(VENV): about 6 GB, several minutes.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) $(PIP) --editable '.[test]'
	touch $@

# Two classifiers from scratch on real photos, compared: minutes on two CPU cores. Run it again to continue.
quickstart: $(VENV)/installed
	$(BIN)/mixup-recipes prepare groceries
	$(BIN)/python train_mixup.py --recipe quickstart_vanilla --output_dir runs/quickstart_vanilla --mixed_precision $(PRECISION) --resume_from_checkpoint auto
	$(BIN)/python train_mixup.py --recipe quickstart_cutmix --output_dir runs/quickstart_cutmix --mixed_precision $(PRECISION) --resume_from_checkpoint auto
	$(BIN)/mixup-recipes report runs/quickstart_vanilla runs/quickstart_cutmix --out runs/quickstart

# From a folder of photos to a tested classifier, its report, predictions and a file for a phone. The photos of the test
# split are scored once, at the end. Run it again to continue.
finetune: $(VENV)/installed runs/groceries
	$(BIN)/mixup-recipes prepare efficientnet_lite0
	$(BIN)/mixup-recipes train --recipe finetune_resizemix --dataset runs/groceries/train --image_size 160 --freeze blocks.2 --epochs 6 --output_dir runs/finetune --resume_from_checkpoint auto
	$(BIN)/mixup-recipes evaluate runs/finetune --dataset runs/groceries --split test
	$(BIN)/mixup-recipes report runs/finetune --out runs/finetune-report
	$(BIN)/mixup-recipes predict runs/finetune runs/groceries/test --out runs/finetune-predictions.csv
	$(BIN)/mixup-recipes export runs/finetune --out runs/finetune.onnx

runs/groceries: | $(VENV)/installed
	$(BIN)/mixup-recipes prepare groceries --folder $@

# Style, types, and every test that takes no more than seconds. A test has one thread, so each core gets a process (four
# at most: each holds torch and starts runs of its own); who is done first takes over tests from the end of the others.
test: lint pytest

pytest: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not gpu" -n auto --maxprocesses 4 --dist worksteal

# The same tests with the lowest versions.
test-lowest:
	$(MAKE) pytest VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

# The same tests with pre-releases of all that has some.
test-tomorrow:
	$(MAKE) pytest VENV=.venv-tomorrow CONSTRAINTS=/dev/null PIP=--pre

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tests that take minutes: all cells, named options of mixers, launchers, kills beside those that `make test` has.
slow: $(VENV)/installed
	$(BIN)/python -m pytest -q -m slow

# The documentation site, from the pages in docs/ and the docstrings: build/site/index.html. A warning or a link that
# leads nowhere fails; build/site-links.txt lists the links to other hosts, which are not asked.
docs: $(VENV)/docs-installed
	$(BIN)/python -m website build/site

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) $(PIP) --editable '.[docs]'
	touch $@

# What a release uploads, checked: a wheel and a source archive in build/dist.
dist: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP) build twine
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist
	$(BIN)/twine check --strict build/dist/*

clean:
	rm -rf $(VENV) .venv-lowest .venv-tomorrow build *.egg-info
