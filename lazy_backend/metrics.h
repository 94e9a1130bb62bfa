/// \file
/// The counters, kept where an op can reach them cheaply. They are copied into
/// the lazy tensor core's metrics when somebody asks.
#pragma once

#include <atomic>
#include <cstdint>

#include "reprise/metrics.h"

namespace reprise {

class Counter {
 public:
  void add(uint64_t n) { value_.fetch_add(n, std::memory_order_relaxed); }
  uint64_t value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> value_{0};
};

/// Process-wide. Ops are counted by their session and added at a segment's end.
struct Metrics {
  Counter ops_recorded, ops_verified, ops_inferred, segments_recorded, segments_interpreted,
      segments_replayed, segments_forgotten, mismatches, programs_requested, programs_compiled,
      programs_loaded, programs_shared, compile_failures, programs_checked, program_failures, programs_demoted,
      cuda_graphs, cuda_graph_replays;
};
Metrics& metrics();

}  // namespace reprise
