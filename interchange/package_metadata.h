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

std::string text_of(const ProgramInputs& inputs);
/// Nothing where somebody else made the package.
std::optional<ProgramInputs> inputs_in(const std::unordered_map<std::string, std::string>& metadata);

}  // namespace reprise
