/// \file
/// The numbers that libtorch's optimizers compute in C++ and hand to ops: factors of updates,
/// Adam's bias corrections.
///
/// A replayed training step does not run `Optimizer::step()`. What that would have computed is
/// computed here, from the optimizer's options and counters, which go on as if it had run. The
/// formulas are those of torch/csrc/api/src/optim (torch 2.11); none is used that did not give
/// a traced run's own numbers, to the bit.
///
/// Not synchronised: like the optimizer's step, a call of a compiled function with an
/// optimizer in it is nobody else's.
#pragma once

#include <c10/core/TensorImpl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lazy_backend/function_trace.h"

namespace torch::optim {
class Optimizer;
class OptimizerOptions;
}  // namespace torch::optim

namespace reprise {

using OptimizerPtrs = std::vector<torch::optim::Optimizer*>;

/// Optimizers as they stand at one moment.
struct OptimizerState {
  struct Group {
    torch::optim::Optimizer* optimizer;
    std::shared_ptr<const torch::optim::OptimizerOptions> options;
    std::vector<const c10::TensorImpl*> parameters;
    std::vector<int64_t> steps;  ///< that each parameter has taken; 0 where nobody counts
  };
  std::vector<Group> groups;  ///< of all optimizers
};
OptimizerState state_of(const OptimizerPtrs& optimizers);

/// The parameters that they step.
std::vector<at::Tensor> parameters_of(const OptimizerPtrs& optimizers);

/// What a number of a training step is.
struct OptimizerNumber {
  enum class Kind : uint8_t {
    kUpdate,  ///< by which an update is multiplied when a parameter takes it
    kDecay,   ///< by which AdamW multiplies a parameter
    kRoot,    ///< of Adam's second bias correction
  };
  Kind kind;
  uint32_t group;
  bool operator==(const OptimizerNumber&) const = default;
};
/// By dynamic scalar of a trace; nothing for those that are no optimizer's.
using OptimizerNumbers = std::vector<std::optional<OptimizerNumber>>;

/// What a training step does to its optimizers, and which of its numbers are theirs.
struct OptimizerStep {
  OptimizerState after;  ///< the run that it was learned from
  /// By group: the parameters that take a step.
  std::vector<std::vector<uint32_t>> stepped;
  /// By group: any learning rate will do; the trace was verified with several.
  std::vector<bool> any_rate;
  OptimizerNumbers numbers;
  std::vector<OptimizerNumber> distinct;  ///< each of them once
};

/// Of a traced run. `problem` says where it is more than one step of each optimizer.
OptimizerStep step_of(const FunctionTrace& run, const OptimizerState& before, OptimizerState after,
                      std::string& problem);

/// Notes in `step` what an earlier verified run of the same trace has shown. Returns whether
/// some group had another learning rate in it.
bool take_over_rates(OptimizerStep& step, const OptimizerStep& earlier);

/// Of the optimizers' next step, the numbers in `step.distinct`; nothing where the optimizers
/// are not any more what `step` was learned from.
std::optional<std::vector<double>> next_numbers(const OptimizerStep& step);

/// Counts a step that was taken without the optimizers.
void count_step(const OptimizerStep& step);

/// How a number follows from the count `t` of steps, the one that is taken included.
struct CountedNumber {
  enum class Kind : uint8_t {
    kCorrected,  ///< -rate / (1 - base^t)
    kRoot,       ///< sqrt(1 - base^t)
    kDecayed,    ///< -rate / (1 + base (t - 1))
  };
  Kind kind;
  double base;
  double rate;     ///< 0 where the formula has none
  uint32_t group;  ///< whose count it is, among all optimizers' groups
  bool operator==(const CountedNumber&) const = default;
};

/// The numbers of a traced run that change from step to step.
struct CountedNumbers {
  struct Place {
    size_t step, argument;
    CountedNumber number;
  };
  std::vector<Place> places;    ///< in the order of the trace
  std::vector<int64_t> counts;  ///< by group, after the run; 0 where nobody counts
};
/// `problem` as for `step_of`.
CountedNumbers counted_numbers(const FunctionTrace& run, const OptimizerState& before,
                               const OptimizerState& after, std::string& problem);

/// Sets the optimizers' counters back to what they were.
void restore_counts(const OptimizerState& state);

/// What optimizers keep for the parameters among `named`, by names: `fc.weight_exp_avg`.
std::vector<std::pair<std::string, at::Tensor>> named_state(
    const OptimizerPtrs& optimizers, const std::vector<std::pair<std::string, at::Tensor>>& named);

}  // namespace reprise
