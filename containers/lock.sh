#!/usr/bin/env bash
# Regenerates the locks, with the hash of every file, from containers/*.in and pyproject.toml:
#
#   containers/lock.sh             all of them: lock-cpu.txt, lock-gpu.txt, lock-sbom.txt
#   containers/lock.sh gpu         one of them
#   containers/lock.sh --check     writes nothing; fails where a lock differs from what would be written
#
#   BVPO_LOCK_DATE    packages published after this day are not seen, so that a second run on any day gives the
#                     same locks (default: the day in this file; set a later one, here, to update the locks)
#   BVPO_TORCH_INDEX  where the CPU build of torch is: an index or a folder of wheels
#                     (default: https://download.pytorch.org/whl/cpu)
#   BVPO_UV           the uv to use (default: a virtual environment of its own, made and removed here)
#
# uv and not pip makes them, because it resolves for another Python and platform than its own. The images are
# installed with pip, which refuses a file whose hash is not in the lock.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here"
date="${BVPO_LOCK_DATE:-2026-11-15}"
torch_index="${BVPO_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

check=""
wanted=()
for argument in "$@"; do
  case "$argument" in
    --check) check=1 ;;
    cpu | gpu | sbom) wanted+=("$argument") ;;
    *)
      echo "lock.sh: unknown argument '$argument'; it takes cpu, gpu, sbom and --check." >&2
      exit 2
      ;;
  esac
done
[ ${#wanted[@]} -gt 0 ] || wanted=(cpu gpu sbom)

uv="${BVPO_UV:-}"
if [ -z "$uv" ]; then
  python3 -m venv "$work/uv"
  "$work/uv/bin/python" -m pip install -q --disable-pip-version-check uv==0.13.9
  uv="$work/uv/bin/uv"
fi

# compile NAME ARGUMENTS…: one lock
compile() {
  local name="$1"
  shift
  echo "# Made by containers/lock.sh from lock-$name.in and pyproject.toml, as of $date. Do not edit." \
    >"$work/lock-$name.txt"
  # Nothing is written where uv fails; `set -e` does not hold in a function that is followed by ||.
  if ! "$uv" pip compile --quiet --no-config --no-header --generate-hashes --exclude-newer "${date}T00:00:00Z" "$@" \
    >>"$work/lock-$name.txt"; then
    echo "lock-$name.txt: uv could not work it out (above); it stays as it is." >&2
    return 1
  fi
  if [ -z "$check" ]; then
    cp "$work/lock-$name.txt" "lock-$name.txt" || return 1
    echo "lock-$name.txt: $(grep -c '==' "lock-$name.txt") packages"
  elif ! diff -u "lock-$name.txt" "$work/lock-$name.txt"; then
    echo "lock-$name.txt is not what containers/lock.sh would write." >&2
    return 1
  fi
}

# A folder of wheels is no index.
if [ -d "$torch_index" ]; then
  torch_from=(--find-links "$torch_index")
else
  # The index also mirrors some of PyPI's packages, older ones: every index is asked for every package.
  torch_from=(--extra-index-url "$torch_index" --index-strategy unsafe-best-match)
fi

ours=(../pyproject.toml --extra rehearsal --extra test)
failed=0
for name in "${wanted[@]}"; do
  case "$name" in
    cpu) compile cpu "${ours[@]}" lock-cpu.in --python-version 3.11 \
      --python-platform x86_64-manylinux_2_28 "${torch_from[@]}" || failed=1 ;;
    gpu) compile gpu "${ours[@]}" lock-gpu.in --python-version 3.12 \
      --python-platform x86_64-manylinux_2_39 || failed=1 ;;
    sbom) compile sbom lock-sbom.in --universal --python-version 3.11 || failed=1 ;;
  esac
done
exit "$failed"
