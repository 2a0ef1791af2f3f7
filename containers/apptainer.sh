#!/usr/bin/env bash
# Runs Apptainer with the arguments given: the machine's own, or else, for root on a Debian or Ubuntu machine that has
# none (Debian 12 does not package it), the one of Debian's sid suite, which it unpacks into a folder the first time.
# Nothing of sid is installed on the machine: the program runs in a mount namespace whose root is that folder, with
# the machine's own folders bound in.
#
#   containers/apptainer.sh build image.sif image.def
#
#   BVPO_APPTAINER       the program to use (default: apptainer or singularity, whichever is on PATH)
#   BVPO_APPTAINER_ROOT  the folder with sid's packages (default: /var/tmp/bvpo-apptainer; 0.4 GB)
#   BVPO_DEBIAN_MIRROR   default: debootstrap's own
#   BVPO_APPTAINER_WRAP  a command to put before apptainer, such as setpriv, to run as another user (default: none; in
#                        sid's root an unshare that makes root of a user namespace, as builds want)
set -euo pipefail

root="${BVPO_APPTAINER_ROOT:-/var/tmp/bvpo-apptainer}"
mirror="${BVPO_DEBIAN_MIRROR:-}"

find_program() {
  # slurm.sbatch may have been told to use this very script.
  local found
  if [ -n "${BVPO_APPTAINER:-}" ]; then
    found="$(command -v "$BVPO_APPTAINER")" || {
      echo "apptainer.sh: BVPO_APPTAINER=$BVPO_APPTAINER is no program." >&2
      exit 2
    }
    if [ "$(realpath "$found")" != "$(realpath "${BASH_SOURCE[0]}")" ]; then
      echo "$found"
      return
    fi
  fi
  command -v apptainer || command -v singularity || true
}

make_root() {
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "apptainer.sh: neither apptainer nor singularity is on PATH. Load the site's module, set BVPO_APPTAINER, or" >&2
    echo "run this as root on a Debian or Ubuntu machine, where it gets Apptainer from Debian's sid suite." >&2
    exit 2
  fi
  if ! command -v debootstrap >/dev/null; then
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends debootstrap >&2
  fi
  echo "apptainer.sh: unpacking Apptainer from Debian sid into $root (once) …" >&2
  rm -rf "$root.part"
  mkdir -p "$(dirname "$root")"
  if ! debootstrap --variant=minbase --include=apptainer,squashfs-tools,squashfuse,fuse2fs,uidmap,ca-certificates \
    sid "$root.part" ${mirror:+"$mirror"} >"$root.log" 2>&1; then
    tail -n 5 "$root.log" >&2
    echo "apptainer.sh: debootstrap of sid failed; its whole output is in $root.log." >&2
    exit 1
  fi
  rm -f "$root.log"
  mv "$root.part" "$root"
}

# Runs in a mount namespace of its own: makes the folder the root and starts the command there.
enter() {
  local folder name
  # A chroot is not enough: the kernel refuses user namespaces inside of one.
  mount --make-rprivate /
  mount --rbind "$root" "$root"
  for folder in /*; do
    name="${folder#/}"
    case "$name" in
      bin | sbin | lib | lib32 | lib64 | libx32 | usr | etc | var | boot | lost+found) continue ;;
    esac
    if [ ! -d "$folder" ] || [ -L "$folder" ]; then continue; fi
    mkdir -p "$root/$name"
    mount --rbind "$folder" "$root/$name"
  done
  for name in /etc/hosts /etc/resolv.conf; do
    touch "$root$name"
    mount --bind "$name" "$root$name"
  done
  mount --rbind /var/tmp "$root/var/tmp"
  # Mounting a SIF as a user goes through FUSE, whose device some machines keep for root.
  if [ -c /dev/fuse ]; then
    [ -c "$root/var/fuse" ] || mknod -m 666 "$root/var/fuse" c 10 229
    mount --bind "$root/var/fuse" "$root/dev/fuse"
  fi
  folder="$PWD"
  mkdir -p "$root/.machine"
  cd "$root"
  pivot_root . .machine
  umount -l /.machine
  cd "$folder"
  export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
  if [ -n "${BVPO_APPTAINER_WRAP:-}" ]; then
    # shellcheck disable=SC2086
    exec $BVPO_APPTAINER_WRAP apptainer "$@"
  fi
  exec unshare --user --map-users=0,0,65536 --map-groups=0,0,65536 --mount apptainer "$@"
}

if [ "${1:-}" = --enter ]; then
  shift
  enter "$@"
fi
program="$(find_program)"
if [ -n "$program" ]; then
  # shellcheck disable=SC2086
  exec ${BVPO_APPTAINER_WRAP:-} "$program" "$@"
fi
[ -x "$root/usr/bin/apptainer" ] || make_root
exec unshare --mount bash "${BASH_SOURCE[0]}" --enter "$@"
