#!/usr/bin/env bash
# The image's %runscript: the swift route. `apptainer run IMAGE rlhf run.yaml` is `swift rlhf run.yaml`.
set -euo pipefail
case "${1:-}" in
  "")
    echo "Say what to run: rlhf run.yaml (= swift rlhf run.yaml), or one of: swift, megatron, bvpo, torchrun, python." >&2
    echo "Examples: apptainer run-help IMAGE" >&2
    exit 2
    ;;
  swift | megatron | bvpo | torchrun | python) exec "$@" ;;
  *) exec swift "$@" ;;
esac
