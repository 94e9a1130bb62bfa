/// \file
/// What an op would return, without running it: sizes, strides and dtypes.
///
/// Most ops are asked themselves, by libtorch's own kernels for its `meta` device. A table
/// holds rules for those that have none in C++ (PyTorch's Python has, and registers them in
/// place of all others when it is imported; no Python is to run here).
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include "lazy_backend/trace.h"

namespace reprise {

/// How an op's results are inferred. Immutable; to be kept for each op.
class ShapeInference {
 public:
  explicit ShapeInference(const c10::OperatorHandle& op);

  /// Replaces the op's arguments on the stack, tensors of the `meta` device, by its results,
  /// which are such tensors. `like` is a step that is alike but for integers: where a rule
  /// knows sizes alone, the results lie as its do. Returns false, with the stack in any
  /// state, where it is not known what the op returns. Throws what a kernel throws for
  /// sizes that do not fit.
  bool infer(const Step& like, torch::jit::Stack& stack) const;

 private:
  enum class Way : uint8_t { kUnknown, kKernel, kRule, kOneTensor, kLists, kCopy };
  Way way_ = Way::kUnknown;
  c10::OperatorHandle op_;
  const c10::SafeKernelFunction* kernel_ = nullptr;
  const void* rule_ = nullptr;
};

/// Takes hold of libtorch's meta kernels. To be called before a Python imports torch; other
/// calls have no effect. Thread-safe.
void keep_meta_kernels();

}  // namespace reprise
