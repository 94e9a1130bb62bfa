// Writes down what the steps of the zoo's models are: `record_zoo FOLDER` makes a folder for
// each, and in it the traces that would be compiled.
#include <torch/torch.h>

#include <cstdlib>
#include <filesystem>
#include <iostream>

#include "bench/workloads.h"
#include "reprise/reprise.h"
#include "reprise/testing.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: record_zoo FOLDER\n";
    return 2;
  }
  reprise::options().python = "/dev/null";  // traces are written before they are compiled
  reprise::options().compile_after_ops = 1;
  for (const bench::Workload& workload : bench::workloads()) {
    const std::filesystem::path folder =
        std::filesystem::path(argv[1]) / (workload.model + "-" + workload.mode);
    std::filesystem::create_directories(folder);
    ::setenv("REPRISE_DUMP_TRACES", folder.c_str(), /*overwrite=*/1);
    // oneDNN's recurrent layers are no part of a trace.
    at::globalContext().setUserEnabledMkldnn(workload.model != "lstm");
    torch::manual_seed(0);
    const bench::Job job = workload.on(torch::kLazy);
    for (int step = 0; step < 4; ++step) {
      torch::AutoGradMode with_gradients(!workload.is_forward());
      const torch::Tensor result = job.step();  // what nobody holds is not computed
      reprise::mark_step();
      reprise::wait_for_compiles();
    }
    reprise::testing::forget_traces();
  }
  return 0;
}
