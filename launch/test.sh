#!/usr/bin/env bash
# Runs the tests; does its own set-up. Arguments go to pytest.
set -euo pipefail
BVPO_EXTRAS="rehearsal,test"
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
bvpo_environment
cd "$BVPO_ROOT"
export OMP_NUM_THREADS=1
if [ $# -gt 0 ]; then
  exec python -m pytest -q "$@"
fi
# What runs in one process goes two files at a time; ranks would only wait for each other.
failed=0
python -m pytest -q -n 2 --dist loadfile tests/unit tests/contracts tests/kernels || failed=$?
python -m pytest -q --durations 12 tests/distributed || failed=$?
exit "$failed"
