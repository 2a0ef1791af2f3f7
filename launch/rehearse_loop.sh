#!/usr/bin/env bash
# The whole loop on a CPU: a small reasoner answers with thinking and without (vLLM), is judged, learns from its own
# pairs (TP2 · PP2, LoRA, α estimated), answers again, learns again; then all three models are asked questions that are
# fresh to them, and one page tells of it. Does its own set-up. Stopped at any moment, the same command goes on.
# Arguments are added to `bvpo rounds configs/rehearsal_rounds.yaml`.
#
#   BVPO_REHEARSAL_DIR   where everything goes (default: .rehearsal in the checkout): its folder `loop`
#   BVPO_VLLM_PYTHON     the Python of an environment with vLLM for CPUs. Empty: tests/engine/environment.sh makes one
#                        where that can be (3.5 GB), else ms-swift's own server answers fewer questions
#   BVPO_LOOP_ENGINE     vllm or swift, to choose
set -euo pipefail
started=$SECONDS
export BVPO_EXTRAS="${BVPO_EXTRAS:-rehearsal,workflow}"
# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
bvpo_environment
work="$(realpath -m "${BVPO_REHEARSAL_DIR:-$BVPO_ROOT/.rehearsal}")/loop"
mkdir -p "$work"

# ---- the engine
engine="${BVPO_LOOP_ENGINE:-vllm}"
if [ "$engine" = vllm ] && [ -z "${BVPO_VLLM_PYTHON:-}" ]; then
  if why="$("$BVPO_ROOT/tests/engine/environment.sh" --needs)" &&
    BVPO_VLLM_PYTHON="$("$BVPO_ROOT/tests/engine/environment.sh")"; then
    export BVPO_VLLM_PYTHON
  else
    echo "No vLLM for CPUs${why:+: it $why}; ms-swift's own server answers."
    engine=swift
  fi
fi
if [ "$engine" = swift ]; then
  # It answers one request at a time, as each has a seed of its own.
  # shellcheck disable=SC2016  # for the shell that starts it
  export BVPO_ENGINE_COMMAND='exec swift deploy --model "$BVPO_ENGINE_MODEL" --served_model_name "$BVPO_ENGINE_NAME" \
    --model_type qwen3 --template qwen3 --torch_dtype float32 --infer_backend transformers \
    --host 127.0.0.1 --port "$BVPO_ENGINE_PORT" --log_interval -1'
  prompts=60 questions=40
else
  prompts=400 questions=200
fi
# A CPU's vLLM takes 4 GiB for keys and values otherwise. Nothing is asked of a hub.
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1

python -m megatron_bvpo.rehearsal.loop_files "$work" "$prompts" "$questions"
echo "Ready after $((SECONDS - started)) s; the rounds begin."
cd "$work"
BVPO_REHEARSAL=1 OMP_NUM_THREADS=1 bvpo rounds "$BVPO_ROOT/configs/rehearsal_rounds.yaml" "$@"
page="$work/rounds/rounds.html"
if [ -e "$page" ] && browser="$(command -v chromium || command -v chromium-browser || command -v google-chrome)"; then
  # --no-sandbox: for root, as in a container. The page fetches nothing.
  "$browser" --headless=new --no-sandbox --disable-gpu --hide-scrollbars --window-size=1280,1000 \
    --screenshot="${page%.html}.png" "file://$page" >/dev/null 2>&1 && echo "Picture: ${page%.html}.png"
fi
echo "All done in $((SECONDS - started)) s."
