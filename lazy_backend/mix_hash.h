/// \file
/// One step of a hash over numbers.
#pragma once

#include <cstdint>

namespace reprise {

inline uint64_t mix_hash(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
  return hash ^ (hash >> 29);
}

}  // namespace reprise
