#!/usr/bin/env bash
# Every command in the image's /opt/bvpo/bin is a link to this file: sets the environment, then becomes the command of
# the same name in the image's virtual environment.
set -euo pipefail
# shellcheck source=environment.sh source-path=SCRIPTDIR
. /opt/bvpo/environment.sh
exec "/opt/bvpo/venv/bin/$(basename "$0")" "$@"
