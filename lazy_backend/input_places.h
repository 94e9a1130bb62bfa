/// \file
/// Which inputs of a program lie still from run to run, and which come at another address.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace reprise {

/// One user of a program: a model, say, whose parameters lie still, while what it is given
/// lies anywhere. A program that two models share has two of these.
class InputPlaces {
 public:
  using Addresses = std::span<const void* const>;
  /// Runs at the same places after which they are taken to stay.
  static constexpr int kRuns = 3;

  /// Notes where the inputs lie in a run. What lies elsewhere than before moves.
  void see(Addresses addresses) {
    if (addresses_.empty()) {
      addresses_.assign(addresses.begin(), addresses.end());
      moves_.assign(addresses.size(), false);
    }
    bool moved = false;
    for (size_t k = 0; k < addresses.size(); ++k) {
      if (moves_[k] || addresses[k] == addresses_[k]) continue;
      moves_[k] = moved = true;
    }
    runs_ = moved ? 1 : runs_ + 1;
  }
  bool settled() const { return runs_ > kRuns; }
  bool moves(size_t input) const { return moves_[input]; }

  /// How many inputs lie still and where they lay before; nothing of it moved where this is
  /// `still()`.
  size_t in_place(Addresses addresses) const {
    size_t count = 0;
    for (size_t k = 0; k < addresses.size(); ++k) count += !moves_[k] && addresses[k] == addresses_[k];
    return count;
  }
  size_t still() const {
    size_t count = 0;
    for (const bool moves : moves_) count += !moves;
    return count;
  }
  bool fits(Addresses addresses) const {
    for (size_t k = 0; k < addresses.size(); ++k) {
      if (!moves_[k] && addresses[k] != addresses_[k]) return false;
    }
    return true;
  }

 private:
  std::vector<const void*> addresses_;
  std::vector<bool> moves_;
  int runs_ = 0;
};

/// The one among `users` that runs with inputs at these addresses: one that they fit, or that
/// has at least half of what lies still there; `users.size()` where there is none, and another
/// one may be made, which is the case for fewer than `most`. `places` gives a user's places.
/// Those used last come first.
template <class Users, class Places>
size_t user_at(const Users& users, InputPlaces::Addresses addresses, size_t most, const Places& places) {
  size_t found = users.size(), found_still = 0;
  for (size_t k = 0; k < users.size(); ++k) {
    const InputPlaces& each = places(users[k]);
    if (!each.fits(addresses)) continue;
    const size_t still = each.still();
    if (found < users.size() && still <= found_still) continue;
    found = k;
    found_still = still;
  }
  if (found < users.size()) return found;
  for (size_t k = 0; k < users.size(); ++k) {
    const InputPlaces& each = places(users[k]);
    if (2 * each.in_place(addresses) >= each.still()) return k;
  }
  return users.size() < most ? users.size() : users.size() - 1;
}

}  // namespace reprise
