#include "interchange/package_metadata.h"

#include <nlohmann/json.hpp>

namespace reprise {

using Json = nlohmann::json;

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
    for (int dtype = 0; dtype < static_cast<int>(c10::ScalarType::NumOptions); ++dtype) {
      const auto candidate = static_cast<c10::ScalarType>(dtype);
      if (each.at("dtype") == c10::toString(candidate)) input.dtype = candidate;
    }
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
