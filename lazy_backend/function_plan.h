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

class Session;

/// A tensor that the function uses and that somebody else holds.
struct Watched {
  c10::weak_intrusive_ptr<c10::TensorImpl> tensor;
  const LazyStorage* storage;  ///< over which it lay when it was bound
  uint32_t slot;
  bool required_grad, requires_grad;  ///< before the call, and after it
  bool written = false;
  bool unknown_leaf = false;  ///< see `Plan::unknown_leaves`
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
  /// A gradient that the function leaves in a leaf; none where it takes the leaf's away.
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
  /// Leaves that had no gradient in any call that was run: what becomes of one is not known.
  /// Those that are not watched.
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>> unknown_leaves;
  /// The thread's session, and what leaves were known in it, when the plan was made.
  const Session* made_in = nullptr;
  uint64_t leaf_generation = 0;
  std::vector<int64_t> result_key;
};
using PlanPtr = std::shared_ptr<const Plan>;

/// A tensor that a run has used, as it was before the next one.
struct HeldTensor {
  c10::weak_intrusive_ptr<c10::TensorImpl> tensor;
  bool requires_grad, has_gradient;
};

/// A leaf that had a gradient before some call.
struct KnownLeaf {
  c10::weak_intrusive_ptr<c10::TensorImpl> leaf;
  bool removes;  ///< the call took it away, or put another one in its place
};

/// What is known of the last verified run: two in turn that did the same have a plan.
struct SeenRun {
  std::string segment;  ///< empty: the run before the next one is none of two
  /// Of which trace the rest was learned; kept where calls between were replayed.
  std::string learned_of;
  std::vector<c10::weak_intrusive_ptr<LazyStorage>> inputs;
  std::vector<bool> varied;  ///< inputs that were another storage in some run
  ScalarValues scalars;
  OptimizerStep optimizers;
  bool rates_matter = false;  ///< numbers that are no optimizer's change with learning rates
  std::vector<KnownLeaf> leaves;  ///< kept from run to run
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
  /// Before the run: what the runs of functions had used and somebody held on to, and what
  /// their optimizers step.
  std::vector<HeldTensor> held = {};
  /// The arguments, from which to which, that may be what the function holds: others are
  /// made for the call.
  uint32_t first_given = 0, last_given = UINT32_MAX;
};

/// Those of a run's tensors that are there still.
std::vector<HeldTensor> held_of(const std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>>& tensors);

/// Notes the leaves that a run has used and that are no arguments of it.
void note_leaves(UsedLeaves& leaves, const FunctionTrace& run, const std::vector<at::Tensor>& arguments);

/// Of each tensor; null where it is not lazy.
std::vector<const LazyStorage*> storages_of(const std::vector<at::Tensor>& tensors);

/// A plan of a verified run; null where there is none yet, or never, with the reason.
PlanPtr plan_of(SeenRun& seen, const PlannedRun& planned, std::string& reason);

/// Replays a call; nothing where what was bound is not there any more, or the program fails.
std::optional<detail::Pack> replay(const Plan& plan, const std::vector<at::Tensor>& arguments);

}  // namespace reprise
