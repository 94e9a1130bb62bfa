#include "interchange/exported_program.h"

#include <ATen/ops/scalar_tensor.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <charconv>
#include <cctype>
#include <nlohmann/json.hpp>

#include "interchange/exported_graph.h"
#include "interchange/program_inputs.h"
#include "lazy_backend/interpreter.h"

namespace reprise {
namespace {

using Json = nlohmann::json;
using Symbols = std::map<std::string, uint32_t>;

/// An expression as sympy's `srepr` writes it: `Add(Symbol('s77', integer=True), Integer(1))`.
class SympyText {
 public:
  SympyText(std::string_view text, Symbols& symbols) : text_(text), symbols_(symbols) {}

  /// Nothing for what is not known; sizes that are so are not checked.
  std::optional<Expression> read() {
    auto expression = expression_here();
    return at_ == text_.size() ? expression : std::nullopt;
  }

 private:
  std::optional<Expression> expression_here() {
    const std::string name = word();
    if (!take('(')) return std::nullopt;
    if (name == "Symbol") {
      std::string symbol;
      if (!take('\'')) return std::nullopt;
      while (at_ < text_.size() && text_[at_] != '\'') symbol += text_[at_++];
      while (at_ < text_.size() && text_[at_] != ')') ++at_;  // its assumptions
      if (!take(')')) return std::nullopt;
      return Expression::symbol(symbols_.try_emplace(symbol, symbols_.size()).first->second);
    }
    if (name == "Integer") {
      const std::string digits = word();
      int64_t value = 0;
      const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
      if (error != std::errc() || end != digits.data() + digits.size() || !take(')')) return std::nullopt;
      return Expression::constant(value);
    }
    std::vector<Expression> operands;
    do {
      auto operand = expression_here();
      if (!operand) return std::nullopt;
      operands.push_back(std::move(*operand));
    } while (take(','));
    if (!take(')')) return std::nullopt;
    using Kind = Expression::Kind;
    static const std::map<std::string, Kind> kinds{
        {"Add", Kind::kAdd}, {"Mul", Kind::kMultiply}, {"FloorDiv", Kind::kFloorDivide},
        {"Mod", Kind::kModulo}, {"PythonMod", Kind::kModulo}, {"Min", Kind::kMin}, {"Max", Kind::kMax}};
    const auto kind = kinds.find(name);
    if (kind == kinds.end() || operands.size() < 2) return std::nullopt;
    return Expression::of(kind->second, std::move(operands));
  }
  std::string word() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
    std::string out;
    const auto belongs = [](char c) {
      return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-' || c == '_' || c == '.';
    };
    while (at_ < text_.size() && belongs(text_[at_])) out += text_[at_++];
    return out;
  }
  bool take(char c) {
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  std::string_view text_;
  Symbols& symbols_;
  size_t at_ = 0;
};

/// Where an input of the graph comes from.
struct Source {
  enum class Kind : uint8_t { kWeight, kInput, kConstant };
  Kind kind = Kind::kConstant;
  size_t index = 0;
};

/// Where an output of the graph goes.
struct Target {
  enum class Kind : uint8_t { kResult, kWeight, kInput, kNowhere };
  Kind kind = Kind::kResult;
  size_t index = 0;
};

ProgramInputs::Input input_of(const Json& argument, const Json& values, Symbols& symbols) {
  ProgramInputs::Input input;
  input.name = value_name(argument).value_or("");
  input.is_tensor = argument.contains("as_tensor");
  if (!input.is_tensor) return input;
  const Json& meta = values.at(input.name);
  input.dtype = dtype_of(meta.at("dtype"));
  for (const Json& size : meta.at("sizes")) {
    if (size.contains("as_int")) {
      input.sizes.emplace_back(Expression::constant(size.at("as_int").get<int64_t>()));
    } else {
      input.sizes.push_back(SympyText(size.at("as_expr").at("expr_str").get<std::string>(), symbols).read());
    }
  }
  return input;
}

/// Throws for what is no tensor, and for one that no memory holds.
void check_numbers(const Geometry& geometry, const std::string& weight) {
  const auto too_many = [&] {
    int64_t elements = geometry.offset, next = 0;
    for (uint32_t k = 0; k < geometry.rank; ++k) {
      if (__builtin_mul_overflow(geometry.sizes()[k], geometry.strides()[k], &next) ||
          __builtin_add_overflow(elements, next, &elements)) {
        return true;
      }
    }
    return __builtin_mul_overflow(elements, int64_t{64}, &next);
  };
  const auto negative = [](int64_t number) { return number < 0; };
  TORCH_CHECK(geometry.offset >= 0 && std::none_of(geometry.dims.begin(), geometry.dims.end(), negative) &&
                  !too_many(),
              "'", weight, "' has sizes ", geometry.sizes(), ", strides ", geometry.strides(),
              " and storage offset ", geometry.offset);
}

}  // namespace

struct ExportedProgram::Parts {
  std::unique_ptr<ExportedGraph> graph;
  c10::DeviceType exported_on = c10::kCPU;
  std::vector<Source> sources;
  std::vector<Target> targets;
  ProgramInputs inputs;
  std::vector<std::string> input_names;
  std::vector<Weight> weights;

  std::map<std::string, Weight> read_weights(Pt2Archive& archive, const std::string& name) const;
  void read_signature(const Json& program, std::map<std::string, Weight> named);
};

std::map<std::string, ExportedProgram::Weight> ExportedProgram::Parts::read_weights(
    Pt2Archive& archive, const std::string& name) const {
  std::map<std::string, Weight> named;
  std::map<std::string, c10::Storage> storages;  // by record
  for (const std::string kind : {"weights", "constants"}) {
    const std::string folder = "data/" + kind + "/", list = folder + name + "_" + kind + "_config.json";
    if (!archive.has(list)) continue;
    const Json config = Json::parse(archive.text(list)).at("config");
    for (const auto& [weight, what] : config.items()) {
      const std::string record = folder + what.at("path_name").get<std::string>();
      const bool is_parameter = what.at("is_param").get<bool>();
      at::Tensor tensor;
      if (what.at("use_pickle").get<bool>()) {
        const std::string bytes = archive.text(record);
        tensor = torch::jit::pickle_load({bytes.begin(), bytes.end()}).toTensor();
      } else {
        const Json& meta = what.at("tensor_meta");
        Geometry geometry;
        for (const char* const part : {"sizes", "strides"}) {
          for (const Json& number : meta.at(part)) geometry.dims.push_back(number.at("as_int").get<int64_t>());
        }
        geometry.rank = static_cast<uint32_t>(meta.at("sizes").size());
        TORCH_CHECK(meta.at("strides").size() == geometry.rank, "'", weight, "' has ", geometry.rank,
                    " sizes and ", meta.at("strides").size(), " strides");
        geometry.offset = meta.at("storage_offset").at("as_int").get<int64_t>();
        geometry.dtype = dtype_of(meta.at("dtype"));
        check_numbers(geometry, weight);
        const auto found = storages.find(record);
        const c10::Storage storage = found != storages.end() ? found->second : archive.storage(record);
        storages.emplace(record, storage);
        TORCH_CHECK(storage.nbytes() >= geometry.nbytes(), "it has ", storage.nbytes(), " bytes for '",
                    weight, "', which needs ", geometry.nbytes());
        tensor = backing_tensor(storage, geometry);
        for (const auto& [other, known] : named) {  // a parameter of two names
          const at::Tensor& same = known.tensor;
          if (same.is_alias_of(tensor) && Geometry(*same.unsafeGetTensorImpl()) == geometry) tensor = same;
        }
        tensor.set_requires_grad(is_parameter && meta.at("requires_grad").get<bool>());
      }
      named[weight] = {weight, std::move(tensor), is_parameter};
    }
  }
  return named;
}

void ExportedProgram::Parts::read_signature(const Json& program, std::map<std::string, Weight> named) {
  const Json& module = program.at("graph_module");
  const Json& signature = module.at("signature");
  const Json& values = module.at("graph").at("tensor_values");
  const auto weight_named = [&](const std::string& name) -> size_t {
    const auto known = std::find_if(weights.begin(), weights.end(),
                                    [&](const Weight& each) { return each.name == name; });
    if (known != weights.end()) return static_cast<size_t>(known - weights.begin());
    const auto found = named.find(name);
    TORCH_CHECK(found != named.end(), "it has no values for '", name, "'");
    weights.push_back(std::move(found->second));
    return weights.size() - 1;
  };
  Symbols symbols;
  for (const Json& spec : signature.at("input_specs")) {
    const auto [kind, value] = member_of(spec);
    const Json& what = *value;
    Source source;
    if (kind == "parameter" || kind == "buffer" || kind == "tensor_constant") {
      source = {Source::Kind::kWeight, weight_named(what.at(kind + "_name").get<std::string>())};
    } else if (kind == "user_input") {
      ProgramInputs::Input input = input_of(what.at("arg"), values, symbols);
      if (!input.name.empty()) {
        source = {Source::Kind::kInput, inputs.inputs.size()};
        inputs.inputs.push_back(std::move(input));
      }
    } else {
      TORCH_CHECK(kind == "constant_input", "inputs of kind ", kind, " are not known");
    }
    sources.push_back(source);
  }
  input_names = inputs.names();
  for (const Json& spec : signature.at("output_specs")) {
    const auto [kind, value] = member_of(spec);
    const Json& what = *value;
    Target target;
    if (kind == "user_output" || kind == "loss_output") {
      target.kind = Target::Kind::kResult;
    } else if (kind == "buffer_mutation") {
      target = {Target::Kind::kWeight, weight_named(what.at("buffer_name").get<std::string>())};
    } else if (kind == "parameter_mutation") {
      target = {Target::Kind::kWeight, weight_named(what.at("parameter_name").get<std::string>())};
    } else if (kind == "user_input_mutation") {
      const auto name = what.at("user_input_name").get<std::string>();
      const auto found = std::find(input_names.begin(), input_names.end(), name);
      TORCH_CHECK(found != input_names.end(), "it writes an input '", name, "', which it has not");
      target = {Target::Kind::kInput, static_cast<size_t>(found - input_names.begin())};
    } else {
      TORCH_CHECK(kind == "token", "outputs of kind ", kind, " are not known");
      target.kind = Target::Kind::kNowhere;
    }
    targets.push_back(target);
  }
  inputs.symbols.resize(symbols.size());
  for (const auto& [symbol, range] : program.at("range_constraints").items()) {
    const auto known = symbols.find(symbol);
    if (known == symbols.end()) continue;
    ProgramInputs::Symbol& out = inputs.symbols[known->second];
    if (range.at("min_val").is_number_integer()) out.least = range.at("min_val").get<int64_t>();
    if (range.at("max_val").is_number_integer()) out.most = range.at("max_val").get<int64_t>();
  }
  // What its ops call "the device".
  for (const auto& input : module.at("graph").at("inputs")) {
    if (!input.contains("as_tensor")) continue;
    const Json& meta = values.at(input.at("as_tensor").at("name").get<std::string>());
    exported_on = c10::Device(meta.at("device").at("type").get<std::string>()).type();
    break;
  }
}

ExportedProgram::ExportedProgram(Pt2Archive& archive, const std::string& name)
    : parts_(std::make_unique<Parts>()) {
  constexpr int kSchema = 8;  // torch/_export/serde/schema.py, SCHEMA_VERSION
  const auto failed = [&](const char* why) {
    TORCH_CHECK(false, "reprise: the program '", name, "' in '", archive.path(), "' cannot be read: ", why);
  };
  try {
    const Json program = Json::parse(archive.text("models/" + name + ".json"));
    const int version = program.at("schema_version").at("major").get<int>();
    TORCH_CHECK(version == kSchema, "it has version ", version, " of torch.export's format, and version ",
                kSchema, " is what this library reads");
    TORCH_CHECK(!archive.has("byteorder") || archive.text("byteorder") == "little", "its numbers are big-endian");
    parts_->read_signature(program, parts_->read_weights(archive, name));
    parts_->graph = std::make_unique<ExportedGraph>(program.at("graph_module").at("graph"));
  } catch (const Json::exception& error) {
    failed(error.what());
  } catch (const c10::Error& error) {
    failed(error.what_without_backtrace());
  } catch (const std::exception& error) {
    failed(error.what());
  }
}

ExportedProgram::~ExportedProgram() = default;

std::vector<ExportedProgram::Weight> ExportedProgram::take_weights() { return std::move(parts_->weights); }
const std::vector<std::string>& ExportedProgram::input_names() const { return parts_->input_names; }

std::vector<at::Tensor> ExportedProgram::run(const std::vector<at::Tensor>& weights,
                                             const std::vector<at::Tensor>& inputs,
                                             std::optional<bool> training) {
  const Parts& parts = *parts_;
  parts.inputs.check(inputs);
  ExportedCall call{.device = c10::kCPU, .exported_on = parts.exported_on, .training = training};
  if (!weights.empty()) {
    call.device = weights.front().device();
  } else if (!inputs.empty()) {
    call.device = inputs.front().device();
  }
  std::vector<c10::IValue> values;
  for (const Source& source : parts.sources) {
    switch (source.kind) {
      case Source::Kind::kWeight:
        values.emplace_back(weights[source.index]);
        break;
      case Source::Kind::kInput:
        values.push_back(parts.inputs.inputs[source.index].is_tensor ? c10::IValue(inputs[source.index])
                                                              : c10::IValue(inputs[source.index].item<int64_t>()));
        break;
      case Source::Kind::kConstant:
        values.emplace_back();  // it stands in the graph
        break;
    }
  }
  const std::vector<c10::IValue> made = parts.graph->run(std::move(values), call);
  std::vector<at::Tensor> results;
  for (size_t k = 0; k < made.size(); ++k) {
    const Target& target = parts.targets.at(k);
    switch (target.kind) {
      case Target::Kind::kResult:
        if (made[k].isTensor()) {
          results.push_back(made[k].toTensor());
        } else if (made[k].isNone()) {
          results.emplace_back();
        } else {
          const bool integer = made[k].isInt() || made[k].isSymInt();
          results.push_back(at::scalar_tensor(made[k].toScalar(), integer ? c10::kLong : c10::kDouble));
        }
        break;
      case Target::Kind::kWeight:
      case Target::Kind::kInput: {
        const c10::AutoGradMode no_grad(false);
        const auto& written = target.kind == Target::Kind::kWeight ? weights : inputs;
        written[target.index].copy_(made[k].toTensor());
        break;
      }
      case Target::Kind::kNowhere:
        break;
    }
  }
  return results;
}

}  // namespace reprise
