/// \file
/// How a call of a compiled function is replayed, and when it can be.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lazy_backend/function_trace.h"
#include "lazy_backend/optimizer_numbers.h"
#include "reprise/compile.h"

namespace reprise {

/// A tensor that the function uses and that somebody else holds.
struct Watched {
  c10::weak_intrusive_ptr<c10::TensorImpl> tensor;
  const LazyStorage* storage;  ///< over which it lay when it was bound
  uint32_t slot;
  bool requires_grad;
  bool written = false;
};

/// How a call is replayed. Immutable; used by several threads at once.
struct Plan {
  struct Source {
    enum class Kind : uint8_t { kArgument, kBound, kScalar, kRandom, kNumber };
    Kind kind;
    uint32_t index;
  };
  struct Output {
    enum class Kind : uint8_t { kNone, kMade, kArgument, kBound, kRandom };
    Kind kind = Kind::kNone;
    uint32_t index = 0;
    Geometry geometry;
  };
  /// A gradient that the function leaves in a leaf.
  struct Gradient {
    c10::weak_intrusive_ptr<c10::TensorImpl> leaf;
    Output output;
    bool was_there = false;  ///< one from before the call, which the function does not use
  };

  std::shared_ptr<Program> program;
  std::vector<Source> inputs;
  std::vector<c10::intrusive_ptr<LazyStorage>> bound;
  std::vector<Watched> watched;  ///< by slot
  /// Arguments that lay over the same storage in the calls the plan is made of: what is
  /// known of them may be known of that storage alone.
  std::vector<std::pair<uint32_t, const LazyStorage*>> same_arguments;
  std::vector<at::Tensor> constants;  ///< by program input: what is the same in every call
  std::optional<OptimizerStep> optimizers;  ///< where it steps some
  std::vector<uint32_t> random_steps;
  std::vector<uint32_t> written_arguments;
  std::vector<Output> outputs;  ///< the results, then what is kept
  std::vector<uint32_t> kept;   ///< slots of what is kept for the backward pass
  std::vector<Gradient> gradients;
  std::vector<int64_t> result_key;
};
using PlanPtr = std::shared_ptr<const Plan>;

/// What is known of the last verified run: two that did the same have a plan.
struct SeenRun {
  std::string segment;
  std::vector<c10::intrusive_ptr<LazyStorage>> inputs;
  ScalarValues scalars;
  OptimizerStep optimizers;
  std::string optimizers_segment;  ///< of which `optimizers` was learned
  /// Leaves in which it has left gradients.
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>> leaves;
};

/// What a plan is made of.
struct PlannedRun {
  const FunctionTrace& run;
  /// Over which the arguments of the call lay.
  const std::vector<const LazyStorage*>& arguments;
  const detail::Pack& result;
  /// What it has made and somebody holds is kept for the backward pass: further results.
  bool differentiable = false;
  std::optional<OptimizerStep> optimizers = {};  ///< what the run did to those of the function
  /// Of `SeenRun::leaves`, before the run: those that had a gradient, and those that had none.
  std::vector<std::pair<const c10::TensorImpl*, bool>> had_gradients = {};
  /// So many arguments are made for the call, and are nothing that the function holds.
  uint32_t made_for_the_call = 0;
};

/// Which leaves of an earlier run have a gradient.
std::vector<std::pair<const c10::TensorImpl*, bool>> gradients_of(const SeenRun& seen);

/// Of each tensor; null where it is not lazy.
std::vector<const LazyStorage*> storages_of(const std::vector<at::Tensor>& tensors);

/// A plan of a verified run; null where there is none yet, or never, with the reason.
PlanPtr plan_of(SeenRun& seen, const PlannedRun& planned, std::string& reason);

/// Replays a call; nothing where what was bound is not there any more, or the program fails.
std::optional<detail::Pack> replay(const Plan& plan, const std::vector<at::Tensor>& arguments);

}  // namespace reprise
