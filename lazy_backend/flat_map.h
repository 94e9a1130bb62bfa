/// \file
/// A hash map from integers to integers for tables that are filled and thrown
/// away again and again: one array, no removal, and `clear` costs nothing.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace reprise {

class FlatMap {
 public:
  static constexpr uint32_t kAbsent = UINT32_MAX;

  /// The value under `key`, kAbsent when the key is new. Valid until the next
  /// call.
  uint32_t& operator[](uint64_t key) {
    if (size_ * 2 >= entries_.size()) grow();
    Entry& entry = find(key);
    if (entry.generation != generation_) {
      entry = {key, kAbsent, generation_};
      ++size_;
    }
    return entry.value;
  }

  void clear() {
    size_ = 0;
    if (++generation_ == 0) {
      std::fill(entries_.begin(), entries_.end(), Entry{});
      generation_ = 1;
    }
  }

 private:
  struct Entry {
    uint64_t key = 0;
    uint32_t value = kAbsent;
    uint32_t generation = 0;  // of another one: empty
  };

  Entry& find(uint64_t key) {
    const size_t mask = entries_.size() - 1;
    size_t at = (key * 0x9E3779B97F4A7C15u >> 32) & mask;
    while (entries_[at].generation == generation_ && entries_[at].key != key) at = (at + 1) & mask;
    return entries_[at];
  }

  void grow() {
    std::vector<Entry> old(std::max<size_t>(64, entries_.size() * 2));
    old.swap(entries_);
    for (const Entry& entry : old) {
      if (entry.generation == generation_) find(entry.key) = entry;
    }
  }

  std::vector<Entry> entries_;
  size_t size_ = 0;
  uint32_t generation_ = 1;
};

}  // namespace reprise
