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

double EagerProcess::steps(int64_t count) { return ask(count); }

double EagerProcess::queued_steps(int64_t count) { return ask(-count); }

double EagerProcess::ask(int64_t steps) {
  double seconds = 0.0;
  if (!child_.channel().send(steps) || !child_.channel().receive(seconds)) {
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
    const auto wait = [&] {
      if (device.is_cuda()) {
        torch::cuda::synchronize(device.index());
      }
    };
    const auto one = [&] {
      const auto output = job.step();
      wait();
    };
    const auto queued = [&] {
      for (int64_t k = count; k < 0; ++k) {
        job.step();
      }
      wait();
    };
    const double seconds = count < 0 ? seconds_of(1, queued) : seconds_of(count, one);
    if (!parent.send(seconds)) {
      break;
    }
  }
  return true;
}

}  // namespace bench
