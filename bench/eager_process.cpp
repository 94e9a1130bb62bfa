#include "eager_process.h"

#include <torch/torch.h>

#include <stdexcept>
#include <string_view>

#include "harness.h"
#include "paired_timing.h"
#include "workloads.h"

namespace bench {

namespace {

constexpr std::string_view kFlag = "--eager-steps-of";

}  // namespace

EagerProcess::EagerProcess(const std::string& workload, c10::Device device)
    : child_({std::string(kFlag), workload, device.str()}) {}

double EagerProcess::steps(int64_t count) {
  double seconds = 0.0;
  if (!child_.channel().send(count) || !child_.channel().receive(seconds)) {
    throw std::runtime_error("the process of eager steps has ended");
  }
  return seconds;
}

bool served_eager_steps(int argc, char** argv) {
  if (argc != 4 || argv[1] != kFlag) {
    return false;
  }
  set_threads();
  const c10::Device device(argv[3]);
  auto job = workload_named(argv[2]).on(device);
  const Channel parent = channel_to_parent();
  for (int64_t count; parent.receive(count);) {
    const double seconds = seconds_of(count, [&] {
      const auto output = job.step();
      if (device.is_cuda()) {
        torch::cuda::synchronize(device.index());
      }
    });
    if (!parent.send(seconds)) {
      break;
    }
  }
  return true;
}

}  // namespace bench
