#!/usr/bin/env bash
# A real image of the CPU profile: builds it twice with containers/build.sh, compares the package lists, and runs
# its %test, the rehearsal and the tests inside of it, read-only, without a network, without a home, and as a user
# without rights. Needs root, 40 GB below TMPDIR, and about 45 minutes on two cores.
#
#   tests/cluster/image.sh                  everything
#   tests/cluster/image.sh IMAGE.sif        without the builds
#   tests/cluster/image.sh --needs          says what this machine lacks for it, and does nothing
#   BVPO_IMAGE_TESTS="tests/unit"           which tests (default: the whole suite)
#   BVPO_IMAGE_REHEARSAL="--train_iters 8"  flags of the rehearsal (default: none, 30 steps)
#   BVPO_IMAGE_LOCK=FILE                    hold this lock (flock) while tests or the rehearsal run
#
# What containers/build.sh reads is passed on (BVPO_TORCH_INDEX, BVPO_CA_BUNDLE, BVPO_PIP_CONF, …).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
apptainer="$root/containers/apptainer.sh"
needs() {
  if [ "$(id -u)" != 0 ]; then
    echo "needs root: it gives up its own rights and network to see that the image needs neither"
  elif ! command -v apptainer singularity apt-get >/dev/null; then
    echo "needs Apptainer, or a Debian machine to get it"
  elif [ "$(df --output=avail -BG "${TMPDIR:-/tmp}" | tr -dc '0-9')" -lt 40 ]; then
    echo "needs 40 GB below ${TMPDIR:-/tmp}"
  else
    return 0
  fi
  return 1
}
if [ "${1:-}" = --needs ]; then
  needs
  exit
fi
needs >&2 || exit 2
work="$(mktemp -d "${TMPDIR:-/tmp}/bvpo-image-test.XXXXXX")"
trap 'rm -rf "$work"' EXIT
# The user without rights must reach it, and nothing else in it.
chmod 711 "$work"
mkdir -m 777 "$work/scratch"
passed=0
failed=0
heavy=()

# check NAME COMMAND…: counts, and shows what a failed command said
check() {
  local name="$1" started=$SECONDS
  shift
  if "$@" >"$work/said" 2>&1; then
    passed=$((passed + 1))
    echo "ok      $name ($((SECONDS - started)) s)"
    grep -hE '[0-9]+ passed|held-out +[0-9]+/' "$work/said" | tail -n 2 | sed 's/^/          /' || true
  else
    failed=$((failed + 1))
    echo "FAILED  $name ($((SECONDS - started)) s)"
    tail -n 60 "$work/said"
  fi
}

build() { bash "$root/containers/build.sh" cpu "$1"; }
# An unpacked folder, not squashed and not tested: what is installed is all that is compared.
build_again() { BVPO_BUILD_ARGS="--sandbox --notest" build "$1"; }

# inside COMMAND…: in the image, with loopback as the only network, as nobody, nothing of the host but one folder.
inside() {
  # shellcheck disable=SC2016
  env -i PATH="$PATH" BVPO_APPTAINER="${BVPO_APPTAINER:-}" BVPO_APPTAINER_ROOT="${BVPO_APPTAINER_ROOT:-}" \
    HOME=/nonexistent BVPO_APPTAINER_WRAP="setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs" \
    "${heavy[@]}" timeout 3000 unshare --net bash -c 'ip link set lo up; exec "$@"' - bash "$apptainer" exec --containall \
    --no-home --cleanenv --bind "$work/scratch:/scratch" --pwd /opt/bvpo/source \
    --env TMPDIR=/scratch,BVPO_CACHE=/scratch/cache,OMP_NUM_THREADS=1,CI=1 "$image" "$@"
}

same_packages() { cmp "${1%.sif}.packages.txt" "${2%.sif}.packages.txt"; }

labels_are_the_locks() {
  bash "$apptainer" inspect --labels "$image" >"$work/labels"
  local name version
  for name in torch ms-swift mcore-bridge megatron-core transformers peft trl; do
    version="$(sed -n "s/^$name==\([^ ]*\).*/\1/p" "$root/containers/lock-cpu.txt")"
    grep -F "org.megatron-bvpo.$name: $version" "$work/labels" || {
      echo "no label org.megatron-bvpo.$name with $version in:"
      cat "$work/labels"
      return 1
    }
  done
}

# The four conditions, seen from inside; each command must fail or say what is wanted.
conditions() {
  # shellcheck disable=SC2016
  inside bash -c '
    set -eu
    [ "$(id -u)" = 65534 ] || { echo "runs as $(id -u)"; exit 1; }
    ! touch /opt/bvpo/x 2>/dev/null || { echo "the image is writable"; exit 1; }
    links="$(ip -o link show | cut -d: -f2 | tr -d " \n")"
    [ "$links" = lo ] || { echo "there is a network: $links"; exit 1; }
    ! timeout 5 bash -c "exec 3<>/dev/tcp/9.9.9.9/53" 2>/dev/null || { echo "the network answers"; exit 1; }
    home="$(python -c "import os; print(os.environ[\"HOME\"])")"
    case "$home" in /scratch/*) ;; *) echo "HOME is $home"; exit 1 ;; esac
    [ ! -e /nonexistent ] && [ ! -e /work ] || { echo "folders of the host are here"; exit 1; }'
}

# Every package of the list is on the bill, and nothing else.
bill_is_complete() {
  inside python -c '
import json, re
bill = json.load(open("/opt/bvpo/sbom.cdx.json"))
assert bill["bomFormat"] == "CycloneDX" and bill["specVersion"] == "1.6", bill.get("specVersion")
normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
have = {(normal(c["name"]), c["version"]) for c in bill["components"]}
lines = open("/opt/bvpo/packages.txt").read().split()
listed = {(normal(re.sub(":amd64$", "", n)), v) for n, v in (re.split("==?", line, maxsplit=1) for line in lines)}
listed = {pair for pair in listed if pair[0] != "megatron-bvpo"}
print(sorted(listed - have), sorted(have - listed))
assert not listed - have, "not on the bill"
assert all(c.get("purl") for c in bill["components"] if normal(c["name"]) != "megatron-bvpo")'
}

rehearsal() { inside env BVPO_REHEARSAL_DIR=/scratch/rehearsal bash launch/rehearse.sh "$@"; }

# -p no:cacheprovider: the checkout in the image is read-only.
tests() { inside python -m pytest -q -p no:cacheprovider "$@"; }

image="${1:-}"
bash "$apptainer" --version
if [ -z "$image" ]; then
  image="$work/first.sif"
  check "build" build "$image"
  check "second build" build_again "$work/second.sif"
  check "both have the same packages" same_packages "$image" "$work/second.sif"
  rm -rf "$work/second.sif"
  [ -f "$image" ] || exit 1
fi
image="$(realpath "$image")"
check "labels are the lock's versions" labels_are_the_locks
check "user, network, home, read-only" conditions
check "bill of materials" bill_is_complete
[ -z "${BVPO_IMAGE_LOCK:-}" ] || heavy=(flock "$BVPO_IMAGE_LOCK")
check "%test" inside bash containers/test.sh
# shellcheck disable=SC2086
check "rehearsal" rehearsal ${BVPO_IMAGE_REHEARSAL:-}
# In two runs, as launch/test.sh does. test_install_orders installs packages, so it needs a registry and no image.
# shellcheck disable=SC2086
if [ -n "${BVPO_IMAGE_TESTS:-}" ]; then
  check "tests: $BVPO_IMAGE_TESTS" tests $BVPO_IMAGE_TESTS
else
  check "unit, contract and kernel tests" tests tests/unit tests/contracts tests/kernels \
    --ignore tests/contracts/test_install_orders.py
  check "tests of several ranks" tests tests/distributed
fi
printf '%s passed, %s failed\n' "$passed" "$failed"
[ "$failed" = 0 ]
