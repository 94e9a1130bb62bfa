/// \file
/// A trace as a TorchScript module.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/csrc/jit/ir/ir.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>

#include "interchange/traced_function.h"
#include "lazy_backend/schema_type.h"
#include "reprise/torchscript.h"
#include "symint/expression.h"

namespace reprise {
namespace {

using Json = nlohmann::json;
using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

c10::ScalarType dtype_named(const std::string& name) {
  for (int k = 0; k < static_cast<int>(c10::ScalarType::NumOptions); ++k) {
    const auto dtype = static_cast<c10::ScalarType>(k);
    const auto [own, legacy] = c10::getDtypeNames(dtype);
    if (name == own || name == legacy) return dtype;
  }
  TORCH_CHECK(false, "reprise: export_torchscript: no dtype is called ", name);
}

int64_t memory_format_named(const std::string& name) {
  if (name == "contiguous_format") return static_cast<int64_t>(c10::MemoryFormat::Contiguous);
  if (name == "preserve_format") return static_cast<int64_t>(c10::MemoryFormat::Preserve);
  if (name == "channels_last") return static_cast<int64_t>(c10::MemoryFormat::ChannelsLast);
  return static_cast<int64_t>(c10::MemoryFormat::ChannelsLast3d);
}

double float_of(const Json& text) { return std::strtod(text.get<std::string>().c_str(), nullptr); }

/// Modules that hold the tensors, in submodules as their names say.
class Holder {
 public:
  Holder(std::shared_ptr<torch::jit::CompilationUnit> unit, const std::string& name)
      : unit_(std::move(unit)), name_(name), module_(c10::QualifiedName("__torch__.reprise." + name), unit_) {}

  void add(const std::string& name, const at::Tensor& tensor, bool is_parameter) {
    const size_t dot = name.find('.');
    if (dot == std::string::npos) {
      module_.register_parameter(name, tensor, /*is_buffer=*/!is_parameter);
      return;
    }
    const std::string part = name.substr(0, dot);
    auto child = children_.find(part);
    if (child == children_.end()) {
      child = children_.emplace(part, std::make_unique<Holder>(unit_, name_ + "_" + part)).first;
      module_.register_module(part, child->second->module_);
    }
    child->second->add(name.substr(dot + 1), tensor, is_parameter);
  }
  Module& module() { return module_; }

 private:
  std::shared_ptr<torch::jit::CompilationUnit> unit_;
  std::string name_;
  Module module_;
  std::map<std::string, std::unique_ptr<Holder>> children_;
};

class ScriptWriter {
 public:
  ScriptWriter(const Json& trace, Graph& graph) : trace_(trace), graph_(graph) {}

  void define(size_t value, Value* is) { values_[value] = is; }

  /// The symbols, from the sizes of an argument.
  void take_symbols(size_t input) {
    const Json& sizes = trace_.at("inputs").at(input).at("sizes");
    for (size_t dim = 0; dim < sizes.size(); ++dim) {
      if (!sizes[dim].is_string()) continue;
      const Expression expression = Expression::parse(sizes[dim].get<std::string>());
      if (expression.kind() != Expression::Kind::kSymbol) continue;
      const auto symbol = static_cast<size_t>(expression.value());
      if (symbols_.contains(symbol)) continue;
      symbols_[symbol] = graph_.insert(c10::aten::size, {values_.at(input), static_cast<int64_t>(dim)});
    }
  }

  void write_step(const Json& step) {
    const c10::OperatorName name(step.at("op").get<std::string>(), step.at("overload").get<std::string>());
    TORCH_CHECK(!name.name.starts_with("reprise::"), "reprise: export_torchscript: ", name,
                " is an op of Reprise's own, which TorchScript has not");
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.name.c_str(), name.overload_name.c_str());
    const auto& declared = op.schema().arguments();
    const auto& returns = op.schema().returns();
    std::vector<Value*> inputs;
    for (size_t k = 0; k < declared.size(); ++k) {
      inputs.push_back(argument(step.at("args").at(k), declared[k].type()));
    }
    Node* node = graph_.insertNode(graph_.create(c10::Symbol::fromQualString(name.name), inputs, returns.size()));
    for (size_t k = 0; k < returns.size(); ++k) node->output(k)->setType(returns[k].type());
    TORCH_CHECK(node->maybeSchema() != nullptr, "reprise: export_torchscript: TorchScript has no ", name,
                " for these arguments");
    const Json& results = step.at("results");
    for (size_t k = 0; k < results.size(); ++k) {
      if (results[k].is_null()) continue;
      if (results[k].contains("value")) {
        values_[results[k].at("value").get<size_t>()] = node->output(k);
        continue;
      }
      const Json& items = results[k].at("list");
      Node* unpack = graph_.insertNode(graph_.createListUnpack(node->output(k), items.size()));
      for (size_t item = 0; item < items.size(); ++item) {
        if (!items[item].is_null()) values_[items[item].at("value").get<size_t>()] = unpack->output(item);
      }
    }
  }

  void write_outputs() {
    std::vector<Value*> outputs;
    for (const Json& output : trace_.at("outputs")) outputs.push_back(values_.at(output.get<size_t>()));
    TORCH_CHECK(!outputs.empty(), "reprise: export_torchscript: the function returns no tensor");
    graph_.registerOutput(outputs.size() == 1 ? outputs[0]
                                              : graph_.insertNode(graph_.createTuple(outputs))->output());
  }

 private:
  Value* argument(const Json& json, const c10::TypePtr& declared) {
    if (json.is_null()) return graph_.insertConstant(c10::IValue());
    const std::string kind = json.begin().key();
    const Json& value = json.begin().value();
    if (kind == "value") return values_.at(value.get<size_t>());
    if (kind == "int") return graph_.insertConstant(value.get<int64_t>());
    if (kind == "bool") return graph_.insertConstant(value.get<bool>());
    if (kind == "str") return graph_.insertConstant(value.get<std::string>());
    if (kind == "float") return graph_.insertConstant(float_of(value));
    if (kind == "complex") return graph_.insertConstant(c10::complex<double>(float_of(value[0]), float_of(value[1])));
    if (kind == "dtype") return graph_.insertConstant(static_cast<int64_t>(dtype_named(value.get<std::string>())));
    if (kind == "layout") return graph_.insertConstant(static_cast<int64_t>(c10::Layout::Strided));
    if (kind == "memory_format") return graph_.insertConstant(memory_format_named(value.get<std::string>()));
    if (kind == "device") return graph_.insertConstant(c10::Device(value.get<std::string>()));
    if (kind == "expr") return number(Expression::parse(value.get<std::string>()));
    TORCH_CHECK(kind == "list", "reprise: export_torchscript: arguments of kind ", kind, " have no place in it");
    const auto list = without_optional(declared)->cast<c10::ListType>();
    TORCH_CHECK(list != nullptr, "reprise: export_torchscript: a list for an argument of type ", declared->str());
    std::vector<Value*> items;
    for (const Json& item : value) items.push_back(argument(item, list->getElementType()));
    return graph_.insertNode(graph_.createList(list->getElementType(), items))->output();
  }

  Value* number(const Expression& expression) {
    using Kind = Expression::Kind;
    if (expression.kind() == Kind::kConstant) return graph_.insertConstant(expression.value());
    if (expression.kind() == Kind::kSymbol) return symbols_.at(static_cast<size_t>(expression.value()));
    static const std::map<Kind, const char*> ops{
        {Kind::kAdd, "aten::add"}, {Kind::kSubtract, "aten::sub"}, {Kind::kMultiply, "aten::mul"},
        {Kind::kFloorDivide, "aten::floordiv"}, {Kind::kModulo, "aten::remainder"},
        {Kind::kMin, "prim::min"}, {Kind::kMax, "prim::max"}};
    const auto op = ops.find(expression.kind());
    TORCH_CHECK(op != ops.end(), "reprise: export_torchscript: ", expression.text(), " is no size");
    Value* result = number(expression.operands()[0]);
    for (size_t k = 1; k < expression.operands().size(); ++k) {
      result = graph_.insert(c10::Symbol::fromQualString(op->second), {result, number(expression.operands()[k])});
    }
    return result;
  }

  const Json& trace_;
  Graph& graph_;
  std::map<size_t, Value*> values_, symbols_;
};

/// Type names are the compilation unit's, and Python puts all of them into one.
std::string next_name() {
  static std::atomic<int> next{0};
  return "Exported" + std::to_string(next.fetch_add(1));
}

}  // namespace

namespace detail {

Module export_script(Pack&& pack, FunctionBody body, const NamedTensors& named,
                     const std::vector<std::string>& input_names) {
  const std::vector<at::Tensor>& arguments = pack.tensors;
  TORCH_CHECK_VALUE(input_names.empty() || input_names.size() == arguments.size(),
                    "reprise: export_torchscript: ", input_names.size(), " names for ", arguments.size(), " tensors");
  const c10::AutoGradMode no_grad(false);
  const TracedFunction traced =
      trace_function("reprise: export_torchscript", arguments, body, WritesWeights::kYes, /*keeps_arguments=*/false);
  const Json trace = Json::parse(traced.trace);

  Holder holder(std::make_shared<torch::jit::CompilationUnit>(), next_name());
  const std::vector<TracedFunction::Weight> weights = traced.weights(named);
  for (const auto& weight : weights) {
    const at::Tensor copy = weight.tensor.clone();
    const bool is_parameter = !weight.written && copy.is_floating_point();
    holder.add(weight.name, is_parameter ? copy.set_requires_grad(true) : copy, is_parameter);
  }

  const auto graph = std::make_shared<Graph>();
  ScriptWriter writer(trace, *graph);
  Module& module = holder.module();
  Value* self = graph->addInput("self")->setType(module._ivalue()->type());
  for (size_t k = 0; k < arguments.size(); ++k) {
    Value* input = graph->addInput(input_names.empty() ? "input_" + std::to_string(k) : input_names[k]);
    writer.define(static_cast<size_t>(traced.order[k]), input->setType(c10::TensorType::get()));
  }
  for (size_t k = 0; k < arguments.size(); ++k) writer.take_symbols(static_cast<size_t>(traced.order[k]));
  for (const auto& weight : weights) {
    Value* value = self;
    std::string name = weight.name;
    for (size_t dot; (dot = name.find('.')) != std::string::npos; name.erase(0, dot + 1)) {
      value = graph->insertGetAttr(value, name.substr(0, dot));
    }
    writer.define(static_cast<size_t>(weight.input), graph->insertGetAttr(value, name));
  }
  for (const Json& step : trace.at("steps")) writer.write_step(step);
  writer.write_outputs();
  graph->lint();

  const auto type = module.type();
  auto* method = type->compilation_unit()->create_function(c10::QualifiedName(*type->name(), "forward"), graph);
  type->addMethod(method);
  return module;
}

}  // namespace detail
}  // namespace reprise
