/// \file
/// `torch.ops.reprise.*`: for programs that load the library without its headers,
/// from Python (`torch.ops.load_library`) or TorchScript.
#include <torch/library.h>

#include "reprise/device.h"
#include "reprise/explain.h"
#include "reprise/metrics.h"
#include "reprise/testing.h"

namespace reprise {
namespace {

c10::Dict<std::string, int64_t> statistics_dict() {
  c10::Dict<std::string, int64_t> dict;
  for_each_statistic(statistics(), [&](const char* name, uint64_t value) {
    dict.insert(name, static_cast<int64_t>(value));
  });
  return dict;
}

TORCH_LIBRARY(reprise, library) {
  library.def("mark_step() -> ()", &mark_step);
  library.def("sync() -> ()", &sync);
  library.def("wait_for_compiles() -> ()", &wait_for_compiles);
  library.def("explain() -> str", &explain);
  library.def("statistics() -> Dict(str, int)", &statistics_dict);
  library.def("forget_traces() -> ()", &testing::forget_traces);
}

}  // namespace
}  // namespace reprise
