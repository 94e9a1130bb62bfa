/// \file
/// Counters. Also visible through `torch::lazy::CreateMetricReport()`, as
/// `reprise.*`.
#pragma once

#include <cstdint>
#include <string>

#include "reprise/export_macros.h"

namespace reprise {

/// Totals of all threads since the process began.
struct Statistics {
  uint64_t ops_recorded = 0;          ///< ops run one by one and written down
  uint64_t ops_verified = 0;          ///< ops compared with the record, not run
  uint64_t ops_inferred = 0;          ///< ops of a new size, written down and not run
  uint64_t segments_recorded = 0;
  uint64_t segments_interpreted = 0;  ///< verified, then run op by op
  uint64_t segments_replayed = 0;     ///< verified, then run as a compiled program
  uint64_t segments_forgotten = 0;    ///< to make room for others
  uint64_t mismatches = 0;            ///< verifications that left the record
  uint64_t programs_requested = 0;    ///< programs asked of the compile queue
  uint64_t programs_compiled = 0;
  uint64_t programs_loaded = 0;       ///< taken from the artifact store
  uint64_t programs_shared = 0;       ///< other sizes served by a program there was
  uint64_t compile_failures = 0;
  uint64_t programs_checked = 0;      ///< programs whose first run gave the interpreter's values
  uint64_t program_failures = 0;      ///< programs that threw, or gave other values or tensors
  uint64_t programs_demoted = 0;      ///< measured slower than the interpreter
  uint64_t cuda_graphs = 0;           ///< programs whose launches were captured
  uint64_t cuda_graph_replays = 0;
};
REPRISE_API Statistics statistics();

/// Calls `visit(const char* name, uint64_t value)` for each field.
template <class Visit>
void for_each_statistic(const Statistics& s, const Visit& visit) {
  visit("ops_recorded", s.ops_recorded);
  visit("ops_verified", s.ops_verified);
  visit("ops_inferred", s.ops_inferred);
  visit("segments_recorded", s.segments_recorded);
  visit("segments_interpreted", s.segments_interpreted);
  visit("segments_replayed", s.segments_replayed);
  visit("segments_forgotten", s.segments_forgotten);
  visit("mismatches", s.mismatches);
  visit("programs_requested", s.programs_requested);
  visit("programs_compiled", s.programs_compiled);
  visit("programs_loaded", s.programs_loaded);
  visit("programs_shared", s.programs_shared);
  visit("compile_failures", s.compile_failures);
  visit("programs_checked", s.programs_checked);
  visit("program_failures", s.program_failures);
  visit("programs_demoted", s.programs_demoted);
  visit("cuda_graphs", s.cuda_graphs);
  visit("cuda_graph_replays", s.cuda_graph_replays);
}

/// `torch::lazy`'s metric report with Reprise's counters and times in it.
REPRISE_API std::string metrics_report();

}  // namespace reprise
