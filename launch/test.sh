#!/usr/bin/env bash
# Runs the tests; does its own set-up. Arguments go to pytest.
set -euo pipefail
BVPO_EXTRAS="rehearsal,test"
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
bvpo_environment
cd "$BVPO_ROOT"
export OMP_NUM_THREADS=1
# Two files at a time: start-up is most of a run's time, and it uses one core.
exec python -m pytest -q -n 2 --dist loadfile --durations 15 "$@"
