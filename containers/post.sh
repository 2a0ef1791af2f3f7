#!/usr/bin/env bash
# What fills an image, in both profiles: the body of %post in bvpo.def. A step that fails ends the build.
#
#   BVPO_PROFILE       cpu or gpu
#   BVPO_TORCH_INDEX   cpu: where torch's CPU build comes from, an index or a folder of wheels
#   BVPO_APEX_COMMIT   gpu: the commit of NVIDIA/apex, which is not on PyPI
#   BVPO_CUDA_ARCH     gpu: compute capability to compile for
#   MAX_JOBS           gpu: compilers at a time; each takes up to 8 GB
#   BVPO_SETTINGS      a folder that is there during the build only: pip.conf (an index of one's own; it may hold a
#                      password), ca.crt (certificates on top of the system's). Nothing of it stays in the image.
#
# Everything lies in /opt/bvpo: source/ (this checkout), venv/, bin/, environment.sh, profile,
# packages.txt, labels.txt, sbom.cdx.json.
set -euo pipefail

PREFIX=/opt/bvpo
SOURCE="$PREFIX/source"
VENV="$PREFIX/venv"
LOCK="$SOURCE/containers/lock-${BVPO_PROFILE:?is cpu or gpu}.txt"
SETTINGS="${BVPO_SETTINGS:-/mnt}"
# Below the prefix: /tmp is the build machine's own /tmp.
WORK="$PREFIX/work"
# Compiled against the torch of the image, one after the other, once everything else is there.
FROM_SOURCE="transformer-engine-torch flash-attn"
# What gets the image's environment (command.sh).
COMMANDS="python python3 torchrun swift megatron bvpo hf modelscope tensorboard"

step() { printf '\n== %s\n' "$*"; }

die() {
  printf 'post.sh: %s\n' "$*" >&2
  exit 1
}

# The lock's entries of the packages named (entries only …) or of all others (entries but …), hashes included.
entries() {
  local mode="$1"
  shift
  awk -v mode="$mode" -v names=" $* " '
    /^[A-Za-z0-9]/ { name = $1; sub(/[=\[].*/, "", name); keep = (index(names, " " name " ") > 0) == (mode == "only") }
    /^#/ { next }
    keep' "$LOCK"
}

# install MODE NAMES…: those entries, nothing else. Builds see the packages that are installed already, because
# pip's own build environments would fetch build tools without hashes.
install_locked() {
  local list
  list="$(mktemp "$WORK/lock.XXXXXX")"
  entries "$@" >"$list"
  [ -s "$list" ] || die "the lock $LOCK has none of: $*"
  "$VENV/bin/python" -m pip install --no-deps --require-hashes --no-build-isolation "${PIP_FROM[@]}" -r "$list"
  rm -f "$list"
}

check_arguments() {
  case "$BVPO_PROFILE" in
    cpu)
      [ -n "${BVPO_TORCH_INDEX:-}" ] || die "build argument torch_index is empty"
      if [ -d "$BVPO_TORCH_INDEX" ]; then
        PIP_FROM=(--find-links "$BVPO_TORCH_INDEX")
      else
        PIP_FROM=(--extra-index-url "$BVPO_TORCH_INDEX")
      fi
      ;;
    gpu)
      PIP_FROM=(--prefer-binary)
      [[ "${BVPO_APEX_COMMIT:-}" =~ ^[0-9a-f]{40}$ ]] || die "build argument apex_commit: 40 hex digits, not '${BVPO_APEX_COMMIT:-}'"
      [[ "${BVPO_CUDA_ARCH:-}" =~ ^[0-9]+\.[0-9]$ ]] || die "build argument cuda_arch: such as 9.0 (H100), not '${BVPO_CUDA_ARCH:-}'"
      [[ "${MAX_JOBS:-}" =~ ^[1-9][0-9]*$ ]] || die "build argument max_jobs: a number, not '${MAX_JOBS:-}'"
      command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] || die "the base image has no nvcc: take a -devel image"
      ;;
    *) die "build argument profile is cpu or gpu, not '$BVPO_PROFILE'" ;;
  esac
  [ -f "$LOCK" ] || die "$LOCK is missing"
}

system_packages() {
  export DEBIAN_FRONTEND=noninteractive
  apt-get update
  # A compiler stays: torch.compile and Triton call it at run time. The ibverbs packages are NCCL's InfiniBand.
  apt-get install -y --no-install-recommends \
    ca-certificates python3 python3-venv python3-dev gcc g++ git procps iproute2 \
    libibverbs1 ibverbs-providers librdmacm1 ibverbs-utils
}

pip_settings() {
  export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1
  export PYTHONNOUSERSITE=1 HOME="$WORK/home" TMPDIR="$WORK/tmp"
  mkdir -p "$HOME" "$TMPDIR"
  if [ -f "$SETTINGS/pip.conf" ]; then
    export PIP_CONFIG_FILE="$SETTINGS/pip.conf"
  fi
  if [ -f "$SETTINGS/ca.crt" ]; then
    cat /etc/ssl/certs/ca-certificates.crt "$SETTINGS/ca.crt" >"$WORK/ca.crt"
    export PIP_CERT="$WORK/ca.crt" GIT_SSL_CAINFO="$WORK/ca.crt"
  fi
}

python_packages() {
  python3 -m venv "$VENV"
  install_locked only pip setuptools wheel
  # shellcheck disable=SC2086
  install_locked but pip setuptools wheel $FROM_SOURCE
}

# Nobody has run this function on a machine with CUDA; docs/containers.md says what of it was checked.
cuda_packages() {
  export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}" MAX_JOBS TORCH_CUDA_ARCH_LIST="$BVPO_CUDA_ARCH"
  export PATH="$VENV/bin:$CUDA_HOME/bin:$PATH"
  # Without the two FORCE_BUILDs both packages fetch a binary from a release page, and no hash guards it.
  # Its expert parallelism by NCCL, which its setup builds unless told otherwise, wants nccl.h with the device API, which
  # the base image need not have, and symbols of the core library, which comes as a wheel. Megatron does without it.
  NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0 install_locked only transformer-engine-torch
  FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS="${BVPO_CUDA_ARCH/./}" install_locked only flash-attn
  # git checks the content against the commit's hash.
  APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD="$MAX_JOBS" "$VENV/bin/python" -m pip install \
    --no-deps --no-build-isolation "apex @ git+https://github.com/NVIDIA/apex@$BVPO_APEX_COMMIT"
  # apex without its kernels installs and imports too. A build node has no GPU and perhaps no libcuda, which some of
  # these link; the files must be there in any case.
  "$VENV/bin/python" - <<'PYTHON'
import importlib.util, sys

names = ("amp_C", "apex_C", "fused_weight_gradient_mlp_cuda", "fused_layer_norm_cuda", "flash_attn_2_cuda",
         "transformer_engine.pytorch", "transformer_engine_torch")
missing = [name for name in names if importlib.util.find_spec(name) is None]
sys.exit(f"not built: {', '.join(missing)}" if missing else 0)
PYTHON
}

own_package() {
  find "$SOURCE" -name __pycache__ -type d -prune -exec rm -rf {} +
  "$VENV/bin/python" -m pip install --no-deps --no-index --no-build-isolation "$SOURCE"
  rm -rf "$SOURCE/build" "$SOURCE/dist"
  install -m 644 "$SOURCE/containers/environment.sh" "$PREFIX/environment.sh"
  echo "$BVPO_PROFILE" >"$PREFIX/profile"
  mkdir -p "$PREFIX/bin"
  local name
  for name in $COMMANDS; do
    [ -x "$VENV/bin/$name" ] || die "the environment has no command $name"
    ln -sf "$SOURCE/containers/command.sh" "$PREFIX/bin/$name"
  done
}

# What is installed, in three forms: a list to compare two builds by, labels, and a bill of materials.
record() {
  "$VENV/bin/python" -m pip check
  {
    "$VENV/bin/python" -m pip list --format=freeze | LC_ALL=C sort
    dpkg-query -W -f '${binary:Package}=${Version}\n' | LC_ALL=C sort
  } >"$PREFIX/packages.txt"
  "$VENV/bin/python" "$SOURCE/containers/labels.py" "$LOCK" >"$PREFIX/labels.txt"
  # Apptainer and SingularityCE read dynamic labels from this file; in a plain chroot there is none.
  local labels="${APPTAINER_LABELS:-${SINGULARITY_LABELS:-}}"
  [ -z "$labels" ] || cat "$PREFIX/labels.txt" >>"$labels"

  # In an environment of its own: what writes the bill is not on it.
  python3 -m venv "$WORK/sbom"
  LOCK="$SOURCE/containers/lock-sbom.txt"
  "$WORK/sbom/bin/python" -m pip install --no-deps --require-hashes -r "$LOCK"
  "$WORK/sbom/bin/cyclonedx-py" environment "$VENV/bin/python" --pyproject "$SOURCE/pyproject.toml" \
    --spec-version 1.6 --output-format JSON --output-reproducible --output-file "$WORK/python.json"
  "$WORK/sbom/bin/python" "$SOURCE/containers/sbom.py" "$WORK/python.json" "$PREFIX/sbom.cdx.json"
}

clean() {
  apt-get clean
  rm -rf /var/lib/apt/lists/* "$WORK"
  # The builder's umask must not decide who can read the image.
  chmod -R a+rX "$PREFIX"
}

check_arguments
mkdir -p "$WORK"
step "1 of 5: Debian packages"
system_packages
pip_settings
step "2 of 5: Python packages, from $(basename "$LOCK")"
python_packages
if [ "$BVPO_PROFILE" = gpu ]; then
  step "3 of 5: Transformer Engine, flash-attn and apex, compiled for $BVPO_CUDA_ARCH"
  cuda_packages
fi
step "4 of 5: megatron-bvpo"
own_package
step "5 of 5: record"
record
clean
