# Everything runs in .venv, which the first target that needs it makes.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROOF := $(VENV)/.tensorrt

.PHONY: demo test slow browser lint types bench clean

demo: $(READY)
	$(BIN)/rpfm-edge run recipes/demo.toml

test: $(READY) $(PROOF)
	$(BIN)/python -m pytest -m "not slow and not gpu and not browser"

slow: $(READY) $(PROOF)
	$(BIN)/python -m pytest -m "slow and not gpu"

browser: $(READY)
	$(BIN)/python -m pytest -m browser

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)
	mkdir -p runs
	$(BIN)/python -m pytest benchmarks --benchmark-json=runs/benchmarks.json

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python {}.{}: expected 3.11 or later, which constraints.txt is for; run: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.11".format(*sys.version_info))'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $(READY)

# TensorRT for RTX builds engines without a GPU: 105 MB to download, 265 MB installed.
$(PROOF): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tensorrt-rtx]'
	touch $(PROOF)

clean:
	rm -rf $(VENV) runs
