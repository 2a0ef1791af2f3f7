#!/usr/bin/env bash
# Trains on one node or on many: the same command on every node, each with its own NODE_RANK. First a preflight of
# all nodes, then ms-swift under torchrun, watched over. slurm.sbatch calls this on every node.
#
#   launch/train.sh configs/FILE.yaml [--flag value …]
#
# Every variable has a default for one node; under srun the first five come from Slurm.
#
#   NNODES           number of nodes                              (1)
#   NODE_RANK        this node, from 0                            (0; needed with more nodes)
#   MASTER_ADDR      address of node 0 that all nodes reach       (127.0.0.1; needed with more nodes)
#   MASTER_PORT      this port and the next one are used on it    (29500)
#   NPROC_PER_NODE   ranks a node, one for each GPU               (the GPUs that nvidia-smi lists)
#   BVPO_RUN_DIR     folder of checkpoints and logs, on a disk that all nodes share
#                                                                 (--output_dir, else runs/<name of the YAML file>)
#   BVPO_DATA_CACHE  folder of the rows as they are read and encoded, on a disk that all nodes share
#                                                                 (data-cache in BVPO_RUN_DIR)
#   BVPO_RESUME      auto: go on from last-checkpoint in that folder, never: begin anew       (auto)
#   BVPO_PREFLIGHT   1: check all nodes first, 0: do not, only: check and end                 (1)
#   BVPO_PREFLIGHT_SECONDS, BVPO_MIN_FREE_GIB, BVPO_MIN_BUSBW_GBS, BVPO_SHARED_FOLDERS        (`bvpo preflight --help`)
#   BVPO_NODE_SILENCE_S   seconds without a word from a node until the job ends               (60)
#   BVPO_PYTHON_BIN  the Python of the environment with ms-swift  (python3 of an active environment or of .venv)
#
# Exit codes: 0 finished; 75 stopped on request and saved (start the same command again to go on); 76 a node was
# lost; 3 the preflight found a problem; 2 a mistake in flags or settings; anything else: the run failed.
# To stop: touch <run folder>/stop, or send SIGUSR1 or SIGTERM to this script.
set -euo pipefail

fail() {
  echo "train.sh: $*" >&2
  exit 2
}

[ $# -gt 0 ] || fail "no run given; usage: launch/train.sh configs/FILE.yaml [--flag value …]"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

remedy="run launch/rehearse.sh once, which makes .venv, or set BVPO_PYTHON_BIN (a Python with ms-swift) or BVPO_IMAGE (slurm.sbatch)"
has_packages() { # looks and imports nothing: torch alone would take seconds
  "$1" -c 'import sys; from importlib.util import find_spec as f; sys.exit(not all(map(f, ("torch", "swift", "yaml"))))' \
    2>/dev/null
}

find_python() {
  local candidate
  for candidate in "${BVPO_PYTHON_BIN:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "$root/.venv/bin/python" python3; do
    [ -n "$candidate" ] || continue
    if ! command -v "$candidate" >/dev/null; then
      [ "$candidate" != "${BVPO_PYTHON_BIN:-}" ] || fail "BVPO_PYTHON_BIN: there is no $candidate on this node"
    elif has_packages "$candidate"; then
      command -v "$candidate"
      return 0
    elif [ "$candidate" = "${BVPO_PYTHON_BIN:-}" ]; then
      fail "BVPO_PYTHON_BIN: $candidate has no torch or no ms-swift; $remedy"
    fi
  done
  fail "no Python with torch and ms-swift found on this node; $remedy"
}

count_gpus() {
  if [ "${BVPO_REHEARSAL:-0}" = 1 ] || ! command -v nvidia-smi >/dev/null; then
    fail "NPROC_PER_NODE is not set and there is no GPU to count; set it to the number of ranks a node"
  fi
  local listed
  listed="$(nvidia-smi --list-gpus 2>&1)" ||
    fail "NPROC_PER_NODE is not set and nvidia-smi fails ($(head -n 1 <<<"$listed")); drain the node, or set NPROC_PER_NODE"
  grep -c '^GPU ' <<<"$listed" || fail "NPROC_PER_NODE is not set and nvidia-smi lists no GPU; ask the scheduler for GPUs"
}

[ -z "${BVPO_IN_IMAGE:-}" ] || unset PYTHONPATH PYTHONHOME   # the host's, which an image does not have
export PYTHONNOUSERSITE=1                                   # $HOME's own packages would hide the environment's
export PYTHONSAFEPATH=1                                     # and so would a module in the current folder
python="$(find_python)"
export NNODES="${NNODES:-${SLURM_NNODES:-1}}"
export NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-}}"
[ "$NNODES" != 1 ] || NODE_RANK="${NODE_RANK:-0}"
export MASTER_ADDR="${MASTER_ADDR:-}"
export MASTER_PORT="${MASTER_PORT:-29500}"
if [ -z "${NPROC_PER_NODE:-}" ]; then
  NPROC_PER_NODE="$(count_gpus)"
fi
export NPROC_PER_NODE
export BVPO_ATTEMPT="${BVPO_ATTEMPT:-${SLURM_JOB_ID:+slurm-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}}}"
export BVPO_RUN_TOKEN="${BVPO_RUN_TOKEN:-${BVPO_ATTEMPT:-}}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"        # a checkout works without being installed

bvpo() {
  "$python" -c 'import sys; from megatron_bvpo.cli import bvpo; sys.exit(bvpo())' "$@"
}

case "${BVPO_PREFLIGHT:-1}" in
  0) ;;
  1 | only) bvpo preflight -- "$@" ;;
  *) fail "BVPO_PREFLIGHT is '$BVPO_PREFLIGHT'; expected 1, 0 or only" ;;
esac
[ "${BVPO_PREFLIGHT:-1}" != only ] || exit 0

# exec: signals for this script go to the supervisor.
exec "$python" -c 'import sys; from megatron_bvpo.cli import bvpo; sys.exit(bvpo())' supervise -- "$@"
