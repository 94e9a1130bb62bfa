/// \file
/// The lazy device: `torch::kLazy` over a backing device.
///
/// Linking `libreprise.so` is all that a program needs: `model->to(torch::kLazy)`
/// then works. These functions are for those who want to say where a step ends,
/// or to wait; a program that calls none of them has its steps found for it.
#pragma once

#include <c10/core/Device.h>

#include "reprise/export_macros.h"

namespace reprise {

/// Ends the calling thread's step: what it has recorded or verified so far is
/// one program, launched now. Costs nothing where nothing is pending.
/// Throws what an op of the step throws when it runs.
REPRISE_API void mark_step();

/// As `mark_step`, and returns when the backing device has finished.
REPRISE_API void sync();

/// Blocks until the compile queue is empty. For benchmarks and tests; a program
/// has no need of it. Callable from any thread.
REPRISE_API void wait_for_compiles();

/// The device on which lazy tensors with this index live.
REPRISE_API c10::Device backing_device(c10::DeviceIndex lazy_index = 0);

}  // namespace reprise
