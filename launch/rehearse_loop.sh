#!/usr/bin/env bash
# The whole loop on a CPU: a small reasoner answers with thinking and without (vLLM), is judged, learns from its own
# pairs (TP2 · PP2, LoRA, α estimated), answers again, learns again; then all three models are asked questions that are
# fresh to them, and one page tells it all. Does its own set-up. Stopped at any moment, the same command goes on.
#
#   launch/rehearse_loop.sh [--flag …]     flags of `bvpo rounds`, such as --dry-run
#
#   BVPO_REHEARSAL_DIR   where everything goes (default: .rehearsal in the checkout; its folder `loop`)
#   BVPO_VLLM_PYTHON     the Python of an environment with vLLM for CPUs; empty: tests/engine/environment.sh makes one
#                        where it can be had (3.5 GB), else ms-swift's own server answers, which is slower
set -euo pipefail
started=$SECONDS
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
