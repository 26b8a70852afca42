# Two commands do everything on a machine with Python, pip and make: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: quickstart test lint slow clean

# The virtual environment, installed from the package index under the tested versions of constraints.txt.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo 'Installing into $(VENV): about 6 GB, several minutes.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

# Two classifiers from scratch on real photos, compared: minutes on two CPU cores. Run it again to continue.
quickstart: $(VENV)/installed
	$(BIN)/mixup-recipes prepare groceries
	$(BIN)/python train_mixup.py --recipe quickstart_vanilla --output_dir runs/quickstart_vanilla --resume_from_checkpoint auto
	$(BIN)/python train_mixup.py --recipe quickstart_cutmix --output_dir runs/quickstart_cutmix --resume_from_checkpoint auto
	$(BIN)/mixup-recipes report runs/quickstart_vanilla runs/quickstart_cutmix --out runs/quickstart

# Style, types, and every test that takes no more than seconds. A test has one thread, so each core gets a process (four
# at most: each holds torch and starts runs of its own); who is done first takes over tests from the end of the others.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not gpu" -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tests that take minutes.
slow: $(VENV)/installed
	$(BIN)/python -m pytest -q -m slow

clean:
	rm -rf $(VENV) build *.egg-info
