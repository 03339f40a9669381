#!/usr/bin/env bash
# Checks the CUDA library on a machine with a GPU and no network: the device tests, then compute-sanitizer over the kernel tests.
#   scripts/gpu-check.sh LOGS BUN MODULES [LIBRARY]
#     LOGS     folder for the logs: gpu.log, build.log, tests.log, sanitizers.log and TOOL.log; made if it is not there
#     BUN      a bun binary, or one packed as .xz
#     MODULES  a folder node_modules, or a .tar.gz of one, with what the library imports: zod, @huggingface/tokenizers,
#              commander, @std/assert
#     LIBRARY  a built libfreekv_cuda.so, or one packed as .xz; without it one is built for this GPU, which needs nvcc
#   TESTS=words (default: all) which device tests run, SANITIZE=words (default: the kernel tests; "-": none) which of them under the
#   sanitizers, TOOLS=names which sanitizers, JOBS=number (default 8) of them at a time, LIMIT=seconds (default 300) for any one process,
#   DEVICE=cuda-plain for the launches of older chips.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
[ $# -ge 3 ] || { sed -n '2,12p' "${BASH_SOURCE[0]}"; exit 2; }
logs=$(mkdir -p "$1" && cd "$1" && pwd) library=${4:-} limit=${LIMIT:-300}
. scripts/gpu-setup.sh
setup "$2" "$3" "$library"
failed=()

step() { # NAME COMMAND…: its output goes to LOGS/NAME.log
  local name=$1 start=$SECONDS code; shift
  "$@" >"$logs/$name.log" 2>&1; code=$?
  echo "=== $name: exit code $code, $((SECONDS - start)) s"
  [ $code -eq 0 ] || failed+=("$name")
}
sanitize() { # TOOL FILE: one line about it; its output goes to a file of its own
  local log=$work/$1-$(basename "$2").log code
  timeout "$limit" compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 "$bun" test --timeout 280000 "$2" >"$log" 2>&1
  code=$?
  echo "$([ $code -eq 0 ] && echo ok || echo FAIL) $1 $2: exit code $code, $(grep -E 'SUMMARY|^ *[0-9]+ (pass|fail)$' "$log" | tr -s '= \n' ' ')"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$logs/gpu.log"
step build timeout "$limit" "$bun" scripts/build.ts ptx $([ -n "$library" ] || echo cuda:here)

step tests timeout "$limit" "$bun" scripts/test.ts --device "${DEVICE:-cuda}" -v -j 4 ${TESTS:-}
grep -E '^(ok  |FAIL|failed:|\(fail\)|[0-9]+ passed)' "$logs/tests.log"

export -f sanitize; export logs bun work limit FREEKV_TEST_DEVICE="${DEVICE:-cuda}"
for tool in ${TOOLS:-memcheck racecheck initcheck synccheck}; do
  for word in ${SANITIZE:-append attention chain dense digests pages retrieval rope sample}; do
    find test -maxdepth 1 -name "$word*.test.ts" -printf "$tool %p\n"
  done | sort -u
done | xargs -r -P "${JOBS:-8}" -L 1 bash -c 'sanitize "$@"' _ | tee "$logs/sanitizers.log"
for tool in memcheck racecheck initcheck synccheck; do cat "$work/$tool"-* >"$logs/$tool.log" 2>/dev/null; done
! grep -q '^FAIL' "$logs/sanitizers.log" || failed+=(sanitizers)
[ ${#failed[@]} -eq 0 ] && echo "all passed" || { echo "failed: ${failed[*]}; see $logs"; exit 1; }
