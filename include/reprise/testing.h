/// \file
/// Hooks for tests and benchmarks. Not for programs.
#pragma once

#include <cstdint>

#include "reprise/export_macros.h"

namespace reprise::testing {

/// Drops the calling thread's verified segment without running it: tensors made
/// by it lose their values. Measures verification alone.
REPRISE_API void discard_segment();

/// Empties the calling thread's trace tree, so that what comes is recorded anew.
REPRISE_API void forget_traces();

/// The calling thread's next `ops` ops are not recorded, as in a program that never
/// repeats; 0 records again.
REPRISE_API void pause_recording(uint64_t ops);

}  // namespace reprise::testing
