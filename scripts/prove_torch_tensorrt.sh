#!/usr/bin/env bash
# Builds the engines of student:xs with torch-tensorrt on a machine without a GPU, in an environment of its own (6 GB).
#   scripts/prove_torch_tensorrt.sh [ENVIRONMENT]     # default runs/torch_tensorrt; kept, so a second run only tests
# PYTHON: the interpreter of the environment; TEST_PYTHON: one with rpfm-edge[distill] and pytest, default .venv
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${1:-runs/torch_tensorrt}
python=${PYTHON:-python3}
ready=$environment/.ready
if [ ! -e "$ready" ]; then
    "$python" -m venv "$environment"
    install=("$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir)
    "${install[@]}" torch==2.14.1 tensorrt_rtx==1.6.1.120 torch-tensorrt-rtx==2.14.0 accelerate -e .
    touch "$ready"
fi
RPFM_EDGE_TORCH_TENSORRT_PYTHON=$environment/bin/python \
    "${TEST_PYTHON:-.venv/bin/python}" -m pytest -m slow -s tests/runtimes/test_torch_tensorrt.py
