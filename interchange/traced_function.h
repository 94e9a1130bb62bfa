/// \file
/// A function as it runs once on lazy tensors, for who writes it to a file.
#pragma once

#include <c10/util/FunctionRef.h>

#include <memory>
#include <string>
#include <vector>

#include "interchange/step_counters.h"
#include "lazy_backend/function_trace.h"
#include "reprise/export.h"

namespace reprise {

/// Runs the function on other tensors in the places of its arguments.
using FunctionBody = c10::function_ref<detail::Pack(const std::vector<at::Tensor>&)>;

/// A size of an argument that was marked (reprise/dynamic.h).
struct MarkedSize {
  size_t argument;
  int64_t dim;
  uint32_t symbol;
};

struct TracedFunction {
  FunctionTrace run;
  std::unique_ptr<Program> program = std::make_unique<Program>();
  std::vector<at::Tensor> results;
  std::vector<int64_t> order;  ///< the program's input that each argument is
  /// Copies of what it was given, on the backing device, where they are wanted.
  std::vector<at::Tensor> arguments;
  std::vector<MarkedSize> marks;
  std::string trace;  ///< docs/trace_format.md, over symbols where sizes were marked
  /// Further inputs of the trace, after the program's slots.
  std::vector<StepCounter> counters;

  /// A tensor that it uses beside its arguments.
  struct Weight {
    int64_t input;     ///< of the trace
    std::string name;  ///< what the module calls it, or `weight_` and the input
    at::Tensor tensor; ///< of the backing device; not a copy
    bool written;
    bool is_parameter;  ///< what has the name requires a gradient
    bool named;
  };
  std::vector<Weight> weights(const NamedTensors& named) const;

  bool writes_argument(size_t k) const;
  /// Whether it writes neither arguments nor weights, and no two results have elements in common,
  /// nor are parts of larger tensors.
  bool is_functional() const;
};

/// Whether a function may write tensors that are no arguments of it.
enum class WritesWeights : bool { kNo, kYes };

/// Runs `body` on lazy tensors, and at other sizes where sizes are marked. `keeps_arguments`:
/// `TracedFunction::arguments` are wanted, as memory again. Throws c10::Error,
/// which begins with `what`, for what cannot be written to a file: see reprise/export.h.
TracedFunction trace_function(const std::string& what, const std::vector<at::Tensor>& arguments,
                              FunctionBody body, WritesWeights writes, bool keeps_arguments);

/// A training step, which writes weights.
struct TracedStep {
  TracedFunction traced;
  /// Of each weight that is written (in the order of `TracedFunction::weights`), the values
  /// that it had before the run that was traced; an undefined tensor for the others.
  std::vector<at::Tensor> before;
};

/// As `trace_function`, of a function that does the same from its second or third call on, but
/// for what `optimizers` count. Throws c10::Error where it does not.
TracedStep trace_training_step(const std::string& what, const std::vector<at::Tensor>& arguments,
                               FunctionBody body, const OptimizerPtrs& optimizers);

/// In words: `batch, length (2 to 64)`.
std::string text_of(const std::vector<MarkedSize>& marks);

}  // namespace reprise
