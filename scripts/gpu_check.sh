#!/usr/bin/env bash
# Everything that needs a CUDA machine, in one call of at most nine minutes, in parts that can be called alone:
#
#     scripts/gpu_check.sh OUT [--only ops,step] [--commit ID]        (PYTHON=python3 to choose the interpreter)
#
# What the parts are and what OUT gets: scripts/gpu_check.py.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
