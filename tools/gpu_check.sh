#!/usr/bin/env bash
# Everything that a machine with a GPU should do for Reprise, without a network:
#
#   tools/gpu_check.sh [PART...]   build test fuzz conformance sanitize bench peers package report
#
# All parts by default, in that order; each leaves its log in OUT, and `report` makes
# OUT/gpu_check.json and OUT/gpu_check.md of them. Nine minutes on 16 cores.
#
#   PYTHON      the interpreter whose torch is built against and compiles; python3
#   BUILD       the build folder; build/gpu-check. With binaries in it, `build` can be left out.
#   OUT         where logs and report go; BUILD/report
#   JOBS        processes at once; the machine's cores
#   BATCH       size of the batches of what is timed; each model's usual one
#   GOOGLETEST_SOURCE, BENCHMARK_SOURCE   source folders, where the libraries are not installed
#   PACKAGE     a package that `export_gpt PACKAGE --device lazy --target sm_90` has made where
#               there is no GPU, with its .expected beside it; none
set -u
cd "$(dirname "$0")/.."
PYTHON=$(command -v "${PYTHON:-python3}")
BUILD=${BUILD:-$PWD/build/gpu-check}
OUT=${OUT:-$BUILD/report}
JOBS=${JOBS:-$(nproc)}
[ -n "${BATCH:-}" ] && export REPRISE_BENCH_BATCH=$BATCH
mkdir -p "$OUT"
parts=${*:-build test fuzz conformance sanitize bench peers package report}

torch_lib=$("$PYTHON" -c 'import torch, os; print(os.path.dirname(torch.__file__) + "/lib")')
# Where binaries were carried here, the torch that they find is this one.
export LD_LIBRARY_PATH="$BUILD/lib:$torch_lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export REPRISE_PYTHON=$PYTHON REPRISE_TEST_PYTHON=$PYTHON REPRISE_BACKING=cuda
export REPRISE_COMPILE_NICE=0 REPRISE_CACHE_DIR=$BUILD/artifacts

# `timed NAME SECONDS COMMAND...`: its log, its exit status, how long it took.
timed() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1 || code=$?
  echo "$code $((SECONDS - start))" >"$OUT/$name.status"
  echo "$name: status $code, $((SECONDS - start)) s"
}

part_build() {
  local options=(-DCMAKE_BUILD_TYPE=Release "-DREPRISE_PYTHON=$PYTHON")
  [ -n "${GOOGLETEST_SOURCE:-}" ] && options+=("-DFETCHCONTENT_SOURCE_DIR_GOOGLETEST=$GOOGLETEST_SOURCE")
  [ -n "${BENCHMARK_SOURCE:-}" ] && options+=("-DFETCHCONTENT_SOURCE_DIR_BENCHMARK=$BENCHMARK_SOURCE")
  timed configure 120 cmake -S . -B "$BUILD" "${options[@]}"
  timed build 480 cmake --build "$BUILD" -j "$JOBS"
}

part_test() {
  # A shard a core, but for those that a GPU's processes share.
  local shards=$((JOBS > 12 ? 12 : JOBS)) k
  local others='Linking.*:ProcessExit.*:WithoutACompiler.*:CacheFolder.*:WrongPrograms.*:Packages.*'
  for ((k = 0; k < shards; ++k)); do
    GTEST_TOTAL_SHARDS=$shards GTEST_SHARD_INDEX=$k timed "test-$k" 240 \
      "$BUILD/bin/reprise_tests" "--gtest_filter=-$others" &
  done
  # Its files are made once, by a Python that compiles.
  timed test-packages 240 "$BUILD/bin/reprise_tests" '--gtest_filter=Packages.*' &
  wait
}

part_fuzz() {
  timed fuzz-interpreted 60 "$BUILD/bin/fuzz_programs" --seed 11 --count 3000 --compile 0 &
  timed fuzz-compiled 90 "$BUILD/bin/fuzz_programs" --seed 12 --count 24 --compile 1 &
  wait
}

part_conformance() {
  local shards=$((JOBS > 8 ? 8 : JOBS)) k
  for ((k = 1; k <= shards; ++k)); do
    timed "conformance-$k" 150 "$PYTHON" -B tests/conformance/run.py --device cuda \
      --library "$BUILD/lib/libreprise.so" --cache "$REPRISE_CACHE_DIR" --share "1/6" --shard "$k/$shards" &
  done
  wait
}

part_sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "sanitize: no compute-sanitizer here"; return; }
  timed sanitize 120 compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes application-only \
    "$BUILD/bin/reprise_tests" '--gtest_filter=Gpu.ResultsThatAreHeld*:Gpu.InputsThatMove*'
}

part_bench() {
  export REPRISE_BENCH_SECONDS=${REPRISE_BENCH_SECONDS:-0.4}
  (
    cd "$BUILD" || exit
    # All rows compiled first, side by side.
    for row in $(bin/bench_models --benchmark_list_tests); do
      REPRISE_BENCH_SECONDS=0.01 timed "bench-warm-${row//\//-}" 170 bin/bench_models "--benchmark_filter=^$row\$" &
    done
    wait
    timed bench-models 120 bin/bench_models "--benchmark_out=$OUT/bench-models.json"
    REPRISE_CUDA_GRAPHS=0 timed bench-models-without-graphs 100 \
      bin/bench_models "--benchmark_out=$OUT/bench-models-without-graphs.json"
    # The same steps as compiled functions: their programs are those of the rows above.
    REPRISE_BENCH_ZOO=1 timed bench-functions 100 \
      bin/bench_runtime '--benchmark_filter=^zoo/' "--benchmark_out=$OUT/bench-functions.json"
  )
}

part_peers() {
  TORCHINDUCTOR_CACHE_DIR=$BUILD/inductor timed peers 240 "$PYTHON" bench/peers/torch_compile.py \
    --device cuda:0 --out "$OUT/peers.json" --seconds 0.3 --warm "$JOBS" ${BATCH:+--batch "$BATCH"}
}

part_package() {
  [ -n "${PACKAGE:-}" ] || { echo "package: none is named"; return; }
  timed package 60 "$BUILD/bin/plain_libtorch_runner" "$PACKAGE"
}

part_report() { "$PYTHON" tools/gpu_report.py "$OUT"; }

for part in $parts; do
  echo "-- $part"
  "part_$part"
done
