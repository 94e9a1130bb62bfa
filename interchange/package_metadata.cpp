#include "interchange/package_metadata.h"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace reprise {

using Json = nlohmann::json;

namespace {

c10::ScalarType dtype_called(const std::string& name) {
  for (int k = 0; k < static_cast<int>(c10::ScalarType::NumOptions); ++k) {
    if (name == c10::toString(static_cast<c10::ScalarType>(k))) return static_cast<c10::ScalarType>(k);
  }
  TORCH_CHECK(false, "reprise: no dtype is called ", name);
}

}  // namespace

const PackagedWeight* PackagedWeights::find(const std::string& name) const {
  const auto found = std::find_if(all.begin(), all.end(), [&](const auto& each) { return each.name == name; });
  return found == all.end() ? nullptr : &*found;
}

std::string text_of(const PackagedWeights& weights) {
  Json out = {{"in_program", weights.in_program}, {"weights", Json::array()}};
  for (const PackagedWeight& weight : weights.all) {
    out["weights"].push_back({{"name", weight.name}, {"dtype", c10::toString(weight.dtype)}, {"sizes", weight.sizes},
                              {"strides", weight.strides}, {"parameter", weight.is_parameter},
                              {"written", weight.written}, {"named", weight.named}});
  }
  return out.dump();
}

std::optional<PackagedWeights> weights_in(const std::unordered_map<std::string, std::string>& metadata) {
  const auto found = metadata.find(kWeightsKey);
  if (found == metadata.end()) return std::nullopt;
  const Json json = Json::parse(found->second);
  PackagedWeights out{json.at("in_program").get<bool>(), {}};
  for (const Json& each : json.at("weights")) {
    out.all.push_back({each.at("name").get<std::string>(), dtype_called(each.at("dtype").get<std::string>()),
                       each.at("sizes").get<std::vector<int64_t>>(), each.at("strides").get<std::vector<int64_t>>(),
                       each.at("parameter").get<bool>(), each.at("written").get<bool>(), each.at("named").get<bool>()});
  }
  return out;
}

bool is_functional(const std::unordered_map<std::string, std::string>& metadata) {
  const auto found = metadata.find(kFunctionalKey);
  return found != metadata.end() && found->second == "true";
}

std::string text_of(const ProgramInputs& inputs) {
  Json out = {{"inputs", Json::array()}, {"symbols", Json::array()}};
  for (const auto& input : inputs.inputs) {
    Json sizes = Json::array();
    for (const auto& size : input.sizes) sizes.push_back(size ? Json(size->text()) : Json());
    out["inputs"].push_back({{"name", input.name}, {"dtype", c10::toString(input.dtype)}, {"sizes", sizes}});
  }
  for (const auto& symbol : inputs.symbols) {
    out["symbols"].push_back({{"name", symbol.name}, {"least", symbol.least}, {"most", symbol.most}});
  }
  return out.dump();
}

std::optional<ProgramInputs> inputs_in(const std::unordered_map<std::string, std::string>& metadata) {
  const auto found = metadata.find(kInputsKey);
  if (found == metadata.end()) return std::nullopt;
  const Json json = Json::parse(found->second);
  ProgramInputs out;
  for (const Json& each : json.at("inputs")) {
    ProgramInputs::Input& input = out.inputs.emplace_back();
    input.name = each.at("name").get<std::string>();
    input.dtype = dtype_called(each.at("dtype").get<std::string>());
    for (const Json& size : each.at("sizes")) {
      input.sizes.push_back(size.is_null() ? std::nullopt
                                           : std::optional(Expression::parse(size.get<std::string>())));
    }
  }
  for (const Json& each : json.at("symbols")) {
    out.symbols.push_back({each.at("name").get<std::string>(), each.at("least").get<int64_t>(),
                           each.at("most").get<int64_t>()});
  }
  return out;
}

}  // namespace reprise
