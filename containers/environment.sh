# shellcheck shell=sh
# The environment of every command in the image: the commands in /opt/bvpo/bin source it before they start the
# real ones (command.sh). %environment could not do this: Apptainer evaluates it without the host's variables, so
# it knows neither TMPDIR nor HF_HOME. A SIF is read-only and its user has perhaps no home: all that is written
# goes to BVPO_CACHE. Sourcing it twice changes nothing.

export BVPO_IN_IMAGE=1
# The real commands first: what they start need not come through here again.
case ":$PATH:" in
  *:/opt/bvpo/venv/bin:*) ;;
  *) export PATH="/opt/bvpo/venv/bin:$PATH" ;;
esac

# The host's Python settings and the user's ~/.local must not leak in.
unset PYTHONPATH PYTHONHOME PYTHONSTARTUP
export PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1

bvpo_writable() { [ -n "$1" ] && [ -d "$1" ] && [ -w "$1" ]; }

# Set on the host, but not bound into the container.
bvpo_writable "${TMPDIR:-}" || unset TMPDIR

if [ -z "${BVPO_CACHE:-}" ]; then
  for bvpo_folder in "${SLURM_TMPDIR:-}" "${TMPDIR:-}" /tmp; do
    if bvpo_writable "$bvpo_folder"; then
      BVPO_CACHE="$bvpo_folder/bvpo-cache-$(id -u)"
      break
    fi
  done
fi
# A folder of one's own: on a node with several users /tmp is shared, and Triton runs what it finds in its cache.
if ! { mkdir -p "$BVPO_CACHE" && chmod 700 "$BVPO_CACHE"; } 2>/dev/null; then
  echo "bvpo: BVPO_CACHE=$BVPO_CACHE is not a folder of yours that is writable in here; set another." >&2
  exit 2
fi
export BVPO_CACHE

if ! bvpo_writable "${HOME:-}"; then
  mkdir -p "$BVPO_CACHE/home"
  export HOME="$BVPO_CACHE/home"
fi
export USER="${USER:-user$(id -u)}"

export XDG_CACHE_HOME="$BVPO_CACHE" XDG_CONFIG_HOME="$BVPO_CACHE/config"
export TRITON_CACHE_DIR="$BVPO_CACHE/triton" TORCHINDUCTOR_CACHE_DIR="$BVPO_CACHE/inductor"
export TORCH_EXTENSIONS_DIR="$BVPO_CACHE/torch_extensions" CUDA_CACHE_PATH="$BVPO_CACHE/cuda"
export MPLCONFIGDIR="$BVPO_CACHE/matplotlib" HYPOTHESIS_STORAGE_DIRECTORY="$BVPO_CACHE/hypothesis"

# A model cache is the site's choice; one that is not bound into the container helps nobody.
bvpo_model_cache() {
  if [ -n "$2" ] && [ ! -d "$2" ]; then
    echo "bvpo: $1=$2 is not in the container (--bind $2); using $3." >&2
  fi
  if [ ! -d "$2" ]; then
    mkdir -p "$3"
    export "$1=$3"
  fi
}
bvpo_model_cache HF_HOME "${HF_HOME:-}" "$BVPO_CACHE/huggingface"
bvpo_model_cache MODELSCOPE_CACHE "${MODELSCOPE_CACHE:-}" "$BVPO_CACHE/modelscope"

# Compute nodes have no way out: a look-up in a hub would hang until its time-out. Set to 0 to allow it.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TRANSFORMERS_OFFLINE="${TRANSFORMERS_OFFLINE:-1}"
export HF_DATASETS_OFFLINE="${HF_DATASETS_OFFLINE:-1}"
unset -f bvpo_writable bvpo_model_cache
