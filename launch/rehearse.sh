#!/usr/bin/env bash
# The whole stack on a CPU: makes a tiny Qwen3 mixture of experts and preference rows, trains BVPO on four
# ranks (TP2 · PP2 · EP2, LoRA), and shows what was learnt. Does its own set-up. Arguments are added to the
# training command.
#
#   BVPO_REHEARSAL_DIR     where models, rows and runs go (default: .rehearsal in the checkout)
#   BVPO_REHEARSAL_VOCAB   trimmed (default: 1,003 words) or real (Qwen's 151,936: the head then takes most of the time)
set -euo pipefail
started=$SECONDS
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
bvpo_environment
work="${BVPO_REHEARSAL_DIR:-$BVPO_ROOT/.rehearsal}"
mkdir -p "$work"

export BVPO_REHEARSAL=1 OMP_NUM_THREADS=1 NPROC_PER_NODE=4
MASTER_PORT="${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}"
export MASTER_PORT

python -m megatron_bvpo.rehearsal.prepare "$work" --vocab "${BVPO_REHEARSAL_VOCAB:-trimmed}"
echo "Ready after $((SECONDS - started)) s; training."
run="$work/run-$(date +%Y%m%d-%H%M%S)"

swift rlhf "$BVPO_ROOT/configs/rehearsal.yaml" \
  --rlhf_type bvpo --megatron \
  --model "$work/model" \
  --dataset "$work/train.jsonl" --val_dataset "$work/heldout.jsonl" \
  --output_dir "$run" --add_version false "$@" 2>&1 | tee "$work/last.log" | bvpo report --follow

bvpo report "$run"
echo "All done in $((SECONDS - started)) s."
