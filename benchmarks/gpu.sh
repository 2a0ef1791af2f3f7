#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the kernels against float64, the log-prob benchmark with its peers, and
# whole steps where ms-swift and Transformer Engine are installed. Tables go to benchmarks/results/.
#
#   benchmarks/gpu.sh
#   STEP_FLAGS="--ranks 8 --flags …"  # more arguments for benchmarks/step.py
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device is visible"' || exit 2
failed=0
python -m pytest -q tests/kernels || failed=1
python benchmarks/logprob.py --out benchmarks/results || failed=1
if python -c 'import swift.megatron, transformer_engine' 2>/dev/null; then
  # shellcheck disable=SC2086
  python benchmarks/step.py ${STEP_FLAGS:-} || failed=1
else
  echo "Whole steps are not measured: ms-swift's Megatron backend or Transformer Engine is not installed."
fi
exit "$failed"
