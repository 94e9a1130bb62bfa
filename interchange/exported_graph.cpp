#include "interchange/exported_graph.h"

#include <ATen/ScalarOps.h>
#include <ATen/autocast_mode.h>
#include <c10/core/GradMode.h>

#include <limits>
#include <nlohmann/json.hpp>

#include "lazy_backend/device.h"
#include "lazy_backend/schema_type.h"

namespace reprise {
namespace {

using Json = nlohmann::json;

double float_of(const Json& json) {
  if (json.is_number()) return json.get<double>();
  const std::string text = json.get<std::string>();
  if (text == "NaN") return std::numeric_limits<double>::quiet_NaN();
  const double infinity = std::numeric_limits<double>::infinity();
  return text.starts_with("-") ? -infinity : infinity;
}

c10::Layout layout_of(const Json& code) {
  // torch/_export/serde/schema.py, Layout
  switch (code.get<int>()) {
    case 1: return c10::Layout::Sparse;
    case 2: return c10::Layout::SparseCsr;
    case 3: return c10::Layout::SparseCsc;
    case 4: return c10::Layout::SparseBsr;
    case 5: return c10::Layout::SparseBsc;
    case 6: return c10::Layout::Mkldnn;
    case 7: return c10::Layout::Strided;
    default: TORCH_CHECK(false, "layout ", code.dump(), " is not known");
  }
}

c10::MemoryFormat memory_format_of(const Json& code) {
  // torch/_export/serde/schema.py, MemoryFormat
  switch (code.get<int>()) {
    case 1: return c10::MemoryFormat::Contiguous;
    case 2: return c10::MemoryFormat::ChannelsLast;
    case 3: return c10::MemoryFormat::ChannelsLast3d;
    case 4: return c10::MemoryFormat::Preserve;
    default: TORCH_CHECK(false, "memory format ", code.dump(), " is not known");
  }
}

c10::Device device_of(const Json& json) {
  const Json& index = json.at("index");
  const auto type = c10::Device(json.at("type").get<std::string>()).type();
  return {type, index.is_null() ? c10::DeviceIndex(-1) : index.get<c10::DeviceIndex>()};
}

/// A number where a tensor is wanted, as Python's arguments may be.
c10::IValue number_as_tensor(const c10::IValue& value) {
  if (!value.isInt() && !value.isDouble() && !value.isBool() && !value.isSymInt() && !value.isSymFloat()) return value;
  at::Tensor number = c10::scalar_to_tensor(value.toScalar());
  number.unsafeGetTensorImpl()->set_wrapped_number(true);
  return number;
}

/// As the dispatcher wants it for an argument of this type: Python passes integers for
/// floats, and one number for a list of a fixed length.
c10::IValue coerced(c10::IValue value, const c10::Argument& argument) {
  const auto type = without_optional(argument.real_type());
  if (type->kind() == c10::TypeKind::TensorType) return number_as_tensor(value);
  if (type->kind() == c10::TypeKind::FloatType && value.isInt()) return static_cast<double>(value.toInt());
  const auto list = type->cast<c10::ListType>();
  if (list == nullptr) return value;
  const auto element = list->getElementType()->kind();
  const auto length = static_cast<size_t>(argument.N().value_or(1));
  if (value.isInt()) return c10::List<int64_t>(std::vector<int64_t>(length, value.toInt()));
  if (value.isDouble()) return c10::List<double>(std::vector<double>(length, value.toDouble()));
  if (element == c10::TypeKind::FloatType && value.isIntList()) {
    const auto ints = value.toIntVector();
    return c10::List<double>(std::vector<double>(ints.begin(), ints.end()));
  }
  return value;
}

/// Autocast of one device type, as `torch.autocast` enters and leaves it.
class Autocast {
 public:
  Autocast(c10::DeviceType type, std::optional<c10::ScalarType> dtype, bool enabled, bool cache)
      : type_(type),
        enabled_(at::autocast::is_autocast_enabled(type)),
        cache_(at::autocast::is_autocast_cache_enabled()),
        dtype_(at::autocast::get_autocast_dtype(type)) {
    at::autocast::set_autocast_enabled(type, enabled);
    if (dtype) at::autocast::set_autocast_dtype(type, *dtype);
    at::autocast::set_autocast_cache_enabled(cache);
    at::autocast::increment_nesting();
  }
  ~Autocast() {
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(type_, enabled_);
    at::autocast::set_autocast_dtype(type_, dtype_);
    at::autocast::set_autocast_cache_enabled(cache_);
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  const c10::DeviceType type_;
  const bool enabled_, cache_;
  const c10::ScalarType dtype_;
};

}  // namespace

std::pair<std::string, const Json*> member_of(const Json& one) {
  TORCH_CHECK(one.is_object() && one.size() == 1, "there is no value in ", one.dump());
  return {one.begin().key(), &one.begin().value()};
}

c10::ScalarType dtype_of(const Json& code) {
  // torch/_export/serde/schema.py, ScalarType
  switch (code.get<int>()) {
    case 1: return c10::kByte;
    case 2: return c10::kChar;
    case 3: return c10::kShort;
    case 4: return c10::kInt;
    case 5: return c10::kLong;
    case 6: return c10::kHalf;
    case 7: return c10::kFloat;
    case 8: return c10::kDouble;
    case 9: return c10::kComplexHalf;
    case 10: return c10::kComplexFloat;
    case 11: return c10::kComplexDouble;
    case 12: return c10::kBool;
    case 13: return c10::kBFloat16;
    case 28: return c10::kUInt16;
    case 29: return c10::kFloat8_e4m3fn;
    case 30: return c10::kFloat8_e5m2;
    case 31: return c10::kFloat8_e4m3fnuz;
    case 32: return c10::kFloat8_e5m2fnuz;
    default: TORCH_CHECK(false, "dtype ", code.dump(), " is not known");
  }
}

std::optional<std::string> value_name(const Json& argument) {
  const auto [kind, value] = member_of(argument);
  if (kind == "as_tensor" || kind == "as_custom_obj") return value->at("name").get<std::string>();
  if (kind == "as_optional_tensor") return value_name(*value);
  if (kind == "as_sym_int" || kind == "as_sym_float" || kind == "as_sym_bool") return value_name(*value);
  if (kind == "as_name") return value->get<std::string>();
  return std::nullopt;
}

uint32_t ExportedGraph::number_of(const std::string& name) {
  return numbers_.try_emplace(name, static_cast<uint32_t>(numbers_.size())).first->second;
}

ExportedGraph::Operand ExportedGraph::operand_of(const Json& argument) {
  using Kind = Operand::Kind;
  Operand out;
  if (const auto name = value_name(argument)) {
    const auto known = numbers_.find(*name);
    TORCH_CHECK(known != numbers_.end(), "nothing makes '", *name, "'");
    out.kind = Kind::kValue;
    out.value = known->second;
    return out;
  }
  const auto [kind, value] = member_of(argument);
  const auto list_of = [&, items = value](Kind list) {
    out.kind = list;
    for (const Json& item : *items) {
      // Tensors of a list are named as such; numbers and optional tensors are unions again.
      out.items.push_back(operand_of(list == Kind::kTensors ? Json{{"as_tensor", item}} : item));
    }
  };
  if (kind == "as_none") {
  } else if (kind == "as_int") {
    out.constant = value->get<int64_t>();
  } else if (kind == "as_float") {
    out.constant = float_of(*value);
  } else if (kind == "as_bool") {
    out.constant = value->get<bool>();
  } else if (kind == "as_string") {
    out.constant = value->get<std::string>();
  } else if (kind == "as_complex") {
    out.constant = c10::complex<double>(float_of(value->at("real")), float_of(value->at("imag")));
  } else if (kind == "as_scalar_type") {
    out.constant = static_cast<int64_t>(dtype_of(*value));
  } else if (kind == "as_layout") {
    out.constant = static_cast<int64_t>(layout_of(*value));
  } else if (kind == "as_memory_format") {
    out.constant = static_cast<int64_t>(memory_format_of(*value));
  } else if (kind == "as_device") {
    out.kind = Kind::kDevice;
    out.constant = device_of(*value);
  } else if (kind == "as_ints") {
    out.constant = c10::List<int64_t>(value->get<std::vector<int64_t>>());
  } else if (kind == "as_bools") {
    c10::List<bool> bools;
    for (const Json& each : *value) bools.push_back(each.get<bool>());
    out.constant = std::move(bools);
  } else if (kind == "as_floats") {
    c10::List<double> floats;
    for (const Json& each : *value) floats.push_back(float_of(each));
    out.constant = std::move(floats);
  } else if (kind == "as_strings") {
    out.constant = c10::List<std::string>(value->get<std::vector<std::string>>());
  } else if (kind == "as_tensors") {
    list_of(Kind::kTensors);
  } else if (kind == "as_optional_tensors") {
    list_of(Kind::kOptionalTensors);
  } else if (kind == "as_sym_ints" || kind == "as_sym_floats" || kind == "as_sym_bools") {
    list_of(Kind::kNumbers);
  } else {
    TORCH_CHECK(false, "arguments of kind ", kind, " are not known");
  }
  return out;
}

void ExportedGraph::add_op(Node& node, const Json& json, const std::string& target) {
  constexpr std::string_view kOps = "torch.ops.";
  TORCH_CHECK(target.starts_with(kOps), "it calls ", target, ", which is not known");
  const size_t space = target.find('.', kOps.size()), overload = target.rfind('.');
  TORCH_CHECK(space != std::string::npos && overload > space, target, " is no op");
  c10::OperatorName name(target.substr(kOps.size(), space - kOps.size()) + "::" +
                             target.substr(space + 1, overload - space - 1),
                         target.substr(overload + 1));
  if (name.overload_name == "default") name.overload_name.clear();
  node.op = c10::Dispatcher::singleton().findSchema(name);
  TORCH_CHECK(node.op.has_value(), "it calls ", name,
              ", which is not registered; is the library linked that defines it?");

  const auto& arguments = node.op->schema().arguments();
  const Json& given = json.at("inputs");
  bool takes_tensors = false, told_device = false;
  int device_argument = -1;
  for (size_t k = 0; k < arguments.size(); ++k) {
    const c10::Argument& argument = arguments[k];
    const auto found = std::find_if(given.begin(), given.end(), [&](const Json& each) {
      return each.at("name") == argument.name();
    });
    Operand operand;
    if (found != given.end()) {
      operand = operand_of(found->at("arg"));
    } else {
      TORCH_CHECK(argument.default_value(), "it calls ", name,
                  " without its argument '", argument.name(), "'");
      operand.constant = *argument.default_value();
    }
    if (operand.kind == Operand::Kind::kConstant) operand.constant = coerced(operand.constant, argument);
    const auto type = without_optional(argument.real_type());
    if (type->kind() == c10::TypeKind::TensorType) takes_tensors = operand.is_tensor = true;
    if (type->kind() == c10::TypeKind::DeviceObjType) {
      device_argument = static_cast<int>(k);
      told_device = operand.kind == Operand::Kind::kDevice;
    }
    const bool flag = type->kind() == c10::TypeKind::BoolType;
    if (flag && (argument.name() == "train" || argument.name() == "training")) {
      node.training_argument = static_cast<int>(k);
    }
    node.operands.push_back(std::move(operand));
  }
  if (!takes_tensors && !told_device) node.device_argument = device_argument;
}

void ExportedGraph::add_higher_order(Node& node, const Json& json, const std::string& target) {
  if (target.ends_with(".wrap_with_set_grad_enabled")) {
    node.kind = Node::Kind::kGradMode;
  } else if (target.ends_with(".wrap_with_autocast")) {
    node.kind = Node::Kind::kAutocast;
  } else if (target.ends_with(".cond")) {
    node.kind = Node::Kind::kCondition;
  } else {
    TORCH_CHECK(false, "it calls ", target, ", which is not known");
  }
  for (const Json& input : json.at("inputs")) {
    const Json& argument = input.at("arg");
    if (argument.contains("as_graph")) {
      node.graphs.emplace_back(argument.at("as_graph").at("graph"));
    } else {
      node.operands.push_back(operand_of(argument));
    }
  }
}

ExportedGraph::ExportedGraph(const Json& graph) {
  for (const Json& input : graph.at("inputs")) {
    if (const auto name = value_name(input)) number_of(*name);
    inputs_.push_back(operand_of(input));
  }
  for (const Json& json : graph.at("nodes")) {
    const auto target = json.at("target").get<std::string>();
    Node node;
    if (target.starts_with("torch.ops.higher_order.")) {
      add_higher_order(node, json, target);
    } else if (const SizeFunction sizes = size_function(target)) {
      node.kind = Node::Kind::kSizes;
      node.sizes = sizes;
      for (const Json& input : json.at("inputs")) node.operands.push_back(operand_of(input.at("arg")));
    } else {
      add_op(node, json, target);
    }
    for (const Json& output : json.at("outputs")) {
      Output out;
      if (const auto name = value_name(output)) {
        out.values.push_back(number_of(*name));
      } else if (output.contains("as_tensors")) {
        out.is_list = true;
        for (const Json& each : output.at("as_tensors")) {
          out.values.push_back(number_of(each.at("name").get<std::string>()));
        }
      } else {
        TORCH_CHECK(output.contains("as_none"), "results of kind ", member_of(output).first, " are not known");
      }
      node.outputs.push_back(std::move(out));
    }
    nodes_.push_back(std::move(node));
  }
  for (const Json& output : graph.at("outputs")) outputs_.push_back(operand_of(output));
  find_last_uses();
}

void ExportedGraph::find_last_uses() {
  std::vector<bool> needed(numbers_.size(), false);
  const auto need = [&](const Operand& operand, std::vector<uint32_t>* last, const auto& self) -> void {
    if (operand.kind == Operand::Kind::kValue && !needed[operand.value]) {
      needed[operand.value] = true;
      if (last != nullptr) last->push_back(operand.value);
    }
    for (const Operand& item : operand.items) self(item, last, self);
  };
  for (const Operand& output : outputs_) need(output, nullptr, need);
  for (auto node = nodes_.rbegin(); node != nodes_.rend(); ++node) {
    for (const Output& output : node->outputs) {
      for (const uint32_t value : output.values) {
        if (!needed[value]) node->last_used.push_back(value);
      }
    }
    for (const Operand& operand : node->operands) need(operand, &node->last_used, need);
  }
}

c10::IValue ExportedGraph::resolve(const Operand& operand, const std::vector<c10::IValue>& values,
                                   const ExportedCall& call) const {
  switch (operand.kind) {
    case Operand::Kind::kConstant:
      return operand.constant;
    case Operand::Kind::kValue:
      return operand.is_tensor ? number_as_tensor(values[operand.value]) : values[operand.value];
    case Operand::Kind::kDevice:
      return operand.constant.toDevice().type() == call.exported_on ? c10::IValue(call.device) : operand.constant;
    case Operand::Kind::kTensors: {
      c10::List<at::Tensor> list;
      for (const Operand& item : operand.items) list.push_back(values[item.value].toTensor());
      return list;
    }
    case Operand::Kind::kOptionalTensors: {
      c10::List<std::optional<at::Tensor>> list;
      for (const Operand& item : operand.items) {
        const c10::IValue value = resolve(item, values, call);
        list.push_back(value.isNone() ? std::nullopt : std::optional(value.toTensor()));
      }
      return list;
    }
    case Operand::Kind::kNumbers: {
      std::vector<c10::IValue> numbers;
      bool symbolic = false, floats = false, bools = false;
      for (const Operand& item : operand.items) {
        numbers.push_back(resolve(item, values, call));
        symbolic = symbolic || numbers.back().isSymInt();
        floats = floats || numbers.back().isDouble() || numbers.back().isSymFloat();
        bools = bools || numbers.back().isBool();
      }
      if (floats) {
        c10::List<double> list;
        for (const c10::IValue& each : numbers) list.push_back(each.toDouble());
        return list;
      }
      if (bools) {
        c10::List<bool> list;
        for (const c10::IValue& each : numbers) list.push_back(each.toBool());
        return list;
      }
      if (symbolic) {
        std::vector<c10::SymInt> list;
        for (const c10::IValue& each : numbers) list.push_back(each.toSymInt());
        return list;
      }
      c10::List<int64_t> list;
      for (const c10::IValue& each : numbers) list.push_back(each.toInt());
      return list;
    }
  }
  TORCH_INTERNAL_ASSERT(false);
}

std::vector<c10::IValue> ExportedGraph::run_graphs(const Node& node, std::vector<c10::IValue> operands,
                                                   const ExportedCall& call) const {
  // torch/_higher_order_ops/: wrap_with_set_grad_enabled(enabled, graph, *inputs),
  // wrap_with_autocast(device, dtype, enabled, cache, graph, *inputs), cond(pred, a, b, inputs)
  const auto inputs = [&](size_t first) {
    return std::vector<c10::IValue>(operands.begin() + static_cast<std::ptrdiff_t>(first), operands.end());
  };
  if (node.kind == Node::Kind::kGradMode) {
    const c10::AutoGradMode mode(operands.at(0).toBool());
    return node.graphs.at(0).run(inputs(1), call);
  }
  if (node.kind == Node::Kind::kAutocast) {
    auto type = c10::Device(operands.at(0).toStringRef()).type();
    if (type == call.exported_on) type = call.device.type();
    // Casts of lazy tensors are those of what they are computed on.
    if (type == c10::kLazy) type = backing_device_of(0).type();
    const std::optional<c10::ScalarType> dtype =
        operands.at(1).isNone() ? std::nullopt : std::optional(operands[1].toScalarType());
    const Autocast autocast(type, dtype, operands.at(2).toBool(), operands.at(3).isNone() || operands[3].toBool());
    return node.graphs.at(0).run(inputs(4), call);
  }
  const c10::IValue& decides = operands.at(0);
  const bool holds = decides.isTensor() ? decides.toTensor().item<bool>() : decides.toBool();
  std::vector<c10::IValue> list;
  if (operands.size() > 1) {
    for (const c10::IValue& each : operands[1].toListRef()) list.push_back(each);
  }
  return node.graphs.at(holds ? 0 : 1).run(std::move(list), call);
}

std::vector<c10::IValue> ExportedGraph::run(std::vector<c10::IValue> inputs, const ExportedCall& call) const {
  TORCH_INTERNAL_ASSERT(inputs.size() == inputs_.size());
  std::vector<c10::IValue> values(numbers_.size());
  for (size_t k = 0; k < inputs_.size(); ++k) {
    if (inputs_[k].kind == Operand::Kind::kValue) values[inputs_[k].value] = std::move(inputs[k]);
  }
  torch::jit::Stack stack;
  for (const Node& node : nodes_) {
    stack.clear();
    for (const Operand& operand : node.operands) stack.push_back(resolve(operand, values, call));
    switch (node.kind) {
      case Node::Kind::kOp:
        if (node.training_argument >= 0 && call.training) {
          stack[static_cast<size_t>(node.training_argument)] = *call.training;
        }
        if (node.device_argument >= 0) stack[static_cast<size_t>(node.device_argument)] = call.device;
        node.op->callBoxed(&stack);
        break;
      case Node::Kind::kSizes: {
        c10::IValue size = node.sizes(stack);
        stack.assign(1, std::move(size));
        break;
      }
      default:
        stack = run_graphs(node, std::move(stack), call);
    }
    for (size_t k = 0; k < node.outputs.size(); ++k) {
      const Output& output = node.outputs[k];
      if (output.values.empty()) continue;
      if (!output.is_list) {
        values[output.values[0]] = std::move(stack.at(k));
        continue;
      }
      const auto list = stack.at(k).toListRef();
      TORCH_CHECK(list.size() == output.values.size(), "reprise: ", node.op->operator_name(), " gives ",
                  list.size(), " tensors, and ", output.values.size(), " when the program was exported");
      for (size_t item = 0; item < output.values.size(); ++item) values[output.values[item]] = list[item];
    }
    for (const uint32_t value : node.last_used) values[value] = c10::IValue();
  }
  std::vector<c10::IValue> outputs;
  for (const Operand& output : outputs_) outputs.push_back(resolve(output, values, call));
  return outputs;
}

}  // namespace reprise
