/// \file
/// Runs recorded steps one by one on the backing device.
///
/// What a verified segment does until its program is compiled, and what makes up
/// for a verification that failed half way.
#pragma once

#include <functional>
#include <vector>

#include "lazy_backend/segment.h"
#include "lazy_backend/trace.h"

namespace reprise {

/// Runs `steps`, whose slots are bound in `segment`, and gives every created
/// storage that is still held its backing. Intermediates are freed after their
/// last use. Throws what an op throws; storages that were not made by then
/// throw the same when they are read.
void interpret(const std::vector<StepPtr>& steps, Segment& segment);

/// Called with a storage that a step has created or written, seen through the step's own
/// tensor.
using OnMade = std::function<void(const Step& step, uint32_t slot, const at::Tensor& tensor)>;

/// As `interpret`, on storages that no segment need have: `storages`, by slot, holds those
/// of inputs, which may be written; those of created slots are null, and are there as long
/// as a step uses them. `random` holds what the random steps drew, in order, and is used
/// up. `written` may be null.
void run_steps(const std::vector<StepPtr>& steps, const ScalarValues& scalars,
               std::vector<c10::Storage>& storages, std::vector<at::Tensor>& random,
               const OnMade& created, const OnMade& written = nullptr);

/// The numbers that a random step makes for its geometry, in a tensor of their own.
at::Tensor draw(const Step& step);

/// A tensor of the backing device of this geometry, over a new storage of at
/// least `nbytes`; its contents are undefined.
at::Tensor empty_tensor(const Geometry& geometry, size_t nbytes, c10::Device device);

/// A copy of a tensor that lies as `geometry` says.
at::Tensor copy_lying_as(const Geometry& geometry, size_t nbytes, const at::Tensor& tensor,
                         c10::Device device);

/// The last step (index) that touches each slot.
std::vector<uint32_t> last_uses(const std::vector<StepPtr>& steps, size_t slots);

/// A tensor of the backing device over `storage`.
at::Tensor backing_tensor(const c10::Storage& storage, const Geometry& geometry);

}  // namespace reprise
