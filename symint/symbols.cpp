#include "symint/symbols.h"

#include <mutex>
#include <unordered_map>
#include <vector>

namespace reprise {
namespace {

struct Names {
  std::mutex mutex;
  std::unordered_map<std::string, uint32_t> numbers;
  std::vector<std::string> names;
};
Names& all() {
  static auto* instance = new Names;
  return *instance;
}

}  // namespace

uint32_t symbol_named(std::string_view name) {
  Names& names = all();
  const std::lock_guard lock(names.mutex);
  const auto [found, missing] = names.numbers.try_emplace(
      std::string(name), static_cast<uint32_t>(names.names.size()));
  if (missing) names.names.emplace_back(name);
  return found->second;
}

std::string symbol_name(uint32_t symbol) {
  Names& names = all();
  const std::lock_guard lock(names.mutex);
  return names.names.at(symbol);
}

}  // namespace reprise
