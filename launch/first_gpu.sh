#!/usr/bin/env bash
# The first minutes on GPUs: a tiny mixture with the real Transformer Engine and NCCL against plain PyTorch's numbers,
# every fusion against a run without it, an expert rank without tokens, a resume. docs/first-gpu-run.md.
#
#   launch/first_gpu.sh [--ranks 1] [--only PREFIX…] [--out FOLDER]       --help lists the options
#   launch/first_gpu.sh --cpu                                             rehearses on four CPU ranks
#
#   BVPO_PYTHON_BIN   the Python of the environment with ms-swift (python3 of an active environment or of .venv)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ -z "${BVPO_IN_IMAGE:-}" ] || unset PYTHONPATH PYTHONHOME
for python in "${BVPO_PYTHON_BIN:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "$root/.venv/bin/python" python3; do
  [ -n "$python" ] && command -v "$python" >/dev/null && break
done
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONNOUSERSITE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m benchmarks.first_gpu "$@"
