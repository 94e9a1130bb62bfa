/// \file
/// The boxed entry: the kernel of every op at the `Lazy` dispatch key.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

namespace reprise {

/// Registered as the fallback of the key, and explicitly for every op that has a
/// `CompositeExplicitAutograd` kernel, which would be chosen before a fallback
/// and would be captured in pieces.
void capture_boxed(const c10::OperatorHandle& op, torch::jit::Stack* stack);

/// Registers the unboxed entries. Returns the names that it took.
std::vector<std::string> register_hot_ops();

}  // namespace reprise
