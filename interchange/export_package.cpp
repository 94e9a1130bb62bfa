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
#include <nlohmann/json.hpp>

#include "compiler_bridge/compile_queue.h"
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

void expect_close(const std::string& what, const at::Tensor& actual, const at::Tensor& expected) {
  const bool exact = !c10::isFloatingType(expected.scalar_type()) && !expected.is_complex();
  const bool low = expected.scalar_type() == c10::kHalf || expected.scalar_type() == c10::kBFloat16;
  const double tolerance = exact ? 0 : low ? 2e-2 : 1e-3;
  TORCH_CHECK(actual.sizes() == expected.sizes() && actual.scalar_type() == expected.scalar_type() &&
                  at::allclose(actual, expected, tolerance, tolerance, /*equal_nan=*/true),
              "reprise: what was exported gives other values than the function did (", what, "); nothing was written");
}

/// A function that has run, as the compiler gets it.
struct Exported {
  TracedStep step;
  std::vector<TracedFunction::Weight> weights;
  std::vector<std::pair<std::string, at::Tensor>> copies;  ///< of the weights, on the host
  PackagedWeights packaged;
  std::string trace;
  std::unique_ptr<TemporaryFile> weights_file;
};

std::vector<at::Tensor> on_backing_device(const std::vector<at::Tensor>& arguments) {
  std::vector<at::Tensor> inputs;
  for (const at::Tensor& tensor : arguments) {
    Session::settle(lazy_storage(tensor));
    inputs.push_back(unwrap(tensor));
  }
  return inputs;
}

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
      given.emplace(weights[k].name, weights[k].tensor);
    }
  }
  if (!given.empty()) {
    loader.load_constants(given, /*use_inactive=*/false, /*check_full_update=*/false, /*user_managed=*/true);
  }
  const std::vector<at::Tensor> outputs = loader.run(on_backing_device(arguments));
  for (size_t k = 0; k < outputs.size(); ++k) expect_close(c10::str("result ", k), outputs[k], unwrap(exported.step.traced.results[k]));
  for (size_t k = 0; k < weights.size(); ++k) {
    if (!weights[k].written) continue;
    expect_close(c10::str("'", weights[k].name, "' afterwards"), before[k], weights[k].tensor);  // written by now
  }
}

/// `format`: what Python is to write.
Exported run_and_describe(const std::string& what, const std::string& format, const std::string& file,
                          const std::vector<at::Tensor>& arguments, FunctionBody body, const NamedTensors& named,
                          const ExportOptions& options) {
  TORCH_CHECK_VALUE(file.ends_with(".pt2"), what, " to '", file, "': a package's name ends in .pt2");
  TORCH_CHECK_VALUE(options.input_names.empty() || options.input_names.size() == arguments.size(), what, ": ",
                    options.input_names.size(), " names for ", arguments.size(), " tensors");
  Exported out;
  const c10::AutoGradMode grad(options.training_step);
  out.step = options.training_step ? trace_training_step(what, arguments, body)
                                   : TracedStep{trace_function(what, arguments, body, WritesWeights::kNo), {}};
  const TracedFunction& traced = out.step.traced;
  const c10::AutoGradMode no_grad(false);
  NamedTensors all_names = options.weight_names;
  all_names.insert(all_names.end(), named.begin(), named.end());
  out.weights = traced.weights(all_names);
  out.packaged.in_program = options.weights == Weights::kInProgram;
  nlohmann::json weight_names = nlohmann::json::array(), parameters = weight_names;
  std::vector<c10::IValue> values;
  for (const TracedFunction::Weight& weight : out.weights) {
    const at::Tensor copy = weight.tensor.to(c10::kCPU).clone();
    weight_names.push_back(weight.name);
    parameters.push_back(weight.is_parameter);
    values.emplace_back(copy);
    out.copies.emplace_back(weight.name, copy);
    out.packaged.all.push_back({weight.name, copy.scalar_type(), copy.sizes().vec(), copy.strides().vec(),
                                weight.is_parameter, weight.written});
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
      run_and_describe("reprise: export_package", "package", file, pack.tensors, body, named, options);
  const c10::AutoGradMode no_grad(false);
  // Beside the file that it becomes, which stays what it is until all has gone well.
  const TemporaryFile compiled(file + ".compiled-" + std::to_string(::getpid()) + ".pt2");
  const TemporaryFile guards(compiled.path() + ".guards");
  CompileQueue::get().compile_package(exported.trace, compiled.path());
  if (!options.target) expect_same(compiled.path(), pack.tensors, exported);
  Pt2Archive program(compiled.path());
  std::optional<Pt2Archive> others;
  if (options.add_to_file && std::filesystem::exists(file)) others.emplace(file);
  using Stored = std::vector<std::pair<std::string, at::Tensor>>;
  write_package(file, others ? &*others : nullptr, program, options.entry,
                options.weights == Weights::kInFile ? exported.copies : Stored());
}

void export_program(Pack&& pack, FunctionBody body, const NamedTensors& named, const std::string& path,
                    const std::vector<std::string>& input_names, const NamedTensors& weight_names) {
  const std::string file = std::filesystem::absolute(path).string();
  const Exported exported =
      run_and_describe("reprise: export_program", "torch.export", file, pack.tensors, body, named,
                       {.input_names = input_names, .weight_names = weight_names});
  const c10::AutoGradMode no_grad(false);
  const TemporaryFile written(file + ".written-" + std::to_string(::getpid()) + ".pt2");
  CompileQueue::get().compile_package(exported.trace, written.path());
  const auto module = load_package(written.path());
  module->to(backing_device());
  const std::vector<at::Tensor> results = module->run(on_backing_device(pack.tensors));
  for (size_t k = 0; k < results.size(); ++k) expect_close(c10::str("result ", k), results[k], unwrap(exported.step.traced.results[k]));
  std::filesystem::rename(written.path(), file);
}

}  // namespace detail
}  // namespace reprise
