#!/usr/bin/env bash
# Everything that needs a GPU, in ten minutes on one: benchmarks/METHOD.md. --help lists the options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ! nvidia-smi -L >/dev/null 2>&1; then export TRITON_INTERPRET=1; fi # only --tiny runs without a GPU
exec python3 -m benchmarks.gpu "$@"
