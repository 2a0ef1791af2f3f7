#!/usr/bin/env bash
# Runs the tests; does its own set-up, but for a browser: without Chromium (Debian: apt-get install chromium) the tests of
# the report's page are skipped.
#
#   launch/test.sh              what CI runs
#   launch/test.sh ARGUMENTS…   pytest with these arguments
#   launch/test.sh --vllm       a real engine: installs vLLM for CPUs into an environment of its own, samples, judges,
#                               pairs, trains, exports, serves and evaluates (tests/engine, or the arguments that follow)
#   launch/test.sh --all        everything: whole matrices, a real Slurm, network namespaces, a real engine, a real
#                               image (hours).
#                               Says what it left out and why. What has passed for these very files is not run again,
#                               so a go that was stopped goes on where it was (.test-progress/ keeps the names).
set -euo pipefail
BVPO_EXTRAS="evalscope,rehearsal,test,workflow"
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
bvpo_environment
cd "$BVPO_ROOT"
export OMP_NUM_THREADS=1
failed=0

# What runs in one process goes two files at a time; ranks would only wait for each other.
tests() {
  python -m pytest -q "$@" || failed=$?
}

# A name for the files as they are, committed or not, and the packages that they run with.
state_of_tree() {
  local index tree
  index="$(mktemp)"
  cp "$(git rev-parse --git-path index)" "$index"
  tree="$(export GIT_INDEX_FILE="$index" && git add -A && git write-tree)"
  rm -f "$index"
  python - "$tree" <<'PY'
import hashlib, importlib.metadata, sys
packages = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
print(sys.argv[1][:12], hashlib.sha256("\n".join([sys.version, *packages]).encode()).hexdigest()[:12], sep="-")
PY
}

# engine ARGUMENTS…: pytest with a vLLM: that of BVPO_VLLM_PYTHON, or one of its own
engine() {
  [ -n "${BVPO_VLLM_PYTHON:-}" ] || BVPO_VLLM_PYTHON="$(tests/engine/environment.sh | tail -n 1)" || { failed=1; return 0; }
  export BVPO_VLLM_PYTHON
  tests --vllm "$@"
}

# A TRL that ms-swift does not allow yet, in a folder of its own, for the loss that only it has. Without a registry its
# test is skipped, and told.
newest_trl() {
  local folder="$PWD/.test-progress/trl-1.16.0"
  # shellcheck disable=SC2086
  [ -d "$folder/trl" ] || python -m pip install -q --disable-pip-version-check ${BVPO_PIP_ARGS:-} --no-deps \
    --target "$folder" trl==1.16.0 >&2 || return 0
  export BVPO_NEWEST_TRL="$folder"
}

everything() {
  local progress before why image=tests/cluster/image.sh
  progress=".test-progress/$(state_of_tree)"
  mkdir -p "$progress"
  touch "$progress/passed"
  : >"$progress/left_out"
  before="$(wc -l <"$progress/passed")"
  local notes=(-p tests.progress --progress "$progress")
  newest_trl
  tests "${notes[@]}" --whole-matrix -n 2 --dist loadfile tests/unit tests/contracts tests/kernels
  tests "${notes[@]}" --whole-matrix tests/distributed
  tests "${notes[@]}" --cluster tests/cluster
  if why="$(tests/engine/environment.sh --needs)"; then engine "${notes[@]}" tests/engine; else echo "tests/engine: $why" >>"$progress/left_out"; fi
  if ! why="$("$image" --needs)"; then
    echo "$image: $why" >>"$progress/left_out"
  elif ! grep -qxF "$image" "$progress/passed"; then
    if "$image"; then echo "$image" >>"$progress/passed"; else failed=$?; fi
  fi
  echo
  echo "$(wc -l <"$progress/passed") passed, $before of them in earlier goes."
  if [ -s "$progress/left_out" ]; then
    echo "Left out:"
    sed 's/^/  /' "$progress/left_out"
  fi
  [ "$failed" = 0 ] || echo "Not everything passed: see above. The same command runs what is missing." >&2
}

if [ "$*" = --all ]; then
  everything
elif [ "${1:-}" = --vllm ]; then
  shift
  [ $# -gt 0 ] || set -- tests/engine
  engine "$@"
elif [ $# -gt 0 ]; then
  tests "$@"
else
  tests -n 2 --dist loadfile tests/unit tests/contracts tests/kernels
  tests --durations 12 tests/distributed
fi
exit "$failed"
