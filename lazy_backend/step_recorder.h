/// \file
/// Writes one call down as a step, while it runs on the backing device or on tensors that
/// have no values.
#pragma once

#include <ATen/core/stack.h>
#include <c10/util/SmallVector.h>

#include <memory>

#include "lazy_backend/op_policy.h"
#include "lazy_backend/segment.h"
#include "lazy_backend/symbolic_shape.h"
#include "lazy_backend/trace.h"

namespace reprise {

/// Use: construct, `take_arguments`, call the op, `take_results`. When the op
/// throws, or `take_results` returns null, the slots bound since construction
/// are to be rolled back to `first_slot()`.
class StepRecorder {
 public:
  enum class Device : uint8_t {
    kBacking,
    /// libtorch's `meta` device: the op says what its results would be like. They become
    /// pending tensors of the segment.
    kMeta,
  };
  StepRecorder(const c10::OperatorHandle& op, const OpPolicy& policy, Segment& segment,
               c10::DeviceIndex device_index, Device device = Device::kBacking);

  /// Writes the arguments down and puts tensors of the device in their place. Throws
  /// libtorch's error for mixed devices.
  void take_arguments(torch::jit::Stack& stack);

  /// Writes the results down and puts lazy tensors in their place. Returns null
  /// where the call cannot be written as a step (an `out` tensor was resized, a
  /// result lies on another device); the results are good all the same, unless they
  /// were inferred.
  std::shared_ptr<Step> take_results(torch::jit::Stack& stack);

  /// Of each tensor argument, in order, those in lists among them; null: plain numbers.
  std::vector<SymbolicShapePtr> argument_shapes() const;

  /// Takes back what the segment was told.
  void undo();

  uint32_t first_slot() const { return step_->first_slot; }
  /// As far as it is written.
  Step& step() { return *step_; }

 private:
  c10::Device device() const;
  at::Tensor on_device(const at::Tensor& lazy) const;
  Arg take(c10::IValue& value, const c10::Argument& declared, int top_level);
  Arg take_tensor(c10::IValue& value, int top_level);
  Result give(c10::IValue& value, int again);
  void check_changed_geometry();

  struct Unwrapped {
    at::Tensor lazy;
    at::Tensor backing;
    int argument;  ///< index of the argument itself, -1 within a list
  };

  const OpPolicy& policy_;
  Segment& segment_;
  const bool infers_;
  std::shared_ptr<Step> step_;
  c10::SmallVector<Unwrapped, 6> tensors_;
  size_t argument_tensors_ = 0;  ///< the first of `tensors_`; results follow
  c10::SmallVector<uint32_t, 2> newly_written_;
  bool traceable_ = true;
};

/// The arguments of a call: the last ones on the stack.
inline c10::ArrayRef<c10::IValue> call_arguments(const c10::OperatorHandle& op,
                                                 const torch::jit::Stack& stack) {
  const size_t count = op.schema().arguments().size();
  return c10::ArrayRef<c10::IValue>(stack.data() + (stack.size() - count), count);
}

/// Calls `visit(const at::Tensor&)` for every defined tensor among `values`.
template <class Visit>
void visit_tensors(c10::ArrayRef<c10::IValue> values, const Visit& visit) {
  for (const c10::IValue& value : values) {
    if (value.isTensor()) {
      if (value.toTensor().defined()) visit(value.toTensor());
    } else if (value.isList()) {
      visit_tensors(value.toListRef(), visit);
    }
  }
}

/// A list's items are lists.
bool holds_lists(const c10::IValue& list);

/// Replaces lazy tensors and lazy devices by those of the backing device. A tensor
/// that comes twice is the same tensor twice: ops compare the identity of arguments.
class Unwrapper {
 public:
  struct Pair {
    at::Tensor lazy, backing;
  };
  c10::IValue operator()(const c10::IValue& value);
  const std::vector<Pair>& pairs() const { return pairs_; }

 private:
  std::vector<Pair> pairs_;
};

/// An equal step with other slot numbers: slot `s` becomes `slots[s]`. `created`
/// tells which slots the segment has created before it; numbers that are -1 are
/// given as they come, from `next_slot` on.
std::shared_ptr<Step> renumber(const Step& step, std::vector<int64_t>& slots,
                               uint32_t& next_slot, std::vector<bool>& created);

}  // namespace reprise
