/// \file
/// What Reprise writes into the metadata of the packages that it makes.
#pragma once

#include <optional>
#include <string>
#include <unordered_map>

#include "interchange/program_inputs.h"

namespace reprise {

/// The member of the metadata that holds it, as JSON text.
inline constexpr const char* kInputsKey = "reprise_inputs";

/// A tensor that a program uses beside its arguments.
struct PackagedWeight {
  std::string name;
  c10::ScalarType dtype = c10::ScalarType::Undefined;
  std::vector<int64_t> sizes, strides;
  bool is_parameter = false;
  bool written = false;  ///< by each call
  bool named = true;     ///< else its name is a number, and means something in this program alone
};
struct PackagedWeights {
  bool in_program = true;  ///< with their values
  std::vector<PackagedWeight> all;

  /// Null for one that is not described.
  const PackagedWeight* find(const std::string& name) const;
};
inline constexpr const char* kWeightsKey = "reprise_weights";

std::string text_of(const PackagedWeights& weights);
/// Nothing where somebody else made the package.
std::optional<PackagedWeights> weights_in(const std::unordered_map<std::string, std::string>& metadata);

/// Whether a call writes neither arguments nor weights, and returns new tensors that have nothing in common.
inline constexpr const char* kFunctionalKey = "reprise_functional";
bool is_functional(const std::unordered_map<std::string, std::string>& metadata);

std::string text_of(const ProgramInputs& inputs);
/// Nothing where somebody else made the package.
std::optional<ProgramInputs> inputs_in(const std::unordered_map<std::string, std::string>& metadata);

}  // namespace reprise
