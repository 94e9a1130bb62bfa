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

/// Puts a kind of device behind `torch::kLazy`, as `REPRISE_BACKING` does when the library is
/// loaded: `cpu`, `cuda` or `cuda:i`. The index is the one that a plain `torch::kLazy` means in
/// the calling thread, and in threads that meet the device later.
///
/// The kind can be changed until the first lazy tensor is made, and while no other thread uses
/// the device. Throws c10::ValueError for other kinds and for a device that is not there,
/// c10::Error where lazy tensors have been made on another kind.
REPRISE_API void set_backing_device(c10::Device device);

}  // namespace reprise
