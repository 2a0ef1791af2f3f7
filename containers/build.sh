#!/usr/bin/env bash
# Builds an image: containers/build.sh cpu|gpu [OUT.sif]   (default OUT: bvpo-cpu.sif, bvpo-gpu.sif here)
#
# With root it builds plainly; without, with --fakeroot (user namespaces). Where the machine at hand allows neither,
# let it run on one that does and shares this folder:
#
#   BVPO_BUILD_ON="ssh build01"          containers/build.sh gpu
#   BVPO_BUILD_ON="srun -p build -c 16"  containers/build.sh gpu
#
#   BVPO_BASE           another base. gpu: nvidia/cuda@sha256:… or any image of a registry with nvcc, by digest;
#                       cpu: docker://debian:12, a SIF, or a folder (default: Debian 12 by debootstrap, needs root)
#   BVPO_TORCH_INDEX    cpu: index or folder of wheels with torch's CPU build
#                       (default: https://download.pytorch.org/whl/cpu)
#   BVPO_DEBIAN_MIRROR  cpu: default debootstrap's own; a dated snapshot repeats a build exactly
#   BVPO_PIP_CONF       a pip.conf for the build alone: an index of one's own. May hold a password: it is bound in,
#                       not copied, and no part of the image
#   BVPO_CA_BUNDLE      certificates to trust during the build, on top of the system's (a proxy that opens TLS)
#   BVPO_CUDA_ARCH      gpu: default 9.0 (H100)
#   BVPO_MAX_JOBS       gpu: compilers at a time (default: one for 8 GB of memory, at most the number of cores)
#   BVPO_BUILD_ARGS     more arguments for `apptainer build`
#   TMPDIR              needs about 15 GB for cpu, 80 GB for gpu, on a local disk
#
# Writes OUT.sif, OUT.packages.txt (every package and version: two builds from the same locks must not differ) and
# OUT.sbom.cdx.json. docs/containers.md has the rest.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
apptainer="$here/apptainer.sh"

die() {
  printf 'build.sh: %s\n' "$*" >&2
  exit 2
}

profile="${1:-}"
case "$profile" in cpu | gpu) ;; *) die "say which profile: build.sh cpu|gpu [OUT.sif]" ;; esac
out="$(realpath -m "${2:-bvpo-$profile.sif}")"
[ -d "$(dirname "$out")" ] || die "$(dirname "$out") does not exist"

if [ -n "${BVPO_BUILD_ON:-}" ]; then
  # By standard input: ssh would read quoted words once more, srun would not.
  remote="cd $(printf %q "$PWD") && exec env -u BVPO_BUILD_ON "
  for name in BVPO_BASE BVPO_TORCH_INDEX BVPO_DEBIAN_MIRROR BVPO_PIP_CONF BVPO_CA_BUNDLE BVPO_CUDA_ARCH BVPO_MAX_JOBS \
    BVPO_BUILD_ARGS BVPO_APPTAINER TMPDIR; do
    # These are paths and choices; a password is in the pip.conf, never in a command line.
    [ -z "${!name:-}" ] || remote+="$(printf '%q ' "$name=${!name}")"
  done
  remote+="$(printf '%q ' bash "$here/build.sh" "$profile" "$out")"
  # shellcheck disable=SC2086
  exec $BVPO_BUILD_ON bash -s <<<"$remote"
fi

work="$(mktemp -d "${TMPDIR:-/tmp}/bvpo-build.XXXXXX")"
trap 'rm -rf "$work"' EXIT
mkdir "$work/settings"

for pair in BVPO_PIP_CONF:pip.conf BVPO_CA_BUNDLE:ca.crt; do
  name="${pair%%:*}"
  [ -n "${!name:-}" ] || continue
  [ -r "${!name}" ] || die "$name=${!name} cannot be read"
  install -m 600 "${!name}" "$work/settings/${pair##*:}"
done

torch_index="${BVPO_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
case "$torch_index" in
  *://*@*) die "BVPO_TORCH_INDEX holds a password; put it into a file and name that in BVPO_PIP_CONF (extra-index-url)" ;;
  *://*) ;;
  *)
    [ -d "$torch_index" ] || die "BVPO_TORCH_INDEX=$torch_index is neither an address nor a folder"
    ls "$torch_index"/torch-*.whl >/dev/null 2>&1 || die "BVPO_TORCH_INDEX=$torch_index has no torch-*.whl"
    mkdir "$work/settings/wheels"
    cp "$torch_index"/torch-*.whl "$work/settings/wheels/"
    torch_index=/mnt/wheels
    ;;
esac

# Debian 12 as a folder, without anything of a registry.
debian_base() {
  [ "$(id -u)" = 0 ] || die "Debian 12 by debootstrap needs root; without it set BVPO_BASE=docker://debian:12 (or a SIF)"
  if ! command -v debootstrap >/dev/null; then
    if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends debootstrap >/dev/null; }; then
      die "debootstrap is missing: install it, or set BVPO_BASE=docker://debian:12"
    fi
  fi
  echo "Debian 12 from ${BVPO_DEBIAN_MIRROR:-the usual mirror} …"
  debootstrap --variant=minbase --include=ca-certificates bookworm "$work/base" \
    ${BVPO_DEBIAN_MIRROR:+"$BVPO_DEBIAN_MIRROR"} >"$work/debootstrap.log" 2>&1 || {
    tail -n 5 "$work/debootstrap.log" >&2
    die "debootstrap failed"
  }
  # Device nodes cannot be copied in a user namespace; Apptainer gives the container its own.
  rm -rf "$work/base/dev" "$work/base/var/cache/apt/archives"/*.deb
  mkdir "$work/base/dev"
}

arguments=(--build-arg "profile=$profile" --build-arg "torch_index=$torch_index")
base="${BVPO_BASE:-}"
if [ "$profile" = cpu ] && [ -z "$base" ]; then
  debian_base
  base="$work/base"
fi
case "$base" in
  "") ;; # gpu: the definition's own
  docker://*) arguments+=(--build-arg bootstrap=docker --build-arg "base=${base#docker://}") ;;
  /* | ./*)
    [ -e "$base" ] || die "BVPO_BASE=$base does not exist"
    arguments+=(--build-arg bootstrap=localimage --build-arg "base=$base")
    ;;
  *) arguments+=(--build-arg bootstrap=docker --build-arg "base=$base") ;;
esac
if [ "$profile" = gpu ]; then
  case "${BVPO_BASE:-nvidia@sha256:}" in
    *@sha256:* | /* | ./*) ;;
    *) die "BVPO_BASE=$BVPO_BASE has no digest, so it may be another image tomorrow. Ask for it: skopeo inspect --format '{{.Name}}@{{.Digest}}' docker://${BVPO_BASE#docker://}" ;;
  esac
  cores="$(nproc)"
  by_memory="$(awk '/MemTotal/ {print int($2 / 8388608) + 1}' /proc/meminfo)"
  jobs="${BVPO_MAX_JOBS:-$((cores < by_memory ? cores : by_memory))}"
  arguments+=(--build-arg "cuda_arch=${BVPO_CUDA_ARCH:-9.0}" --build-arg "max_jobs=$jobs")
fi
[ "$(id -u)" = 0 ] || arguments+=(--fakeroot)

cd "$here/.."
started=$SECONDS
# shellcheck disable=SC2086
APPTAINER_TMPDIR="$work" SINGULARITY_TMPDIR="$work" bash "$apptainer" build --force --bind "$work/settings:/mnt" \
  "${arguments[@]}" ${BVPO_BUILD_ARGS:-} "$work/image.sif" containers/bvpo.def
for file in packages.txt sbom.cdx.json; do
  bash "$apptainer" exec "$work/image.sif" cat "/opt/bvpo/$file" >"$work/$file"
  cp "$work/$file" "${out%.sif}.$file"
done
# Into place at the end: a name that is there is a whole image.
mv "$work/image.sif" "$out.part"
mv -T "$out.part" "$out"
echo "$out: $(du -sh "$out" | cut -f1), $(wc -l <"${out%.sif}.packages.txt") packages, $((SECONDS - started)) s."
