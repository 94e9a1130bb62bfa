#include "lazy_backend/differences.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace reprise {
namespace {

/// The same for `kLanes` numbers at a time. Without branches and with a sum for each
/// lane, so that compilers make vector instructions of it (see the file's flags).
template <int kLanes>
struct Lanes {
  double largest[kLanes] = {}, squares[kLanes] = {}, expected_squares[kLanes] = {};
  double changed_squares[kLanes] = {}, limit_exceeded[kLanes] = {};

  template <class T>
  void add(const T* actual, const T* expected, const T* before, double relative,
           double absolute) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    for (int k = 0; k < kLanes; ++k) {
      const auto x = static_cast<double>(actual[k]), y = static_cast<double>(expected[k]);
      const double gap = std::abs(x - y);  // NaN for two infinities of one sign, and of NaN
      const double odd = (x == y) | ((x != x) & (y != y)) ? 0.0 : kInfinity;
      const double distance = gap == gap ? gap : odd;
      const double size = std::abs(y) < kInfinity ? std::abs(y) : 0.0;
      const double change = y - static_cast<double>(before[k]);
      const double finite_change = std::abs(change) < kInfinity ? change : 0.0;
      const double exceeded = distance - relative * size - absolute;
      squares[k] += distance * distance;
      expected_squares[k] += size * size;
      changed_squares[k] += finite_change * finite_change;
      largest[k] = distance > largest[k] ? distance : largest[k];
      limit_exceeded[k] = exceeded > limit_exceeded[k] ? exceeded : limit_exceeded[k];
    }
  }

  void add_to(Differences& sum) const {
    for (int k = 0; k < kLanes; ++k) {
      sum.largest = std::max(sum.largest, largest[k]);
      sum.squares += squares[k];
      sum.expected_squares += expected_squares[k];
      sum.changed_squares += changed_squares[k];
      sum.limit_exceeded = std::max(sum.limit_exceeded, limit_exceeded[k]);
    }
  }
};

}  // namespace

template <class T>
void add_differences(const T* actual, const T* expected, const T* before, int64_t count,
                     double relative, double absolute, Differences& sum) {
  constexpr int kWide = 8;
  int64_t k = 0;
  Lanes<kWide> wide;
  for (; k + kWide <= count; k += kWide) {
    wide.add(actual + k, expected + k, before + k, relative, absolute);
  }
  wide.add_to(sum);
  Lanes<1> rest;
  for (; k < count; ++k) rest.add(actual + k, expected + k, before + k, relative, absolute);
  rest.add_to(sum);
}

template <class T>
double disturb(T* numbers, int64_t count, double unit, uint32_t seed) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  double largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    // The finisher of MurmurHash3, which makes any bit depend on all.
    auto hash = (static_cast<uint32_t>(k) + 1) * 0x9e3779b9u ^ seed;
    hash = (hash ^ hash >> 16) * 0x85ebca6bu;
    hash = (hash ^ hash >> 13) * 0xc2b2ae35u;
    const double error = static_cast<int32_t>(hash ^ hash >> 16) * 0x1p-31;
    const auto number = static_cast<double>(numbers[k]);
    const double size = std::abs(number);
    largest = size > largest && size < kInfinity ? size : largest;
    numbers[k] = static_cast<T>(number * (1 + error * 2 * unit));
  }
  return largest;
}
template double disturb<float>(float*, int64_t, double, uint32_t);
template double disturb<double>(double*, int64_t, double, uint32_t);
template double disturb<c10::Half>(c10::Half*, int64_t, double, uint32_t);
template double disturb<c10::BFloat16>(c10::BFloat16*, int64_t, double, uint32_t);

#define REPRISE_INSTANTIATE(T)                                                       \
  template void add_differences<T>(const T*, const T*, const T*, int64_t, double, double, \
                                   Differences&);
REPRISE_INSTANTIATE(bool)
REPRISE_INSTANTIATE(uint8_t)
REPRISE_INSTANTIATE(int8_t)
REPRISE_INSTANTIATE(int16_t)
REPRISE_INSTANTIATE(int32_t)
REPRISE_INSTANTIATE(int64_t)
REPRISE_INSTANTIATE(float)
REPRISE_INSTANTIATE(double)
REPRISE_INSTANTIATE(c10::Half)
REPRISE_INSTANTIATE(c10::BFloat16)
#undef REPRISE_INSTANTIATE

}  // namespace reprise
