#!/usr/bin/env bash
# The image's %test, at the end of a build and at `apptainer test IMAGE`: imports, a kernel, two training steps.
# Writes only below TMPDIR; needs no GPU and no network.
set -euo pipefail
# shellcheck source=environment.sh source-path=SCRIPTDIR
. /opt/bvpo/environment.sh
source=/opt/bvpo/source
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1
cd "$source"

echo "== versions"
python containers/labels.py "$source/containers/lock-$(cat /opt/bvpo/profile).txt" >"$work/labels.txt"
if ! cmp -s "$work/labels.txt" /opt/bvpo/labels.txt; then
  echo "The packages found are not the image's own:" >&2
  diff "$work/labels.txt" /opt/bvpo/labels.txt >&2 || true
  exit 1
fi
BVPO_REHEARSAL=1 bvpo doctor

echo "== imports"
# The stand-ins first, as in a rehearsal: a build node has no GPU.
BVPO_REHEARSAL=1 python - <<'PYTHON'
import megatron_bvpo.rehearsal as rehearsal

rehearsal.install()
import swift.megatron.pipelines.train.rlhf  # noqa: F401
import mcore_bridge, megatron.core, peft, torch, transformers, triton, trl  # noqa: F401, E401
import megatron_bvpo.training.pipeline  # noqa: F401

print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, GPUs {torch.cuda.device_count()}")
PYTHON
if [ "$(cat /opt/bvpo/profile)" = gpu ]; then
  if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    python -c 'import transformer_engine.pytorch, flash_attn, apex, amp_C, fused_weight_gradient_mlp_cuda'
  else
    echo "No GPU here, so Transformer Engine, flash-attn and apex were NOT imported: they need its driver."
    echo "Before the first job, on a GPU node: apptainer test --nv IMAGE"
  fi
fi

echo "== kernel (on the GPU if there is one, else in Triton's interpreter)"
python -m pytest -q -p no:cacheprovider tests/kernels/test_interface.py

echo "== rehearsal: two training steps on four CPU ranks"
CUDA_VISIBLE_DEVICES="" BVPO_REHEARSAL_DIR="$work/rehearsal" bash launch/rehearse.sh \
  --train_iters 2 --eval_steps 2 --save_steps 2 "$@" >"$work/rehearsal.log" 2>&1 || {
  tail -n 40 "$work/rehearsal.log" >&2
  exit 1
}
grep -E 'held-out +2/2' "$work/rehearsal.log"
echo "image test passed"
