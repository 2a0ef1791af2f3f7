# shellcheck shell=bash
# Sourced by the other scripts: makes the virtual environment once and activates it.
#
#   BVPO_VENV      where it lives (default: .venv in the checkout)
#   BVPO_PYTHON    which Python makes it (default: python3.11, python3.12 or python3, the first that is one)
#   BVPO_EXTRAS    extras to install (default: rehearsal)
#   BVPO_PIP_ARGS  more arguments for pip, such as an index of CPU builds of torch
#
# A second start finds the environment complete and takes no time; a change of pyproject.toml updates it.

BVPO_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
BVPO_VENV="${BVPO_VENV:-$BVPO_ROOT/.venv}"
BVPO_EXTRAS="${BVPO_EXTRAS:-rehearsal}"
BVPO_TORCH="${BVPO_TORCH:-torch==2.13.0}"
BVPO_PIP_ARGS="${BVPO_PIP_ARGS:-}"

bvpo_find_python() {
  local candidate candidates=(python3.11 python3.12 python3)
  [ -z "${BVPO_PYTHON:-}" ] || candidates=("$BVPO_PYTHON") # another one would not be what was asked for
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  [ -z "${BVPO_PYTHON:-}" ] || echo "BVPO_PYTHON=$BVPO_PYTHON does not run, or is another version." >&2
  echo "No Python 3.11 or 3.12 found; install one (Debian 12: apt-get install python3 python3-venv) or set BVPO_PYTHON." >&2
  return 1
}

bvpo_make_venv() {
  local python
  python="$(bvpo_find_python)" || return 1
  echo "Making $BVPO_VENV with $python …"
  if ! "$python" -m venv "$BVPO_VENV" 2>/tmp/bvpo-venv.$$; then
    # Debian ships Python without its venv module.
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
      rm -rf "$BVPO_VENV"
      apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null && "$python" -m venv "$BVPO_VENV"
    else
      cat "/tmp/bvpo-venv.$$" >&2
      rm -rf "$BVPO_VENV" "/tmp/bvpo-venv.$$"
      echo "Python cannot make a virtual environment; as root: apt-get install python3-venv" >&2
      return 1
    fi
  fi
  rm -f "/tmp/bvpo-venv.$$"
}

bvpo_environment() {
  # An image (containers/) has its packages already, and is read-only.
  [ -z "${BVPO_IN_IMAGE:-}" ] || return 0
  local stamp wanted
  stamp="$BVPO_VENV/.bvpo-$(echo "$BVPO_EXTRAS" | tr -c 'a-z\n' '-')"
  wanted="$(cat "$BVPO_ROOT/pyproject.toml" <(echo "$BVPO_TORCH $BVPO_PIP_ARGS") | sha256sum | cut -d' ' -f1)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    [ -x "$BVPO_VENV/bin/python" ] || bvpo_make_venv || return 1
    echo "Installing (a few minutes, once) …"
    # torch first and pinned: left to the others' requirements, pip takes the newest build.
    # shellcheck disable=SC2086
    "$BVPO_VENV/bin/python" -m pip install -q --disable-pip-version-check $BVPO_PIP_ARGS "$BVPO_TORCH" || return 1
    # shellcheck disable=SC2086
    "$BVPO_VENV/bin/python" -m pip install -q --disable-pip-version-check $BVPO_PIP_ARGS \
      -e "${BVPO_ROOT}[$BVPO_EXTRAS]" || return 1
    echo "$wanted" >"$stamp"
  fi
  # shellcheck disable=SC1091
  . "$BVPO_VENV/bin/activate"
}
