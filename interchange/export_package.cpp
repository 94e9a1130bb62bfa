/// \file
/// The functions of reprise/export.h.
#include <ATen/core/ivalue.h>
#include <ATen/ops/allclose.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "compiler_bridge/compile_queue.h"
#include "interchange/compiled_package.h"
#include "interchange/package_metadata.h"
#include "interchange/pt2_archive.h"
#include "interchange/temporary_file.h"
#include "interchange/traced_function.h"
#include "lazy_backend/json_text.h"
#include "lazy_backend/session.h"
#include "reprise/device.h"
#include "reprise/export.h"
#include "reprise/package.h"
#include "symint/symbols.h"

namespace reprise {
namespace {

/// What a package of this trace wants of its arguments.
ProgramInputs inputs_of(const TracedFunction& traced, const std::vector<at::Tensor>& arguments,
                        const std::vector<std::string>& names) {
  const auto json = nlohmann::json::parse(traced.trace);
  ProgramInputs out;
  for (size_t k = 0; k < arguments.size(); ++k) {
    const auto& sizes = json.at("inputs").at(static_cast<size_t>(traced.order[k])).at("sizes");
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
        for (const MarkedSize& mark : traced.marks) {
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

bool low_precision(const at::Tensor& tensor) {
  return tensor.scalar_type() == c10::kHalf || tensor.scalar_type() == c10::kBFloat16;
}

void expect(bool same, const std::string& what) {
  TORCH_CHECK(same, "reprise: what was exported gives other values than the function did (", what,
              "); nothing was written");
}

void expect_close(const std::string& what, const at::Tensor& actual, const at::Tensor& expected) {
  const bool exact = !c10::isFloatingType(expected.scalar_type()) && !expected.is_complex();
  const double tolerance = exact ? 0 : low_precision(expected) ? 2e-2 : 1e-3;
  expect(actual.sizes() == expected.sizes() && actual.scalar_type() == expected.scalar_type() &&
             at::allclose(actual, expected, tolerance, tolerance, /*equal_nan=*/true),
         what);
}

/// A function that has run, as the compiler gets it.
struct Exported {
  TracedStep step;
  std::vector<TracedFunction::Weight> weights;
  NamedTensors copies;  ///< of the weights, on the host
  PackagedWeights packaged;
  std::string trace;
  std::unique_ptr<TemporaryFile> weights_file;
};

/// Throws where the package does something else than the function did.
void expect_same(const std::string& file, const std::vector<at::Tensor>& arguments, const Exported& exported) {
  const auto& weights = exported.weights;
  const auto& before = exported.step.before;
  torch::inductor::AOTIModelPackageLoader loader(file);
  std::unordered_map<std::string, at::Tensor> given;
  for (size_t k = 0; k < weights.size(); ++k) {
    if (weights[k].written) {
      given.emplace(weights[k].name, before[k]);
    } else if (!exported.packaged.in_program) {
      given.emplace(weights[k].name, with_strides(weights[k].tensor, exported.packaged.all[k].strides));
    }
  }
  if (!given.empty()) {
    loader.load_constants(given, /*use_inactive=*/false, /*check_full_update=*/false, /*user_managed=*/true);
  }
  std::vector<at::Tensor> old;
  for (const at::Tensor& tensor : before) old.push_back(tensor.defined() ? tensor.clone() : at::Tensor());
  std::vector<at::Tensor> inputs = exported.step.traced.arguments;
  const std::vector<at::Tensor> outputs = loader.run(inputs);
  for (size_t k = 0; k < arguments.size(); ++k) {
    if (!exported.step.traced.writes_argument(k)) continue;
    expect_close(c10::str("argument ", k, ", which it writes"), inputs[k], unwrap(arguments[k]));
  }
  for (size_t k = 0; k < outputs.size(); ++k) expect_close(c10::str("result ", k), outputs[k], unwrap(exported.step.traced.results[k]));
  for (size_t k = 0; k < weights.size(); ++k) {
    if (!weights[k].written) continue;
    const std::string update = "the update of '" + weights[k].name + "'";
    expect_close(update, before[k], weights[k].tensor);  // written by now
    if (!before[k].is_floating_point()) continue;
    // An update is small beside what it changes.
    const at::Tensor wanted = (weights[k].tensor - old[k]).abs().max();
    const at::Tensor error = (before[k] - weights[k].tensor).abs().max();
    const double rounding = 8 * std::numeric_limits<float>::epsilon() * old[k].abs().max().item<double>();
    const double unit = low_precision(old[k]) ? 0x1p-7 / std::numeric_limits<float>::epsilon() : 1;
    expect(!(error.item<double>() > 0.02 * wanted.item<double>() + unit * rounding),
           c10::str(update, ", off by ", error.item<double>(), " where it is ", wanted.item<double>()));
  }
}

/// `format`: what Python is to write. `keeps_gradients`: what is written is to be
/// differentiated.
Exported run_and_describe(const std::string& what, const std::string& format, bool keeps_gradients, const std::string& file,
                          const std::vector<at::Tensor>& arguments, FunctionBody body, const NamedTensors& named,
                          const ExportOptions& options) {
  TORCH_CHECK_VALUE(file.ends_with(".pt2"), what, " to '", file, "': a package's name ends in .pt2");
  TORCH_CHECK_VALUE(options.input_names.empty() || options.input_names.size() == arguments.size(), what, ": ",
                    options.input_names.size(), " names for ", arguments.size(), " tensors");
  Exported out;
  const c10::AutoGradMode grad(options.training_step || keeps_gradients);
  out.step = options.training_step ? trace_training_step(what, arguments, body, options.optimizers)
                                   : TracedStep{trace_function(what, arguments, body, WritesWeights::kNo, /*keeps_arguments=*/true), {}};
  const TracedFunction& traced = out.step.traced;
  const c10::AutoGradMode no_grad(false);
  for (const StepPtr& step : traced.run.steps) {
    if (!keeps_gradients) break;
    // A trace has values; that one has two histories, or none, is not in it.
    TORCH_CHECK(step->op.schema().name() != "aten::detach" && step->grad_mode == traced.run.steps.front()->grad_mode,
                what, ": the function cuts a gradient (detach, NoGradGuard), which is not kept");
  }
  NamedTensors all_names = options.weight_names;
  all_names.insert(all_names.end(), named.begin(), named.end());
  const NamedTensors states = named_state(options.optimizers, all_names);
  all_names.insert(all_names.end(), states.begin(), states.end());
  out.weights = traced.weights(all_names);
  out.packaged.in_program = options.weights == Weights::kInProgram;
  nlohmann::json weight_names = nlohmann::json::array(), parameters = weight_names;
  std::vector<c10::IValue> values;
  std::set<std::string> taken;
  for (const TracedFunction::Weight& weight : out.weights) {
    TORCH_CHECK_VALUE(taken.insert(weight.name).second, what, ": two weights are called '", weight.name, "'");
    const at::Tensor copy = weight.tensor.to(c10::kCPU).clone();
    weight_names.push_back(weight.name);
    parameters.push_back(weight.is_parameter);
    values.emplace_back(copy);
    out.copies.emplace_back(weight.name, copy);
    out.packaged.all.push_back({weight.name, copy.scalar_type(), copy.sizes().vec(), copy.strides().vec(),
                                weight.is_parameter, weight.written, weight.named});
  }
  out.weights_file = std::make_unique<TemporaryFile>(file + ".weights-" + std::to_string(::getpid()));
  {
    const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(values)));
    std::ofstream stream(out.weights_file->path(), std::ios::binary);
    stream.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    TORCH_CHECK(stream.flush().good(), what, ": '", out.weights_file->path(), "' cannot be written");
  }

  const ProgramInputs wanted = inputs_of(traced, arguments, options.input_names);
  std::string names;
  for (const std::string& name : wanted.names()) names += (names.empty() ? "" : ",") + name;
  nlohmann::json ranges = nlohmann::json::array();
  for (const ProgramInputs::Symbol& symbol : wanted.symbols) ranges.push_back({symbol.least, symbol.most});
  const nlohmann::json description = {
      {"format", format},
      {"arguments", traced.order},
      {"inputs", wanted.names()},
      {"ranges", ranges},
      {"weights", out.weights_file->path()},
      {"in_program", out.packaged.in_program},
      {"names", weight_names},
      {"parameters", parameters},
      {"metadata",
       {{"inputs", names},
        {"symbols", text_of(traced.marks)},
        {kInputsKey, text_of(wanted)},
        {kFunctionalKey, traced.is_functional() ? "true" : "false"},
        {kWeightsKey, text_of(out.packaged)}}}};
  out.trace = traced.trace;
  constexpr std::string_view kHeader = "{\"format\":1,";
  if (options.target) {
    out.trace.insert(kHeader.size(), "\"target\":" + json_text(options.target->architecture) + ",");
  }
  out.trace.insert(kHeader.size(), "\"export\":" + description.dump() + ",");
  return out;
}

}  // namespace

namespace detail {

void export_function(Pack&& pack, FunctionBody body, const NamedTensors& named, const std::string& path,
                     const ExportOptions& options) {
  TORCH_CHECK_VALUE(!options.target || options.target->device == "cuda",
                    "reprise: export_package: nothing can be compiled for another device than "
                    "cuda, and '", options.target->device, "' was named");
  TORCH_CHECK_VALUE(!options.entry.empty() && options.entry.find_first_of("/.") == std::string::npos,
                    "reprise: export_package: a program cannot be called '", options.entry, "'");
  const std::string file = std::filesystem::absolute(path).string();
  const Exported exported =
      run_and_describe("reprise: export_package", "package", /*keeps_gradients=*/false, file, pack.tensors, body, named, options);
  const c10::AutoGradMode no_grad(false);
  // Beside the file that it becomes, which stays what it is until all has gone well.
  const TemporaryFile compiled(file + ".compiled-" + std::to_string(::getpid()) + ".pt2");
  const TemporaryFile guards(compiled.path() + ".guards");
  CompileQueue::get().compile_package(exported.trace, compiled.path());
  if (!options.target) expect_same(compiled.path(), pack.tensors, exported);
  Pt2Archive program(compiled.path());
  std::optional<Pt2Archive> others;
  if (options.add_to_file && std::filesystem::exists(file)) others.emplace(file);
  write_package(file, others ? &*others : nullptr, program, options.entry,
                options.weights == Weights::kInFile ? exported.copies : NamedTensors());
}

void export_program(Pack&& pack, FunctionBody body, const NamedTensors& named, const std::string& path,
                    const std::vector<std::string>& input_names, const NamedTensors& weight_names) {
  const std::string file = std::filesystem::absolute(path).string();
  const Exported exported =
      run_and_describe("reprise: export_program", "torch.export", /*keeps_gradients=*/true, file, pack.tensors, body, named,
                       {.input_names = input_names, .weight_names = weight_names});
  const c10::AutoGradMode no_grad(false);
  const TemporaryFile written(file + ".written-" + std::to_string(::getpid()) + ".pt2");
  CompileQueue::get().compile_package(exported.trace, written.path());
  const auto module = load_package(written.path());
  module->to(backing_device());
  const std::vector<at::Tensor> results = module->run(exported.step.traced.arguments);
  for (size_t k = 0; k < results.size(); ++k) expect_close(c10::str("result ", k), results[k], unwrap(exported.step.traced.results[k]));
  std::filesystem::rename(written.path(), file);
}

}  // namespace detail
}  // namespace reprise
