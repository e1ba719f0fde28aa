#!/usr/bin/env bash
# Everything that needs a CUDA machine, within a budget of seconds:
#
#     scripts/gpu_check.sh OUT [--call 1|2 | --only PART,PART] [--seconds N] [--commit ID] [--after FIRST]
#
# PYTHON=python3 chooses the interpreter. docs/gpu.md says what to do before, between and after the calls.
# What the parts are and what OUT gets: scripts/gpu_check.py.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
