/// \file
/// Hooks for tests and benchmarks. Not for programs.
#pragma once

#include "reprise/export_macros.h"

namespace reprise::testing {

/// Drops the calling thread's verified segment without running it: tensors made
/// by it lose their values. Measures verification alone.
REPRISE_API void discard_segment();

/// Empties the calling thread's trace tree, so that what comes is recorded anew.
REPRISE_API void forget_traces();

}  // namespace reprise::testing
