#!/usr/bin/env bash
# Profiles the kernels of a decode step (32K, batch 1, 12% of heads flagged) with Nsight Compute, on a machine with a GPU and no network.
#   scripts/gpu-profile.sh OUT BUN MODULES LIBRARY
#     as of gpu-bench.sh; OUT gets profile.csv, a line for each launch and metric
#   KERNELS=regex of names (default: the chain, attention, retrieval and sampling), SKIP=launches (default 40) COUNT=launches (default 24).
# The metrics fit one pass, so no kernel is run twice; each runs alone, which those beside a chain do not do in a step.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
[ $# -ge 4 ] || { sed -n '2,6p' "${BASH_SOURCE[0]}"; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd)
. scripts/gpu-setup.sh
setup "$2" "$3" "$4"
metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,launch__grid_size,launch__block_size
metrics=$metrics,launch__registers_per_thread,launch__shared_mem_per_block
ncu --target-processes all --clock-control none --graph-profiling node --kernel-name-base function \
  -k "regex:${KERNELS:-chain|attend|retrieve|sample}" --launch-skip "${SKIP:-40}" --launch-count "${COUNT:-24}" \
  --metrics "$metrics" --csv --page raw --log-file "$out/profile.csv" \
  "$bun" bench/run.ts speed --device cuda --only 3 --steps 12 --out "$out/profile-speed.csv" >"$out/profile.log" 2>&1
code=$?
tail -n 30 "$out/profile.csv"
exit $code
