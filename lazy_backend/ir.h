/// \file
/// A trace as nodes of the lazy tensor core, for its tools: text, DOT, hashes.
/// Never on the way of an op.
#pragma once

#include <torch/csrc/lazy/core/ir.h>

#include <vector>

#include "lazy_backend/trace.h"

namespace reprise {

/// The steps' nodes, in order; inputs are nodes of their own before them.
std::vector<torch::lazy::NodePtr> to_ir(const std::vector<StepPtr>& steps);

}  // namespace reprise
