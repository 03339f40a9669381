#!/usr/bin/env bash
# Fills the speed table on a machine with a GPU and no network: other systems first, then ours, in one run.
#   scripts/gpu-bench.sh OUT BUN MODULES LIBRARY COMMIT [ARGUMENT...]
#     OUT       folder for what is measured: peers.csv, speed.csv (a line as each figure comes), speed.md and logs; made if not there
#     BUN       a bun binary, or one packed as .xz
#     MODULES   a folder node_modules, or a .tar.gz of one, with what the library imports: zod, @huggingface/tokenizers
#     LIBRARY   a built libfreekv_cuda.so, or one packed as .xz
#     COMMIT    of what is measured, for the CSV files
#     ARGUMENT  of `npm run bench -- speed`, e.g. --only 3,4
#   PEERS=file: figures of other systems that are there already; PEERS=- : none. They need a python3 with torch and transformers.
#   LIMIT=seconds (default 420) for ours, which is then cut off and keeps the figures so far.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
[ $# -ge 5 ] || { sed -n '2,11p' "${BASH_SOURCE[0]}"; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd) commit=$5
. scripts/gpu-setup.sh
setup "$2" "$3" "$4"
shift 5
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu --format=csv | tee "$out/gpu.log"

peers=${PEERS:-$out/peers.csv}
if [ -z "${PEERS:-}" ]; then
  start=$SECONDS
  timeout 150 python3 bench/speed/peers.py >"$peers" 2>"$out/peers.log"
  echo "=== peers: exit code $?, $((SECONDS - start)) s"; cat "$peers"
fi
if [ "$peers" != - ] && [ -s "$peers" ]; then set -- --peers "$peers" "$@"; fi

start=$SECONDS
timeout -s INT -k 20 "${LIMIT:-420}" "$bun" bench/run.ts speed --device cuda --commit "$commit" --out "$out/speed.csv" "$@" \
  >"$out/speed.md" 2> >(tee "$out/speed.log" >&2)
code=$?
echo "=== speed: exit code $code, $((SECONDS - start)) s"
cat "$out/speed.md"
exit $code
