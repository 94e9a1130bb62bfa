#include "compiler_bridge/trace_writer.h"

#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>

#include <algorithm>
#include <map>
#include <optional>

#include "compiler_bridge/trace_outline.h"
#include "lazy_backend/device.h"
#include "lazy_backend/json_text.h"
#include "lazy_backend/schema_type.h"

namespace reprise {
namespace {

/// As Python's `torch` names dtypes: the lower-case form of `toString` but for
/// a few.
std::string dtype_text(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::ScalarType::Byte: return "\"uint8\"";
    case c10::ScalarType::Char: return "\"int8\"";
    case c10::ScalarType::Short: return "\"int16\"";
    case c10::ScalarType::Int: return "\"int32\"";
    case c10::ScalarType::Long: return "\"int64\"";
    case c10::ScalarType::Half: return "\"float16\"";
    case c10::ScalarType::Float: return "\"float32\"";
    case c10::ScalarType::Double: return "\"float64\"";
    case c10::ScalarType::ComplexHalf: return "\"complex32\"";
    case c10::ScalarType::ComplexFloat: return "\"complex64\"";
    case c10::ScalarType::ComplexDouble: return "\"complex128\"";
    default: {
      std::string name = c10::toString(dtype);
      std::transform(name.begin(), name.end(), name.begin(),
                     [](unsigned char c) { return std::tolower(c); });
      return json_text(name);
    }
  }
}

template <class Items, class Write>
std::string list_text(const Items& items, const Write& write) {
  std::string out = "[";
  for (const auto& item : items) {
    if (out.size() > 1) out += ',';
    out += write(item);
  }
  return out + ']';
}
std::string ints_text(c10::IntArrayRef ints) {
  return list_text(ints, [](int64_t value) { return std::to_string(value); });
}
/// Sizes that were marked as static, as text: traces in which they differ have nothing in
/// common.
std::string fixed_text(const Geometry& geometry) {
  std::string out;
  for (uint32_t k = 0; k < geometry.rank; ++k) {
    if (((geometry.fixed >> k) & 1) == 0) continue;
    out += c10::str(out.empty() ? ",\"fixed\":\"" : " ", k, "=", geometry.dims[k]);
  }
  return out.empty() ? out : out + '"';
}
std::string field(const char* name, const std::string& value) {
  return std::string("{\"") + name + "\":" + value + "}";
}

class Writer {
 public:
  Writer(Program& program, TraceOutline& outline)
      : program_(program), outline_(outline), device_(backing_device_of(program.device_index)) {}

  std::string write() {
    number_geometries();
    find_slots();
    find_inputs();
    next_value_ = program_.inputs.size();
    for (size_t k = 0; k < program_.inputs.size(); ++k) {
      const ProgramInput& input = program_.inputs[k];
      if (input.kind != ProgramInput::Kind::kSlot) continue;
      define(input.index, input.geometry, k, outline_.inputs[k].geometry);
    }
    for (uint32_t k = 0; k < program_.steps.size(); ++k) write_step(k, *program_.steps[k]);
    return assemble();
  }

 private:
  using Source = TraceOutline::Source;
  using Key = std::pair<uint32_t, std::vector<int64_t>>;
  static Key key(uint32_t slot, const Geometry& g) {
    std::vector<int64_t> k(g.dims.begin(), g.dims.end());
    k.insert(k.end(), {g.offset, static_cast<int64_t>(g.dtype), g.conjugate, g.negative});
    return {slot, std::move(k)};
  }
  void define(uint32_t slot, const Geometry& geometry, size_t value, Source source) {
    values_[key(slot, geometry)] = value;
    sources_.emplace(value, source);
    bases_.try_emplace(slot, std::make_pair(value, geometry));
  }

  void number_geometries() {
    uint32_t arguments = 0, results = 0;
    for (const StepPtr& step : program_.steps) {
      first_argument_.push_back(arguments);
      first_result_.push_back(results);
      for_each_tensor(step->args, [&](const Arg&) { ++arguments; });
      for_each_result(step->results, [&](const Result&) { ++results; });
    }
  }

  void find_slots() {
    for (uint32_t k = 0; k < program_.steps.size(); ++k) {
      const Step& step = *program_.steps[k];
      uint32_t number = first_result_[k];
      for_each_result(step.results, [&](const Result& result) {
        if (result.kind == Result::Kind::kNew) creation_[result.slot] = {k, &result, number};
        ++number;
      });
      for (const uint32_t slot : step.written) {
        if (!creation_.contains(slot)) program_.writes_inputs = true;
      }
    }
  }

  /// Inputs in call order: external storages as they are met, then scalars, then
  /// random numbers. A storage that is seen in several ways enters once, whole.
  void find_inputs() {
    std::map<uint32_t, std::vector<Geometry>> seen;
    std::map<uint32_t, uint32_t> seen_at;  // the argument that met a slot
    std::vector<uint32_t> order;
    std::map<Key, bool> made;
    uint32_t scalars = 0;
    std::vector<ProgramInput> scalar_inputs, random_inputs;
    for (uint32_t k = 0; k < program_.steps.size(); ++k) {
      const Step& step = *program_.steps[k];
      uint32_t number = first_argument_[k];
      for_each_tensor(step.args, [&](const Arg& arg) {
        const uint32_t here = number++;
        if (creation_.contains(arg.slot) || made.contains(key(arg.slot, arg.geometry()))) return;
        if (is_random(step) && step.randomness == Randomness::kCreates) return;
        auto& geometries = seen[arg.slot];
        if (geometries.empty()) order.push_back(arg.slot);
        seen_at.try_emplace(arg.slot, here);
        made[key(arg.slot, arg.geometry())] = true;
        geometries.push_back(arg.geometry());
      });
      for (uint32_t a = 0; a < step.args.size(); ++a) {  // none within a list is dynamic
        const Arg& arg = step.args[a];
        if (!arg.is_float()) continue;
        outline_.floats.push_back({k, a, arg.dynamic, arg.dynamic ? 0 : arg.number()});
        if (!arg.dynamic) continue;
        ProgramInput input{ProgramInput::Kind::kScalar, scalars++, {}, {}};
        input.geometry.dtype = c10::kDouble;
        scalar_inputs.push_back(std::move(input));
      }
      for_each_result(step.results, [&](const Result& result) {
        made[key(result.slot, *result.geometry)] = true;
      });
      if (is_random(step)) {
        ProgramInput input{ProgramInput::Kind::kRandom, k, {}, {}};
        input.geometry = step.randomness == Randomness::kFills ? step.args[0].geometry()
                                                               : *step.results[0].geometry;
        random_inputs.push_back(std::move(input));
      }
    }
    for (const uint32_t slot : order) {
      const auto& geometries = seen[slot];
      ProgramInput input{ProgramInput::Kind::kSlot, slot, geometries.front(), {}};
      if (geometries.size() > 1 || geometries.front().conjugate || geometries.front().negative) {
        input.geometry = whole(geometries);
        outline_.complete = false;
      }
      outline_.inputs.push_back({input.kind, input.index, {false, seen_at.at(slot)}});
      program_.inputs.push_back(std::move(input));
    }
    scalar_base_ = program_.inputs.size();
    for (auto& input : scalar_inputs) {
      outline_.inputs.push_back({input.kind, input.index, {}});
      program_.inputs.push_back(std::move(input));
    }
    for (auto& input : random_inputs) {
      const uint32_t step = input.index;
      const bool fills = program_.steps[step]->randomness == Randomness::kFills;
      outline_.inputs.push_back({input.kind, step,
                                 {!fills, fills ? first_argument_[step] : first_result_[step]}});
      random_[input.index] = program_.inputs.size();
      program_.inputs.push_back(std::move(input));
    }
  }

  static bool is_random(const Step& step) { return step.randomness != Randomness::kNone; }

  /// A flat tensor over all that these views touch.
  static Geometry whole(const std::vector<Geometry>& geometries) {
    size_t bytes = 0;
    for (const Geometry& g : geometries) bytes = std::max(bytes, g.nbytes());
    Geometry flat;
    flat.rank = 1;
    flat.dtype = geometries.front().dtype;
    flat.dims = {static_cast<int64_t>((bytes + c10::elementSize(flat.dtype) - 1) /
                                      c10::elementSize(flat.dtype)),
                 1};
    return flat;
  }

  // Values -------------------------------------------------------------------

  size_t value_of(uint32_t slot, const Geometry& geometry, Source source) {
    const auto found = values_.find(key(slot, geometry));
    if (found != values_.end()) {
      if (const auto defined = sources_.find(found->second); defined != sources_.end()) {
        outline_.same.push_back({source, defined->second});
      }
      return found->second;
    }
    outline_.complete = false;
    // Seen in a way that no step made: a view that is only metadata.
    const auto [base, base_geometry] = bases_.at(slot);
    size_t value = base;
    Geometry now = base_geometry;
    if (now.conjugate || now.negative) {
      TORCH_CHECK(false, "reprise: a conjugate view is seen through another one");
    }
    if (now.dtype != geometry.dtype) {
      value = emit("aten::view", "dtype", {tensor(value), field("dtype", dtype_text(geometry.dtype))});
      now.dtype = geometry.dtype;
    }
    value = emit("aten::as_strided", "",
                 {tensor(value), ints(geometry.sizes()), ints(geometry.strides()),
                  field("int", std::to_string(geometry.offset))});
    if (geometry.conjugate) value = emit("aten::_conj", "", {tensor(value)});
    if (geometry.negative) value = emit("aten::_neg_view", "", {tensor(value)});
    values_[key(slot, geometry)] = value;
    return value;
  }
  static std::string tensor(size_t value) { return field("value", std::to_string(value)); }
  static std::string ints(c10::IntArrayRef values) {
    return field("list", list_text(values, [](int64_t v) { return field("int", std::to_string(v)); }));
  }

  size_t emit(const char* op, const char* overload, const std::vector<std::string>& args) {
    const size_t value = next_value_++;
    steps_.push_back(c10::str("{\"op\":", json_text(op), ",\"overload\":", json_text(overload),
                              ",\"args\":", list_text(args, [](const auto& a) { return a; }),
                              ",\"results\":[", tensor(value), "]}"));
    return value;
  }

  // Arguments ----------------------------------------------------------------

  std::string next_scalar() {
    return field("scalar", std::to_string(scalar_base_ + scalar_count_++));
  }

  std::string number(const Arg& arg) {
    const at::Tensor& recorded = arg.constant().toTensor();
    const std::string value = arg.dynamic ? next_scalar() : constant(recorded.item());
    if (!arg.dynamic && c10::isIntegralType(recorded.scalar_type(), /*includeBool=*/false)) {
      outline_.integers.push_back({step_, argument_});
    }
    if (recorded.unsafeGetTensorImpl()->is_wrapped_number()) return value;
    // A tensor of no dimension, which takes part in type promotion as such.
    outline_.complete = false;  // its number comes before those of arguments before it
    return tensor(emit("aten::scalar_tensor", "",
                       {value, field("dtype", dtype_text(recorded.scalar_type())), "null", "null",
                        "null"}));
  }

  static std::string constant(const c10::IValue& value) {
    if (value.isNone()) return "null";
    if (value.isInt()) return field("int", std::to_string(value.toInt()));
    if (value.isBool()) return field("bool", value.toBool() ? "true" : "false");
    if (value.isDouble()) return field("float", json_text(float_text(value.toDouble())));
    if (value.isString()) return field("str", json_text(value.toStringRef()));
    if (value.isComplexDouble()) {
      const auto c = value.toComplexDouble();
      return field("complex", "[" + json_text(float_text(c.real())) + "," + json_text(float_text(c.imag())) + "]");
    }
    if (value.isList()) return field("list", list_text(value.toListRef(), [](const c10::IValue& v) { return constant(v); }));
    TORCH_CHECK(false, "reprise: a constant of type ", value.tagKind(), " cannot be compiled");
  }
  static std::string constant(const at::Scalar& value) { return constant(c10::IValue(value)); }

  std::string int_argument(int64_t value, const c10::Argument& declared) {
    const auto type = without_optional(declared.real_type());
    switch (type->kind()) {
      case c10::TypeKind::ScalarTypeType:
        return field("dtype", dtype_text(static_cast<c10::ScalarType>(value)));
      case c10::TypeKind::LayoutType:
        return field("layout", "\"strided\"");
      case c10::TypeKind::MemoryFormatType: {
        switch (static_cast<c10::MemoryFormat>(value)) {
          case c10::MemoryFormat::Contiguous: return field("memory_format", "\"contiguous_format\"");
          case c10::MemoryFormat::Preserve: return field("memory_format", "\"preserve_format\"");
          case c10::MemoryFormat::ChannelsLast: return field("memory_format", "\"channels_last\"");
          default: return field("memory_format", "\"channels_last_3d\"");
        }
      }
      default:
        outline_.integers.push_back({step_, argument_});
        return field("int", std::to_string(value));
    }
  }

  std::string argument(const Arg& arg, const c10::Argument& declared) {
    switch (arg.kind) {
      case Arg::Kind::kNone:
      case Arg::Kind::kUndefined:
        return "null";
      case Arg::Kind::kTensor:
        return tensor(value_of(arg.slot, arg.geometry(), {false, next_argument_++}));
      case Arg::Kind::kInt:
        return int_argument(arg.i, declared);
      case Arg::Kind::kBool:
        return field("bool", arg.b ? "true" : "false");
      case Arg::Kind::kDouble:
        return arg.dynamic ? next_scalar() : field("float", json_text(float_text(arg.d)));
      case Arg::Kind::kNumber:
        return number(arg);
      case Arg::Kind::kIntList:
        outline_.integers.push_back({step_, argument_});
        return ints(arg.ints());
      case Arg::Kind::kDevice:
        return field("device", json_text(device_.str()));
      case Arg::Kind::kConstant:
        return constant(arg.constant());
      case Arg::Kind::kList:
        return field("list", list_text(arg.list(), [&](const Arg& item) {
                       return argument(item, declared);
                     }));
      case Arg::Kind::kOpaque:
        break;
    }
    TORCH_CHECK(false, "reprise: argument ", declared.name(), " cannot be compiled");
  }

  std::string result(const Result& r) {
    switch (r.kind) {
      case Result::Kind::kNew:
      case Result::Kind::kAlias: {
        const size_t value = next_value_++;
        define(r.slot, *r.geometry, value, {true, next_result_++});
        return tensor(value);
      }
      case Result::Kind::kList: {
        std::vector<std::string> items;
        for (const Result& item : *r.list) {
          // The overload that is told of its results returns those that there are.
          if (as_recorded_ && item.kind == Result::Kind::kNone) continue;
          items.push_back(result(item));
        }
        return field("list", list_text(items, [](const auto& item) { return item; }));
      }
      default:
        return "null";
    }
  }

  /// An op whose arguments do not say how its results lie, a library's or a package's say, has
  /// an overload that is told.
  static constexpr const char* kAsRecorded = "as_recorded";
  static bool has_overload_as_recorded(const c10::OperatorName& name) {
    return !name.name.starts_with("aten::") &&
           c10::Dispatcher::singleton().findSchema({name.name, kAsRecorded}).has_value();
  }

  /// Two arguments more: the dtypes of all results, and of each its rank, sizes and strides.
  static void write_geometries(const Step& step, std::vector<std::string>& args) {
    std::string dtypes;
    std::vector<int64_t> integers;
    for_each_result(step.results, [&](const Result& result) {
      TORCH_CHECK(result.kind == Result::Kind::kNew && result.geometry->offset == 0 &&
                      result.nbytes <= result.geometry->nbytes(),
                  "reprise: ", step.op.operator_name(),
                  " returns a part of a tensor, or one that it was given: such calls cannot be compiled");
      const std::string dtype = dtype_text(result.geometry->dtype);
      dtypes += (dtypes.empty() ? "" : " ") + dtype.substr(1, dtype.size() - 2);
      integers.push_back(result.geometry->rank);
      integers.insert(integers.end(), result.geometry->dims.begin(), result.geometry->dims.end());
    });
    args.push_back(field("str", json_text(dtypes)));
    args.push_back(ints(integers));
  }

  void write_step(uint32_t k, const Step& step) {
    step_ = k;
    next_argument_ = first_argument_[k];
    next_result_ = first_result_[k];
    if (is_random(step)) {
      const size_t numbers = random_.at(k);
      if (step.randomness == Randomness::kCreates) {
        define(step.results[0].slot, *step.results[0].geometry, numbers, {true, next_result_});
      } else {
        emit("aten::copy_", "",
             {tensor(value_of(step.args[0].slot, step.args[0].geometry(), {false, next_argument_})),
              tensor(numbers),
              field("bool", "false")});
      }
      return;
    }
    const auto& declared = step.op.schema().arguments();
    std::vector<std::string> args;
    for (size_t a = 0; a < step.args.size(); ++a) {
      argument_ = static_cast<uint32_t>(a);
      args.push_back(argument(step.args[a], declared[a]));
    }
    auto name = step.op.operator_name();
    as_recorded_ = has_overload_as_recorded(name);
    const std::string results =
        list_text(step.results, [&](const Result& r) { return result(r); });
    if (as_recorded_) {
      name.overload_name = kAsRecorded;
      write_geometries(step, args);
    }
    steps_.push_back(c10::str("{\"op\":", json_text(name.name),
                              ",\"overload\":", json_text(name.overload_name),
                              ",\"args\":", list_text(args, [](const auto& a) { return a; }),
                              ",\"results\":", results, "}"));
  }

  std::string assemble() {
    std::vector<size_t> outputs;
    for (const auto& [slot, geometry] : program_.results) {
      outputs.push_back(value_of(slot, geometry, {}));
    }
    for (const uint32_t slot : program_.live) {
      const auto& [step, created, number] = creation_.at(slot);
      if (is_random(*program_.steps[step])) continue;  // made beside the program
      program_.outputs.push_back({slot, *created->geometry, created->nbytes});
      outputs.push_back(values_.at(key(slot, *created->geometry)));
      outline_.outputs.push_back({slot, number});
      outline_.same.push_back({{true, number}, sources_.at(outputs.back())});
    }
    const auto input_text = [&](const ProgramInput& input) {
      const bool scalar = input.kind == ProgramInput::Kind::kScalar;
      return c10::str("{\"kind\":", scalar ? "\"scalar\"" : "\"tensor\"",
                      ",\"dtype\":", dtype_text(input.geometry.dtype),
                      ",\"sizes\":", ints_text(input.geometry.sizes()),
                      ",\"strides\":", ints_text(input.geometry.strides()),
                      ",\"offset\":", input.geometry.offset, fixed_text(input.geometry), "}");
    };
    const std::string environment =
        program_.environment.empty() ? "" : ",\"environment\":" + json_text(program_.environment);
    return c10::str("{\"format\":1,\"device\":", json_text(device_.str()), environment,
                    ",\"inputs\":", list_text(program_.inputs, input_text), ",\"steps\":[",
                    join(steps_), "],\"outputs\":",
                    list_text(outputs, [](size_t v) { return std::to_string(v); }), "}");
  }
  static std::string join(const std::vector<std::string>& parts) {
    std::string out;
    for (const std::string& part : parts) {
      if (!out.empty()) out += ",\n";
      out += part;
    }
    return out;
  }

  /// Which step and which result make a slot; results are numbered as in the outline.
  struct Creation {
    uint32_t step;
    const Result* result;
    uint32_t number;
  };

  Program& program_;
  TraceOutline& outline_;
  const c10::Device device_;
  std::map<uint32_t, Creation> creation_;
  std::vector<uint32_t> first_argument_, first_result_;  ///< of each step
  bool as_recorded_ = false;                             ///< that step's op is told of its results
  uint32_t step_ = 0, argument_ = 0;                     ///< being written
  uint32_t next_argument_ = 0, next_result_ = 0;
  std::map<size_t, Source> sources_;  ///< of values
  std::map<Key, size_t> values_;
  std::map<uint32_t, std::pair<size_t, Geometry>> bases_;
  std::map<uint32_t, size_t> random_;
  size_t scalar_base_ = 0;
  size_t scalar_count_ = 0;
  size_t next_value_ = 0;
  std::vector<std::string> steps_;
};

}  // namespace

std::string write_trace(Program& program, TraceOutline* outline) {
  TraceOutline unwanted;
  TraceOutline& wanted = outline != nullptr ? *outline : unwanted;
  std::string trace = Writer(program, wanted).write();
  wanted.writes_inputs = program.writes_inputs;
  return trace;
}

}  // namespace reprise
