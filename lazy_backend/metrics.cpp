#include "lazy_backend/metrics.h"

#include <torch/csrc/lazy/core/metrics.h>

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
  s.segments_recorded = m.segments_recorded.value();
  s.segments_interpreted = m.segments_interpreted.value();
  s.segments_replayed = m.segments_replayed.value();
  s.mismatches = m.mismatches.value();
  s.programs_requested = m.programs_requested.value();
  s.programs_compiled = m.programs_compiled.value();
  s.programs_loaded = m.programs_loaded.value();
  s.compile_failures = m.compile_failures.value();
  s.program_failures = m.program_failures.value();
  s.programs_demoted = m.programs_demoted.value();
  return s;
}

std::string metrics_report() {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  const auto publish = [](const char* name, uint64_t value) {
    auto* data = torch::lazy::GetCounter(name);
    torch::lazy::Counter counter(name);
    counter.AddValue(static_cast<int64_t>(value) -
                     (data == nullptr ? 0 : data->Value()));
  };
  const Statistics s = statistics();
  publish("reprise.OpsRecorded", s.ops_recorded);
  publish("reprise.OpsVerified", s.ops_verified);
  publish("reprise.SegmentsRecorded", s.segments_recorded);
  publish("reprise.SegmentsInterpreted", s.segments_interpreted);
  publish("reprise.SegmentsReplayed", s.segments_replayed);
  publish("reprise.Mismatches", s.mismatches);
  publish("reprise.ProgramsRequested", s.programs_requested);
  publish("reprise.ProgramsCompiled", s.programs_compiled);
  publish("reprise.ProgramsLoaded", s.programs_loaded);
  publish("reprise.CompileFailures", s.compile_failures);
  publish("reprise.ProgramFailures", s.program_failures);
  publish("reprise.ProgramsDemoted", s.programs_demoted);
  return torch::lazy::CreateMetricReport();
}

}  // namespace reprise
