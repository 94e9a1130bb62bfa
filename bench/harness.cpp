#include "harness.h"

#include <benchmark/benchmark.h>
#include <torch/utils.h>

#include <algorithm>
#include <cstdlib>
#include <string>

namespace bench {

void set_threads() {
  const char* const threads = std::getenv("REPRISE_BENCH_THREADS");
  torch::set_num_threads(threads ? std::max(1, std::atoi(threads)) : 1);
}

int run_registered(int argc, char** argv) {
  set_threads();
  benchmark::AddCustomContext("threads", std::to_string(torch::get_num_threads()));
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return EXIT_FAILURE;
  }
  benchmark::RunSpecifiedBenchmarks();
  return EXIT_SUCCESS;
}

}  // namespace bench
