# Each target sets up what it needs. PYTHON=python3.12 make install takes another interpreter.
# Without a GPU, point pip at PyTorch's CPU wheels first (PIP_EXTRA_INDEX_URL), or several GB of CUDA libraries come along.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test soak bench lint clean-demo
install: .venv/installed

.venv/installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version)"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "making a virtual environment failed (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The whole chain on drawn images. Run it again after anything: it goes on where it was.
demo: install
	@$(BIN)/python -m skinsynth.data.phantom runs/demo-images --images 900 --seed 0
	@$(BIN)/skinsynth launch configs/demo.yaml

clean-demo:
	rm -rf runs/demo runs/demo-images shards/demo-*

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

test: install lint
	$(BIN)/python -m pytest --numprocesses 3

# Beside the peers, on this machine; NAME=stream runs one alone.
bench: install
	$(BIN)/python -m benchmarks $(NAME)

# The long campaigns, by hand.
soak: install
	$(BIN)/python -m pytest -m soak --timeout 1800
