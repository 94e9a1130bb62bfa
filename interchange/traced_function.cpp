#include "interchange/traced_function.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <optional>
#include <tuple>

#include "compiler_bridge/trace_writer.h"
#include "interchange/compiled_package.h"
#include "lazy_backend/device.h"
#include "lazy_backend/interpreter.h"
#include "lazy_backend/session.h"
#include "symint/general_trace.h"

namespace reprise {
namespace {

/// Traces of functions that are exported are met once.
uint64_t next_function() {
  static std::atomic<uint64_t> next{uint64_t{1} << 31};
  return next.fetch_add(1);
}

/// What runs, and on what terms.
struct Subject {
  const std::string& what;
  FunctionBody body;
  WritesWeights writes;
  const OptimizerPtrs& optimizers;
};

/// The same elements at the same places from the first one on, in memory of their own.
at::Tensor copy_in_place(const at::Tensor& tensor) {
  Geometry geometry(*tensor.unsafeGetTensorImpl());
  geometry.offset = 0;
  const auto reach = static_cast<int64_t>(geometry.nbytes() / tensor.itemsize());
  return tensor.as_strided({reach}, {1}).clone().as_strided(tensor.sizes(), tensor.strides(), 0);
}

/// The steps with those numbers as dynamic scalars.
std::vector<StepPtr> with_scalars(std::vector<StepPtr> steps, const CountedNumbers& numbers) {
  for (const auto& [step, argument, number] : numbers.places) {
    const auto with = std::make_shared<Step>(*steps[step]);
    with->args[argument].dynamic = true;
    steps[step] = with;
  }
  return steps;
}

/// `keeps_arguments`: `TracedFunction::arguments` are wanted.
TracedFunction trace_once(const Subject& subject, const std::vector<at::Tensor>& arguments, bool keeps_arguments) {
  const auto& [what, body, writes, optimizers] = subject;
  TracedFunction out;
  const OptimizerState before = state_of(optimizers);
  for (const at::Tensor& argument : arguments) {
    if (!keeps_arguments) break;
    Session::settle(lazy_storage(argument));
    out.arguments.push_back(copy_in_place(unwrap(argument)));
  }
  Session& session = Session::current();
  session.begin_function(next_function(), "what is exported", /*whole=*/true, /*watch=*/false);
  try {
    out.results = body(arguments).tensors;
  } catch (...) {
    session.abandon_function();
    throw;
  }
  out.run = session.end_function();
  const FunctionTrace& run = out.run;
  TORCH_CHECK(run.broken_by.empty() && !run.steps.empty(),
              what, ": the function does nothing that can be exported",
              run.broken_by.empty() ? "" : ": ", run.broken_by);

  Program& program = *out.program;
  std::string problem;
  const CountedNumbers numbers = counted_numbers(run, before, state_of(optimizers), problem);
  TORCH_CHECK(problem.empty(), what, ": ", problem);
  program.steps = with_scalars(run.steps, numbers);
  program.device_index = run.steps.back()->device_index;
  const auto is_argument = [&](const LazyStorage* storage) {
    return std::any_of(arguments.begin(), arguments.end(),
                       [&](const at::Tensor& tensor) { return lazy_storage(tensor) == storage; });
  };
  for (const StepPtr& step : run.steps) {
    TORCH_CHECK(step->randomness == Randomness::kNone, what, ": ",
                step->op.operator_name(), " draws random numbers; is the module in training mode?");
    TORCH_CHECK(step->op.operator_name().name != kPackageCall, what,
                ": the function calls a package that was loaded, which cannot be put into another one");
    for (const uint32_t slot : step->written) {
      TORCH_CHECK(writes == WritesWeights::kYes || run.inputs[slot] == nullptr || is_argument(run.inputs[slot].get()),
                  what, ": ", step->op.operator_name(),
                  " writes a tensor that is no argument; hand it in as one, or put the module "
                  "into eval mode");
    }
  }
  for (size_t k = 0; k < out.results.size(); ++k) {
    const at::Tensor& tensor = out.results[k];
    const auto made = std::find_if(run.created.begin(), run.created.end(), [&](const auto& each) {
      return tensor.defined() && is_lazy(tensor) && each.second.get() == lazy_storage(tensor);
    });
    TORCH_CHECK(made != run.created.end(), what, ": result ", k, " is a tensor that the function "
                "has not made; clone it");
    program.results.emplace_back(made->first, Geometry(*tensor.unsafeGetTensorImpl()));
  }
  std::tie(out.trace, out.counters) = with_step_counters(write_trace(program), numbers);
  for (size_t k = 0; k < arguments.size(); ++k) {
    int64_t found = -1;
    for (size_t input = 0; input < program.inputs.size(); ++input) {
      const ProgramInput& each = program.inputs[input];
      if (each.kind == ProgramInput::Kind::kSlot &&
          run.inputs[each.index].get() == lazy_storage(arguments[k]) &&
          each.geometry.matches(*arguments[k].unsafeGetTensorImpl())) {
        found = static_cast<int64_t>(input);
      }
    }
    TORCH_CHECK(found >= 0, what, ": argument ", k,
                " is not used, or only through a view of a part of it");
    TORCH_CHECK(std::find(out.order.begin(), out.order.end(), found) == out.order.end(),
                what, ": argument ", k, " is another one again");
    out.order.push_back(found);
  }
  return out;
}

std::vector<MarkedSize> marks_of(const std::vector<at::Tensor>& arguments) {
  std::vector<MarkedSize> marks;
  for (size_t k = 0; k < arguments.size(); ++k) {
    const auto shape = symbolic_shape(arguments[k]);
    if (shape == nullptr) continue;
    for (int64_t dim = 0; dim < arguments[k].dim(); ++dim) {
      const Expression& size = shape->expressions()[static_cast<size_t>(dim)];
      if (size.kind() == Expression::Kind::kSymbol) {
        marks.push_back({k, dim, static_cast<uint32_t>(size.value())});
      }
    }
  }
  return marks;
}

/// The trace as one over symbols: the function runs at other sizes, and what changes with
/// them must follow from them.
std::string over_symbols(const Subject& subject, const TracedFunction& first,
                         const std::vector<at::Tensor>& arguments) {
  const std::string& what = subject.what;
  const std::vector<MarkedSize>& marks = first.marks;
  constexpr uint32_t kTrials = 5;
  constexpr size_t kEnough = 4;  // traces, the first one with them
  const SplitTrace split(first.trace);
  std::vector<std::vector<int64_t>> members;
  std::string problem;
  for (uint32_t trial = 0; trial < kTrials && members.size() + 1 < kEnough; ++trial) {
    std::vector<uint32_t> symbols;  // in the order in which they come
    std::vector<at::Tensor> other = arguments;
    for (size_t k = 0; k < arguments.size(); ++k) {
      if (!first.writes_argument(k)) continue;
      other[k] = copy_in_place(arguments[k].detach()).set_requires_grad(arguments[k].requires_grad());
    }
    for (const MarkedSize& mark : marks) {
      const auto known = std::find(symbols.begin(), symbols.end(), mark.symbol);
      const auto order = known - symbols.begin();
      if (known == symbols.end()) symbols.push_back(mark.symbol);
      const int64_t size = SymbolicTrace::trial_size(
          arguments[mark.argument].size(mark.dim), Session::current().range_of(mark.symbol),
          static_cast<size_t>(order), trial);
      at::Tensor& tensor = other[mark.argument];
      const at::Tensor places =
          at::arange(size, at::TensorOptions().dtype(c10::kLong)).remainder(tensor.size(mark.dim));
      tensor = tensor.index_select(mark.dim, places.to(tensor.device())).contiguous();
    }
    Session::current().mark_step("an example of another size is made");
    try {
      const TracedFunction there = trace_once(subject, other, /*keeps_arguments=*/false);
      const SplitTrace elsewhere(there.trace);
      TORCH_CHECK(elsewhere.skeleton() == split.skeleton(), "the function does something else there");
      if (std::find(members.begin(), members.end(), elsewhere.integers) == members.end()) {
        members.push_back(elsewhere.integers);
      }
    } catch (const c10::Error& error) {
      problem = error.what_without_backtrace();
    }
  }
  members.push_back(split.integers);
  TORCH_CHECK(members.size() > 2, what, ": ", text_of(marks),
              " cannot be another size: ", problem);
  const auto general = GeneralTrace::make(split, members, &problem);
  TORCH_CHECK(general && general->number_count() == 0, what, ": what changes with ",
              text_of(marks), " does not follow from it: ", problem);
  return general->text();
}

}  // namespace

std::string text_of(const std::vector<MarkedSize>& marks) {
  std::string out;
  std::vector<uint32_t> told;
  for (const MarkedSize& mark : marks) {
    if (std::find(told.begin(), told.end(), mark.symbol) != told.end()) continue;
    told.push_back(mark.symbol);
    out += (out.empty() ? "" : ", ") +
           SymbolicTrace::text_of(mark.symbol, Session::current().range_of(mark.symbol));
  }
  return out;
}

std::vector<TracedFunction::Weight> TracedFunction::weights(const NamedTensors& named) const {
  std::vector<Weight> weights;
  size_t input = 0;
  // Its scalars are what the counters, which have their places in the trace, are there for.
  for (; input < program->inputs.size() && program->inputs[input].kind == ProgramInput::Kind::kSlot; ++input) {
    const auto number = static_cast<int64_t>(input);
    if (std::find(order.begin(), order.end(), number) != order.end()) continue;
    const ProgramInput& each = program->inputs[input];
    const auto& storage = run.inputs[each.index];
    Weight weight{number, "weight_" + std::to_string(input), backing_tensor(storage->backing(), each.geometry), false,
                  false, false};
    for (const auto& [name, tensor] : named) {
      if (is_lazy(tensor) && lazy_storage(tensor) == storage.get() &&
          Geometry(*tensor.unsafeGetTensorImpl()) == each.geometry) {
        weight.name = name;
        weight.is_parameter = tensor.requires_grad();
        weight.named = true;
        break;
      }
    }
    for (const StepPtr& step : run.steps) {
      const auto& written = step->written;
      weight.written = weight.written || std::find(written.begin(), written.end(), each.index) != written.end();
    }
    const auto views = std::count_if(program->inputs.begin(), program->inputs.end(), [&](const ProgramInput& other) {
      return other.kind == ProgramInput::Kind::kSlot && other.index == each.index;
    });
    TORCH_CHECK(!weight.written || views == 1,
                "reprise: a tensor that the exported function writes is used through two views");
    weights.push_back(std::move(weight));
  }
  const auto options = at::TensorOptions(backing_device_of(program->device_index)).dtype(c10::kDouble);
  for (const StepCounter& counter : counters) {
    const std::string name = counters.size() == 1 ? "optimizer_step" : c10::str("optimizer_step_", counter.group);
    weights.push_back({static_cast<int64_t>(input++), name, at::scalar_tensor(counter.count, options),
                       /*written=*/true, /*is_parameter=*/false, /*named=*/false});
  }
  return weights;
}

bool TracedFunction::writes_argument(size_t k) const {
  const uint32_t slot = program->inputs[static_cast<size_t>(order[k])].index;
  return std::any_of(run.steps.begin(), run.steps.end(), [&](const StepPtr& step) {
    return std::find(step->written.begin(), step->written.end(), slot) != step->written.end();
  });
}

bool TracedFunction::is_functional() const {
  for (const StepPtr& step : run.steps) {
    for (const uint32_t slot : step->written) {
      if (run.inputs[slot] != nullptr) return false;
    }
  }
  std::map<uint32_t, size_t> made;  // slots, with their bytes
  for (const StepPtr& step : run.steps) {
    for_each_result(step->results, [&](const Result& result) {
      if (result.kind == Result::Kind::kNew) made.emplace(result.slot, result.nbytes);
    });
  }
  for (const auto& [slot, geometry] : program->results) {
    const auto whole = made.find(slot);  // each once
    if (whole == made.end() || geometry.offset != 0 || whole->second > geometry.nbytes()) return false;
    made.erase(whole);
  }
  return true;
}

namespace {

void expect_lazy(const std::string& what, const std::vector<at::Tensor>& arguments) {
  for (size_t k = 0; k < arguments.size(); ++k) {
    TORCH_CHECK(is_lazy(arguments[k]), what, ": argument ", k, " of the example is no lazy tensor; move it, and "
                "the module, with .to(torch::kLazy)");
  }
  TORCH_CHECK(!Session::current().in_function(), what, " within a compiled function");
}

/// What was traced once, over symbols where sizes are marked.
void generalise(const Subject& subject, TracedFunction& traced, const std::vector<at::Tensor>& arguments) {
  traced.marks = marks_of(arguments);
  if (traced.marks.empty()) return;
  // At other sizes it writes what it writes once more.
  Session::current().mark_step("an example has run");
  std::vector<std::pair<at::Tensor, at::Tensor>> written;
  for (TracedFunction::Weight& weight : traced.weights({})) {
    if (weight.written) written.emplace_back(weight.tensor, weight.tensor.clone());
  }
  const OptimizerState counted = state_of(subject.optimizers);
  const auto restore = [&] {
    restore_counts(counted);
    Session::current().mark_step("examples of other sizes have run");
    const c10::AutoGradMode no_grad(false);
    for (const auto& [tensor, before] : written) tensor.copy_(before);
  };
  try {
    traced.trace = over_symbols(subject, traced, arguments);
  } catch (...) {
    restore();
    throw;
  }
  restore();
}

}  // namespace

TracedFunction trace_function(const std::string& what, const std::vector<at::Tensor>& arguments,
                              FunctionBody body, WritesWeights writes, bool keeps_arguments) {
  expect_lazy(what, arguments);
  const OptimizerPtrs none;
  const Subject subject{what, body, writes, none};
  TracedFunction traced = trace_once(subject, arguments, keeps_arguments);
  generalise(subject, traced, arguments);
  return traced;
}

TracedStep trace_training_step(const std::string& what, const std::vector<at::Tensor>& arguments,
                               FunctionBody body, const OptimizerPtrs& optimizers) {
  // The first call makes an optimizer's state, and may find gradients.
  constexpr int kMostRuns = 4;
  expect_lazy(what, arguments);
  const Subject subject{what, body, WritesWeights::kYes, optimizers};
  TracedFunction last = trace_once(subject, arguments, /*keeps_arguments=*/false);
  for (int runs = 1; runs < kMostRuns; ++runs) {
    Session::current().mark_step("a training step has run");
    TracedStep step;
    for (const TracedFunction::Weight& weight : last.weights({})) {
      step.before.push_back(weight.written ? weight.tensor.clone() : at::Tensor());
    }
    step.traced = trace_once(subject, arguments, /*keeps_arguments=*/true);
    if (step.traced.trace == last.trace) {
      TORCH_CHECK(step.traced.run.inputs == last.run.inputs, what, ": the function uses a tensor that is another in "
                  "each call and no argument");
      generalise(subject, step.traced, arguments);
      return step;
    }
    last = std::move(step.traced);
  }
  TORCH_CHECK(false, what, ": the function does not do the same in each call; does a number in it change, a learning "
              "rate or Adam's bias correction? What ExportOptions::optimizers names counts its own steps");
}

}  // namespace reprise
