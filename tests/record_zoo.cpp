// Writes down what the steps of the zoo's models are: `record_zoo FOLDER` makes a folder for
// each, and in it the traces that would be compiled, and another one, `MODEL-MODE-any-batch`, with
// those over symbols where batches of several sizes come.
#include <torch/torch.h>

#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

#include "bench/workloads.h"
#include "reprise/reprise.h"
#include "reprise/testing.h"

namespace {

constexpr int kSteps = 4;

void record(const bench::Workload& workload, const std::filesystem::path& folder, std::vector<int> batches) {
  std::filesystem::create_directories(folder);
  ::setenv("REPRISE_DUMP_TRACES", folder.c_str(), /*overwrite=*/1);
  // oneDNN's recurrent layers are no part of a trace.
  at::globalContext().setUserEnabledMkldnn(workload.model != "lstm");
  for (const int batch : batches) {
    if (batch > 0) ::setenv("REPRISE_BENCH_BATCH", std::to_string(batch).c_str(), /*overwrite=*/1);
    torch::manual_seed(0);
    const bench::Job job = workload.on(torch::kLazy);
    for (int step = 0; step < kSteps; ++step) {
      torch::AutoGradMode with_gradients(!workload.is_forward());
      const torch::Tensor result = job.step();  // what nobody holds is not computed
      reprise::mark_step();
      reprise::wait_for_compiles();
    }
  }
  ::unsetenv("REPRISE_BENCH_BATCH");
  reprise::testing::forget_traces();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: record_zoo FOLDER\n";
    return 2;
  }
  reprise::options().python = "/dev/null";  // traces are written before they are compiled
  reprise::options().compile_after_ops = 1;
  for (const bench::Workload& workload : bench::workloads()) {
    const std::string folder = std::string(argv[1]) + "/" + workload.model + "-" + workload.mode;
    record(workload, folder, {0});
    if (workload.has_batches) record(workload, folder + "-any-batch", {3, 5, 6, 7});
  }
  return 0;
}
