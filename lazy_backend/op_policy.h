/// \file
/// How each op is captured. Derived from its schema and its tags; one table
/// holds the exceptions.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <memory>

#include "lazy_backend/trace.h"

namespace reprise {

class ShapeInference;

struct OpPolicy {
  enum class Kind : uint8_t {
    /// Written down as a step.
    kTrace,
    /// Needs values, or makes what a trace cannot say: what it touches is
    /// computed first, then it runs on the backing device, outside the trace.
    kLeave,
    /// Changes only how its first argument lies over its storage.
    kMetadata,
    /// Makes a tensor of no particular content: outside the trace.
    kAllocate,
    kCopy,    ///< `copy_`: traced between lazy tensors, a read or a write otherwise
    kToCopy,  ///< `_to_copy`: a read where the target device is not lazy
    kResize,
    kSetStorage,
  };
  Kind kind = Kind::kTrace;
  Randomness randomness = Randomness::kNone;
  /// Tensors of the host may stand beside lazy ones (index tensors, lengths).
  bool host_tensors = false;
  /// Floats of this op are never made inputs of a program.
  bool constant_floats = false;
  /// The index of a number that the op casts to its tensor's dtype, so that an integer or a
  /// Boolean does what the float of its value does, and can be such an input. -1: none.
  int cast_argument = -1;
  /// The index of that dtype where it is an argument; the first argument's where that is none.
  int cast_dtype_argument = -1;
  /// It may return tensors of the host, which are then brought to the backing device.
  bool host_results = false;
  /// Indices of the arguments that it writes, from the schema and, for ops whose
  /// schema is silent, from the table.
  c10::SmallVector<uint8_t, 4> writes;
  /// From this one on, `writes` are of the table; and the index of the `training` argument
  /// without which there are none, or -1.
  size_t first_hidden_write = 0;
  int training_argument = -1;
  /// Eager's versions of what it writes are counted by the ops that it is made of on the
  /// backing device (`_foreach_mul_`), which the lazy tensors never meet.
  bool counts_versions = false;
  /// For each return, the argument that it is again, or -1.
  c10::SmallVector<int8_t, 4> returns_argument;
  /// The index of a dropout probability: the op is random where it is not 0, and
  /// is then no step. -1: none.
  int dropout_argument = -1;
  /// The index of a list of index tensors: where one is a mask, or lies on the host, the call
  /// is no step. -1: none.
  int index_argument = -1;
  /// Counts the ops that a session has met.
  uint32_t number = 0;
  /// The index of a `Device` argument, or -1.
  int device_argument = -1;
  /// Made when it is first asked for, by the session that keeps this.
  mutable std::shared_ptr<const ShapeInference> shapes;
};

/// To what a call casts its number; `Undefined` where nothing is known of that.
c10::ScalarType cast_dtype(const OpPolicy& policy, c10::ArrayRef<c10::IValue> arguments);

/// Computes the policy of an op; callers keep it.
OpPolicy policy_of(const c10::OperatorHandle& op);

}  // namespace reprise
