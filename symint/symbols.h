/// \file
/// Names of symbols: sizes that the user says may change.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace reprise {

/// The symbol with this name: a small number, the same for as long as the process lives.
/// Thread-safe.
uint32_t symbol_named(std::string_view name);

/// Thread-safe. Throws std::out_of_range for a number that `symbol_named` has not given.
std::string symbol_name(uint32_t symbol);

}  // namespace reprise
