#include "lazy_backend/metrics.h"

#include <torch/csrc/lazy/core/metrics.h>

#include <cctype>
#include <mutex>

namespace reprise {

Metrics& metrics() {
  static auto* instance = new Metrics;
  return *instance;
}

Statistics statistics() {
  const Metrics& m = metrics();
  Statistics s;
  s.ops_recorded = m.ops_recorded.value();
  s.ops_verified = m.ops_verified.value();
  s.ops_inferred = m.ops_inferred.value();
  s.segments_recorded = m.segments_recorded.value();
  s.segments_interpreted = m.segments_interpreted.value();
  s.segments_replayed = m.segments_replayed.value();
  s.segments_forgotten = m.segments_forgotten.value();
  s.mismatches = m.mismatches.value();
  s.programs_requested = m.programs_requested.value();
  s.programs_compiled = m.programs_compiled.value();
  s.programs_loaded = m.programs_loaded.value();
  s.programs_shared = m.programs_shared.value();
  s.compile_failures = m.compile_failures.value();
  s.programs_checked = m.programs_checked.value();
  s.program_failures = m.program_failures.value();
  s.programs_demoted = m.programs_demoted.value();
  s.cuda_graphs = m.cuda_graphs.value();
  s.cuda_graph_replays = m.cuda_graph_replays.value();
  return s;
}

namespace {

/// "ops_recorded" as the lazy tensor core would spell it: "OpsRecorded".
std::string camel_case(const char* name) {
  std::string out;
  for (bool first = true; *name != '\0'; ++name) {
    if (*name != '_') out += first ? static_cast<char>(std::toupper(static_cast<unsigned char>(*name))) : *name;
    first = *name == '_';
  }
  return out;
}

}  // namespace

std::string metrics_report() {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  const auto publish = [](const char* name, uint64_t value) {
    auto* data = torch::lazy::GetCounter(name);
    torch::lazy::Counter counter(name);
    counter.AddValue(static_cast<int64_t>(value) -
                     (data == nullptr ? 0 : data->Value()));
  };
  for_each_statistic(statistics(), [&](const char* name, uint64_t value) {
    publish(("reprise." + camel_case(name)).c_str(), value);
  });
  return torch::lazy::CreateMetricReport();
}

}  // namespace reprise
