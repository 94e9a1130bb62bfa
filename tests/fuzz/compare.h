/// \file
/// Runs random programs on eager's device and on the lazy one and compares.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "tests/fuzz/program.h"

namespace reprise::fuzz {

/// One thread, and without libtorch's own warnings, which are eager's as well. For the
/// whole process.
void set_up_process();

/// Runs `program` for all its times, recorded first and verified and interpreted where
/// it repeats. Every value, its geometry, what was read and every error must be
/// eager's, to the last bit. Returns the first difference.
std::optional<std::string> difference_when_interpreted(const Program& program);

struct Compiled {
  struct Finding {
    size_t program;
    std::string text;
  };
  std::vector<Finding> differences;
  std::vector<Finding> not_compiled;  ///< programs that ran interpreted, with the reason
  size_t replayed = 0;                ///< programs that ran compiled
};

/// Runs the first time of each of `programs`, without what reads, as one segment, and
/// compares what its compiled program returns. Where sizes or numbers of one of them
/// change, the first four times, each as a segment of its own: of those that differ in
/// nothing else, one program over symbols may serve several. Then two more times, once each.
///
/// Inductor computes in another order than eager, and some programs magnify that. How
/// far a program's values may move is measured: eager runs it again with every value
/// disturbed by some units in the last place.
Compiled compare_compiled(const std::vector<Program>& programs);

}  // namespace reprise::fuzz
