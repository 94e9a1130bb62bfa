/// \file
/// Compiled functions whose results take part in autograd: their backward passes.
///
/// The first calls run the function, and its results are given a `Node` of ours for their
/// history, which has libtorch's own graph of the function behind it. A backward pass through
/// that node is traced like a function. Once both passes have programs, a call runs the first
/// and the node runs the second, on what the first has kept for it.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "lazy_backend/function_plan.h"

namespace reprise {

/// A tensor that gets a gradient: an argument, or a leaf that the function uses beside them.
struct GradientInput {
  int64_t argument = -1;  ///< -1: a leaf
  c10::weak_intrusive_ptr<c10::TensorImpl> leaf;
  std::vector<uint32_t> results;  ///< whose gradients lead to it, among those that take part
};

/// Both passes of a key. Immutable.
struct DifferentiablePlan {
  PlanPtr forward, backward;
  std::vector<uint32_t> results;           ///< those that take part in autograd
  std::vector<Geometry> gradients;         ///< as which the backward pass takes theirs
  std::vector<GradientInput> inputs;
  std::vector<std::pair<uint32_t, const LazyStorage*>> same_arguments;  ///< see `Plan`
  std::vector<uint32_t> saved_arguments;   ///< which the backward pass reads
  std::vector<uint32_t> saved_watched;     ///< the same of `forward->watched`
  std::vector<uint32_t> saved_kept;        ///< the same of `forward->kept`
};
using DifferentiablePlanPtr = std::shared_ptr<const DifferentiablePlan>;

/// What was found out of the backward passes of a key.
struct SeenBackward {
  SeenRun run;
  std::string reason;  ///< why there is no plan; empty where one may come
};

/// A traced call, for the backward pass that may come.
struct TracedForward {
  std::string name;    ///< of the function
  uint64_t function;   ///< the number under which the backward pass is traced
  PlanPtr plan;        ///< null: not yet
  std::vector<at::Tensor> arguments;
  std::vector<std::pair<uint32_t, c10::intrusive_ptr<LazyStorage>>> created;
  /// Called with what the backward pass was found to be, or with null and why there will be none.
  std::function<void(DifferentiablePlanPtr, const std::string& reason)> found;
  /// Under the function's lock.
  std::function<void(const std::function<void(SeenBackward&)>&)> with_seen;
};

/// The number of the next node that the calling thread makes.
uint64_t next_node();

/// Gives those of `results` that take part in autograd a history that is traced. `first_node`
/// is what `next_node()` was before the function ran. Returns why it cannot, or nothing.
std::string trace_backward(TracedForward&& forward, uint64_t first_node, std::vector<at::Tensor>& results);

/// Replays the forward pass, and gives the results a history that is replayed. Nothing where
/// that is not possible any more.
std::optional<detail::Pack> replay_differentiable(const DifferentiablePlanPtr& plan, const std::string& name,
                                                  const std::vector<at::Tensor>& arguments);

}  // namespace reprise
