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
#include "reprise/export.h"
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

/// Throws where the package gives other values than the function did.
void expect_same(const std::string& file, const std::vector<at::Tensor>& arguments,
                 const std::vector<at::Tensor>& results) {
  std::vector<at::Tensor> inputs;
  for (const at::Tensor& tensor : arguments) {
    Session::settle(lazy_storage(tensor));
    inputs.push_back(unwrap(tensor));
  }
  torch::inductor::AOTIModelPackageLoader loader(file);
  const std::vector<at::Tensor> outputs = loader.run(inputs);
  for (size_t k = 0; k < outputs.size(); ++k) {
    const at::Tensor expected = unwrap(results[k]);
    const bool exact = !c10::isFloatingType(expected.scalar_type()) && !expected.is_complex();
    const bool low = expected.scalar_type() == c10::kHalf || expected.scalar_type() == c10::kBFloat16;
    const double tolerance = exact ? 0 : low ? 2e-2 : 1e-3;
    TORCH_CHECK(outputs[k].sizes() == expected.sizes() && outputs[k].scalar_type() == expected.scalar_type() &&
                    at::allclose(outputs[k], expected, tolerance, tolerance, /*equal_nan=*/true),
                "reprise: export_package: the package gives other values than the function did; nothing was written");
  }
}

}  // namespace

namespace detail {

void export_function(Pack&& pack, FunctionBody body, const NamedTensors& named, const std::string& path,
                     const ExportOptions& options) {
  const std::vector<at::Tensor>& arguments = pack.tensors;
  const std::string file = std::filesystem::absolute(path).string();
  TORCH_CHECK_VALUE(file.ends_with(".pt2"), "reprise: export_package to '", path,
                    "': a package's name ends in .pt2");
  TORCH_CHECK_VALUE(options.input_names.empty() || options.input_names.size() == arguments.size(),
                    "reprise: export_package: ", options.input_names.size(), " names for ",
                    arguments.size(), " tensors");
  TORCH_CHECK_VALUE(!options.target || options.target->device == "cuda",
                    "reprise: export_package: nothing can be compiled for another device than "
                    "cuda, and '", options.target->device, "' was named");
  TORCH_CHECK_VALUE(!options.entry.empty() && options.entry.find_first_of("/.") == std::string::npos,
                    "reprise: export_package: a program cannot be called '", options.entry, "'");
  const c10::AutoGradMode no_grad(false);
  const TracedFunction traced = trace_function("reprise: export_package", arguments, body, WritesWeights::kNo);
  std::string trace = traced.trace;

  std::vector<c10::IValue> weights;
  std::string weight_names;
  for (const TracedFunction::Weight& weight : traced.weights(named)) {
    weight_names += (weights.empty() ? "" : ",") + json_text(weight.name);
    weights.emplace_back(weight.tensor.to(c10::kCPU).clone());
  }
  const TemporaryFile weights_file(file + ".weights-" + std::to_string(::getpid()));
  {
    const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(weights)));
    std::ofstream out(weights_file.path(), std::ios::binary);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    TORCH_CHECK(out.flush().good(), "reprise: export_package: '", weights_file.path(),
                "' cannot be written");
  }

  const ProgramInputs wanted = inputs_of(traced, arguments, options.input_names);
  std::string names, numbers;
  for (size_t k = 0; k < traced.order.size(); ++k) {
    numbers += (k > 0 ? "," : "") + std::to_string(traced.order[k]);
    names += (k > 0 ? "," : "") + wanted.inputs[k].name;
  }
  constexpr std::string_view kHeader = "{\"format\":1,";
  if (options.target) {
    trace.insert(kHeader.size(), "\"target\":" + json_text(options.target->architecture) + ",");
  }
  trace.insert(kHeader.size(), "\"export\":{\"arguments\":[" + numbers + "],\"weights\":" +
                                   json_text(weights_file.path()) + ",\"names\":[" + weight_names +
                                   "],\"metadata\":{\"inputs\":" + json_text(names) + ",\"symbols\":" +
                                   json_text(text_of(traced.marks)) + "," + json_text(kInputsKey) + ":" +
                                   json_text(text_of(wanted)) + "}},");
  // Beside the file that it becomes, which stays what it is until all has gone well.
  const TemporaryFile compiled(file + ".compiled-" + std::to_string(::getpid()) + ".pt2");
  const TemporaryFile guards(compiled.path() + ".guards");
  CompileQueue::get().compile_package(trace, compiled.path());
  if (!options.target) expect_same(compiled.path(), arguments, traced.results);
  Pt2Archive program(compiled.path());
  std::optional<Pt2Archive> others;
  if (options.add_to_file && std::filesystem::exists(file)) others.emplace(file);
  write_package(file, others ? &*others : nullptr, program, options.entry);
}

}  // namespace detail
}  // namespace reprise
