#!/usr/bin/env bash
# Fills a folder with what a bare GPU machine lacks (gpu_wheels.txt), as wheels for Python 3.12 on x86-64, and the rows
# that the steps train on. benchmarks/gpu.sh installs them there by itself.
#
#   benchmarks/gpu_wheels.sh [FOLDER]   # default .gpu-wheels, which git ignores; at most 60 MiB
#
# Needs pip and this project's environment (for the rows).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="${1:-.gpu-wheels}"
limit_mib=60
mkdir -p "$folder"
rm -f "$folder"/*.whl "$folder"/*.jsonl
platforms=()
for glibc in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
  --implementation cp "${platforms[@]}" -d "$folder" -r benchmarks/gpu_wheels.txt
PYTHONPATH="$PWD" python3 - "$folder" <<'PYTHON'
import json
import sys

from megatron_bvpo.rehearsal.sample_data import make_sample_rows

for scale in (1, 8):  # traces as long as the rehearsal's, and eight times as long: some hundred tokens
    with open(f"{sys.argv[1]}/rows-{scale}.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_sample_rows(160, seed=0, length_scale=float(scale)))
PYTHON
mib=$(($(du -sk "$folder" | cut -f1) / 1024 + 1))
echo "$folder: $(find "$folder" -name '*.whl' | wc -l) wheels and the rows, $mib MiB"
if [ "$mib" -gt "$limit_mib" ]; then
  echo "error: $folder is $mib MiB, more than the $limit_mib MiB that travel; drop a peer from gpu_wheels.txt" >&2
  exit 1
fi
