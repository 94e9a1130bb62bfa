/// \file
/// Finds loops in what a program unrolls: where steps do the same again and again, each time
/// to what the time before has left.
///
/// One that always runs as often is best compiled as the straight line it is. Where the
/// number of its iterations changes, each number would be a program of its own, and what
/// comes after it as well. `Session` cuts such a loop into its iterations, which share one.
#pragma once

#include <cstddef>
#include <optional>
#include <span>

#include "lazy_backend/trace.h"

namespace reprise {

/// Steps [begin, end) are iterations of `period` steps that are alike (`Step::alike`) when
/// each is taken by itself.
struct Loop {
  size_t begin = 0;
  size_t period = 0;
  size_t end = 0;
  /// They make views, and run nothing; or it is one step, with a list of what a loop leaves.
  bool collection = false;
  /// The first iteration is not alike: it has one storage where others have two.
  bool first_coincides = false;
};

/// Shorter bodies are left alone, since a segment each would cost more than it saves; but for
/// those that only make views, by which all that follows would differ.
constexpr size_t kShortestLoopBody = 8;
constexpr size_t kLongestLoopBody = 4096;

/// The loop with two iterations or more before step `exit` and at least one after it, where
/// another path leaves it. Of several, that with the shortest body.
std::optional<Loop> find_loop(std::span<const StepPtr> steps, size_t exit);

/// Nothing is to be run.
bool only_aliases(std::span<const StepPtr> steps);

/// At most two ops are to be run, of which neither takes what the other makes.
bool nothing_to_fuse(std::span<const StepPtr> steps);

/// Whether two steps that would be alike differ in how long a list is that one takes or
/// returns: what an unrolled loop has collected is stacked, or what it will use is unbound.
bool differ_in_list_length(const Step& a, const Step& b);

/// Takes or returns a list of tensors, and writes none.
bool has_tensor_list(const Step& step);

}  // namespace reprise
