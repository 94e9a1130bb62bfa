/// \file
/// The functions of reprise/export.h.
#include <ATen/core/ivalue.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

#include "compiler_bridge/compile_queue.h"
#include "compiler_bridge/trace_writer.h"
#include "interchange/package_metadata.h"
#include "lazy_backend/device.h"
#include "lazy_backend/function_trace.h"
#include "lazy_backend/interpreter.h"
#include "lazy_backend/json_text.h"
#include "lazy_backend/session.h"
#include "reprise/export.h"
#include "symint/general_trace.h"
#include "symint/symbols.h"

namespace reprise {
namespace {

/// A file that goes with the object.
class TemporaryFile {
 public:
  explicit TemporaryFile(std::string path) : path_(std::move(path)) {}
  ~TemporaryFile() {
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  const std::string& path() const { return path_; }

 private:
  const std::string path_;
};

/// Traces of functions that are exported are met once.
uint64_t next_function() {
  static std::atomic<uint64_t> next{uint64_t{1} << 31};
  return next.fetch_add(1);
}

using Body = c10::function_ref<detail::Pack(const std::vector<at::Tensor>&)>;

/// A function as it ran once, and as the compiler is told.
struct Exported {
  FunctionTrace run;
  std::unique_ptr<Program> program = std::make_unique<Program>();
  std::vector<at::Tensor> results;
  std::vector<int64_t> order;  ///< the program's input that each argument is
  std::string trace;
};

Exported trace_once(const std::vector<at::Tensor>& arguments, Body body) {
  Exported out;
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
              "reprise: export_package: the function does nothing that can be exported",
              run.broken_by.empty() ? "" : ": ", run.broken_by);

  Program& program = *out.program;
  program.steps = run.steps;
  program.device_index = run.steps.back()->device_index;
  const auto is_argument = [&](const LazyStorage* storage) {
    return std::any_of(arguments.begin(), arguments.end(),
                       [&](const at::Tensor& tensor) { return lazy_storage(tensor) == storage; });
  };
  for (const StepPtr& step : run.steps) {
    TORCH_CHECK(step->randomness == Randomness::kNone, "reprise: export_package: ",
                step->op.operator_name(), " draws random numbers; is the module in training mode?");
    for (const uint32_t slot : step->written) {
      TORCH_CHECK(run.inputs[slot] == nullptr || is_argument(run.inputs[slot].get()),
                  "reprise: export_package: ", step->op.operator_name(),
                  " writes a tensor that is no argument; hand it in as one, or put the module "
                  "into eval mode");
    }
  }
  for (const at::Tensor& tensor : out.results) {
    const auto made = std::find_if(run.created.begin(), run.created.end(), [&](const auto& each) {
      return tensor.defined() && is_lazy(tensor) && each.second.get() == lazy_storage(tensor);
    });
    TORCH_CHECK(made != run.created.end(), "reprise: export_package: the function returns a tensor "
                "that it has not made; clone it");
    program.results.emplace_back(made->first, Geometry(*tensor.unsafeGetTensorImpl()));
  }
  out.trace = write_trace(program);
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
    TORCH_CHECK(found >= 0, "reprise: export_package: argument ", k,
                " is not used, or only through a view of a part of it");
    TORCH_CHECK(std::find(out.order.begin(), out.order.end(), found) == out.order.end(),
                "reprise: export_package: argument ", k, " is another one again");
    out.order.push_back(found);
  }
  return out;
}

/// The sizes of the arguments that were marked.
struct Mark {
  size_t argument;
  int64_t dim;
  uint32_t symbol;
};
std::vector<Mark> marks_of(const std::vector<at::Tensor>& arguments) {
  std::vector<Mark> marks;
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

/// In words: `batch, length (2 to 64)`.
std::string text_of(const std::vector<Mark>& marks) {
  std::string out;
  std::vector<uint32_t> told;
  for (const Mark& mark : marks) {
    if (std::find(told.begin(), told.end(), mark.symbol) != told.end()) continue;
    told.push_back(mark.symbol);
    out += (out.empty() ? "" : ", ") +
           SymbolicTrace::text_of(mark.symbol, Session::current().range_of(mark.symbol));
  }
  return out;
}

/// The trace as one over symbols: the function runs at other sizes, and what changes with
/// them must follow from them.
std::string over_symbols(const Exported& first, const std::vector<at::Tensor>& arguments,
                         const std::vector<Mark>& marks, Body body) {
  constexpr uint32_t kTrials = 5;
  constexpr size_t kEnough = 4;  // traces, the first one with them
  const SplitTrace split(first.trace);
  std::vector<std::vector<int64_t>> members;
  std::string problem;
  for (uint32_t trial = 0; trial < kTrials && members.size() + 1 < kEnough; ++trial) {
    std::vector<uint32_t> symbols;  // in the order in which they come
    std::vector<at::Tensor> other = arguments;
    for (const Mark& mark : marks) {
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
      const Exported there = trace_once(other, body);
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
  TORCH_CHECK(members.size() > 2, "reprise: export_package: ", text_of(marks),
              " cannot be another size: ", problem);
  const auto general = GeneralTrace::make(split, members, &problem);
  TORCH_CHECK(general && general->number_count() == 0, "reprise: export_package: what changes with ",
              text_of(marks), " does not follow from it: ", problem);
  return general->text();
}

/// What a package of this trace wants of its arguments.
ProgramInputs inputs_of(const std::string& trace, const std::vector<at::Tensor>& arguments,
                        const std::vector<int64_t>& order, const std::vector<Mark>& marks,
                        const std::vector<std::string>& names) {
  const auto json = nlohmann::json::parse(trace);
  ProgramInputs out;
  for (size_t k = 0; k < order.size(); ++k) {
    const auto& sizes = json.at("inputs").at(static_cast<size_t>(order[k])).at("sizes");
    ProgramInputs::Input& input = out.inputs.emplace_back();
    input.name = names.empty() ? "input_" + std::to_string(k) : names[k];
    input.dtype = arguments[k].scalar_type();
    for (const auto& size : sizes) {
      const Expression expression = size.is_number() ? Expression::constant(size.get<int64_t>())
                                                     : Expression::parse(size.get<std::string>());
      if (expression.kind() == Expression::Kind::kSymbol) {
        // What the user said of the size that is this symbol.
        const auto symbol = static_cast<size_t>(expression.value());
        if (out.symbols.size() <= symbol) out.symbols.resize(symbol + 1);
        for (const Mark& mark : marks) {
          if (mark.argument != k || mark.dim != static_cast<int64_t>(input.sizes.size())) continue;
          const SymbolicTrace::Range range = Session::current().range_of(mark.symbol);
          out.symbols[symbol] = {symbol_name(mark.symbol), range.least, range.most};
        }
      }
      input.sizes.emplace_back(expression);
    }
  }
  return out;
}

/// What a module calls the tensor that an input of the trace is; empty where it is none.
std::string name_of(const ProgramInput& input, const LazyStorage& storage, const detail::NamedTensors& named) {
  for (const auto& [name, tensor] : named) {
    if (is_lazy(tensor) && lazy_storage(tensor) == &storage &&
        Geometry(*tensor.unsafeGetTensorImpl()) == input.geometry) {
      return name;
    }
  }
  return "";
}

}  // namespace

namespace detail {

void export_function(Pack&& pack, Body body, const NamedTensors& named, const std::string& path,
                     const ExportOptions& options) {
  const std::vector<at::Tensor>& arguments = pack.tensors;
  const std::string file = std::filesystem::absolute(path).string();
  TORCH_CHECK_VALUE(file.ends_with(".pt2"), "reprise: export_package to '", path,
                    "': a package's name ends in .pt2");
  for (size_t k = 0; k < arguments.size(); ++k) {
    TORCH_CHECK(is_lazy(arguments[k]), "reprise: export_package: argument ", k,
                " of the example is no lazy tensor; move it, and the module, with "
                ".to(torch::kLazy)");
  }
  TORCH_CHECK_VALUE(options.input_names.empty() || options.input_names.size() == arguments.size(),
                    "reprise: export_package: ", options.input_names.size(), " names for ",
                    arguments.size(), " tensors");
  TORCH_CHECK_VALUE(!options.target || options.target->device == "cuda",
                    "reprise: export_package: nothing can be compiled for another device than "
                    "cuda, and '", options.target->device, "' was named");
  TORCH_CHECK(!Session::current().in_function(), "reprise: export_package within a compiled function");
  const c10::AutoGradMode no_grad(false);
  const Exported exported = trace_once(arguments, body);
  const FunctionTrace& run = exported.run;
  const Program& program = *exported.program;
  const std::vector<int64_t>& order = exported.order;
  const std::vector<Mark> marks = marks_of(arguments);
  std::string trace = marks.empty() ? exported.trace : over_symbols(exported, arguments, marks, body);

  std::vector<c10::IValue> weights;
  std::string weight_names;
  for (size_t input = 0; input < program.inputs.size(); ++input) {
    if (std::find(order.begin(), order.end(), static_cast<int64_t>(input)) != order.end()) continue;
    const ProgramInput& each = program.inputs[input];
    TORCH_CHECK(each.kind == ProgramInput::Kind::kSlot,
                "reprise: export_package: a number in the function changes");
    const std::string name = name_of(each, *run.inputs[each.index], named);
    weight_names += (weights.empty() ? "" : ",") + json_text(name.empty() ? "weight_" + std::to_string(input) : name);
    weights.emplace_back(
        backing_tensor(run.inputs[each.index]->backing(), each.geometry).to(c10::kCPU).clone());
  }
  const TemporaryFile weights_file(file + ".weights-" + std::to_string(next_function()));
  {
    const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(weights)));
    std::ofstream out(weights_file.path(), std::ios::binary);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    TORCH_CHECK(out.flush().good(), "reprise: export_package: '", weights_file.path(),
                "' cannot be written");
  }

  std::string names, numbers;
  for (size_t k = 0; k < order.size(); ++k) {
    numbers += (k > 0 ? "," : "") + std::to_string(order[k]);
    names += (k > 0 ? "," : "") +
             (options.input_names.empty() ? "input_" + std::to_string(k) : options.input_names[k]);
  }
  const ProgramInputs wanted = inputs_of(trace, arguments, order, marks, options.input_names);
  constexpr std::string_view kHeader = "{\"format\":1,";
  if (options.target) {
    trace.insert(kHeader.size(), "\"target\":" + json_text(options.target->architecture) + ",");
  }
  trace.insert(kHeader.size(), "\"export\":{\"arguments\":[" + numbers + "],\"weights\":" +
                                   json_text(weights_file.path()) + ",\"names\":[" + weight_names +
                                   "],\"metadata\":{\"inputs\":" + json_text(names) + ",\"symbols\":" +
                                   json_text(text_of(marks)) + "," + json_text(kInputsKey) + ":" +
                                   json_text(text_of(wanted)) + "}},");
  CompileQueue::get().compile_package(trace, file);

  if (options.target) return;

  // It gives what the function gave.
  std::vector<at::Tensor> inputs;
  for (const at::Tensor& tensor : arguments) {
    Session::settle(lazy_storage(tensor));
    inputs.push_back(unwrap(tensor));
  }
  torch::inductor::AOTIModelPackageLoader loader(file);
  const std::vector<at::Tensor> outputs = loader.run(inputs);
  for (size_t k = 0; k < outputs.size(); ++k) {
    const at::Tensor expected = unwrap(exported.results[k]);
    const bool exact = !c10::isFloatingType(expected.scalar_type()) && !expected.is_complex();
    const bool low = expected.scalar_type() == c10::kHalf || expected.scalar_type() == c10::kBFloat16;
    const double tolerance = exact ? 0 : low ? 2e-2 : 1e-3;
    if (outputs[k].sizes() == expected.sizes() && outputs[k].scalar_type() == expected.scalar_type() &&
        at::allclose(outputs[k], expected, tolerance, tolerance, /*equal_nan=*/true)) {
      continue;
    }
    std::error_code ignored;
    std::filesystem::remove(file, ignored);
    TORCH_CHECK(false, "reprise: export_package: the package gives other values than the function "
                "did; nothing was written");
  }
}

}  // namespace detail
}  // namespace reprise
