/// \file
/// The boxed entry: the kernel of every op at the `Lazy` dispatch key.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <string>
#include <vector>

namespace reprise {

/// Registered as the fallback of the key, and explicitly for `ops_with_rival_kernels`.
void capture_boxed(const c10::OperatorHandle& op, torch::jit::Stack* stack);

/// Aten's ops, without that name, of which the dispatcher would choose a composite kernel
/// before a fallback: its pieces would be captured, where eager runs the kernel that the
/// op has at `backing`.
std::vector<std::string> ops_with_rival_kernels(c10::DispatchKey backing);

/// Registers the unboxed entries. Returns the names that it took.
std::vector<std::string> register_hot_ops();

}  // namespace reprise
