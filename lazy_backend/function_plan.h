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
  };

  std::shared_ptr<Program> program;
  std::vector<Source> inputs;
  std::vector<c10::intrusive_ptr<LazyStorage>> bound;
  std::vector<Watched> watched;
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
};

/// What a plan is made of.
struct PlannedRun {
  const FunctionTrace& run;
  /// Over which the arguments of the call lay.
  const std::vector<const LazyStorage*>& arguments;
  const detail::Pack& result;
  std::optional<OptimizerStep> optimizers = {};  ///< what the run did to those of the function
  /// What it has made and somebody holds is kept for the backward pass: further results.
  bool differentiable = false;
};

/// Of each tensor; null where it is not lazy.
std::vector<const LazyStorage*> storages_of(const std::vector<at::Tensor>& tensors);

/// A plan of a verified run; null where there is none yet, or never, with the reason.
PlanPtr plan_of(SeenRun& seen, const PlannedRun& planned, std::string& reason);

/// Replays a call; nothing where what was bound is not there any more, or the program fails.
std::optional<detail::Pack> replay(const Plan& plan, const std::vector<at::Tensor>& arguments);

}  // namespace reprise
