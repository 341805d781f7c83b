#!/usr/bin/env bash
# Runs the programs of sanitize/, each with the source of its name and the threads, under ASan + UBSan and then TSan,
# at every level of this machine, and of those it lacks over tests/emulation. Prints
# "sanitizers: clean" at the end, or stops at the first report. Minutes.
#
#   kernels/cpu/sanitize.sh
set -euo pipefail
cd "$(dirname "$0")"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
common="-std=c++17 -O1 -g -fno-math-errno -ffp-contract=off -Wall -Wextra -Werror -Wno-psabi
  -Wno-uninitialized -Wno-maybe-uninitialized"
avx512="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mfma -mf16c"
declare -A levels=([portable]="")
grep -qw avx2 /proc/cpuinfo && levels[avx2]="-mavx2 -mfma -mf16c"
emulation=../../tests/emulation
grep -qw avx512_bf16 /proc/cpuinfo && levels[avx512]="$avx512"
grep -qw amx_bf16 /proc/cpuinfo && levels[amx]="$avx512 -mamx-tile -mamx-bf16 -mamx-int8"
if [[ -v levels[avx512] && ! -v levels[amx] ]]; then
  levels[amx-emulated]="$avx512 -include $emulation/tiles.h"
elif [[ -v levels[avx2] && ! -v levels[amx] ]]; then
  levels[avx512-emulated]="${levels[avx2]} -include $emulation/avx512.h"
  levels[amx-emulated]="${levels[avx512-emulated]} -include $emulation/tiles.h"
fi
for level in "${!levels[@]}"; do
  for program in sanitize/*.cpp; do
    name=$(basename "$program" .cpp)
    for kind in address,undefined thread; do
      sources=("$program" pool.cpp)
      [ "$name" = pool ] || sources+=("$name.cpp")
      ${CXX:-c++} $common ${levels[$level]} -fsanitize=$kind -fno-sanitize-recover=all \
        "${sources[@]}" -pthread -o "$out/$name"
      # the child of sanitize/pool.cpp starts threads, which TSan allows only when asked
      echo "$level, $kind: $(TSAN_OPTIONS=die_after_fork=0 "$out/$name")"
    done
  done
done
echo "sanitizers: clean"
