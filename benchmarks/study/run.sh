#!/usr/bin/env bash
# Does it help? The whole study from nothing, on a CPU; goes on where it was stopped. Does its own set-up.
#
#   benchmarks/study/run.sh            about three hours on two cores; tables, plots and report to benchmarks/results/study
#   benchmarks/study/run.sh --quick    all of it at sizes that mean nothing, in minutes; to output/study-quick
#   benchmarks/study/run.sh --help     more
set -euo pipefail
# shellcheck source=../../launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../launch/env.sh"
bvpo_environment
cd "$BVPO_ROOT"
# Runs share the cores, one each. Nothing is asked of a hub.
export OMP_NUM_THREADS=1 BVPO_REHEARSAL=1 HF_HUB_OFFLINE=1
exec python -m benchmarks.study "$@"
