/// \file
/// How far the numbers of two arrays are apart, and small changes to those of one.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace reprise {

/// Where two numbers are the same, NaN or infinite, they differ by 0; where one is not
/// finite and the other another number, by infinity.
struct Differences {
  double largest = 0;
  double squares = 0;           ///< sum of their squares
  double expected_squares = 0;  ///< of the finite numbers that were expected
  double changed_squares = 0;   ///< of how far those are from what was there before
  double limit_exceeded = 0;    ///< the most that a number is beyond its own limit
};

/// Adds those of `count` numbers to `sum`. A number's own limit is
/// `relative * |expected| + absolute`.
template <class T>
void add_differences(const T* actual, const T* expected, const T* before, int64_t count,
                     double relative, double absolute, Differences& sum);

/// Multiplies each number by one plus up to two `unit`s of either sign, others for another
/// `seed`. Returns the largest finite magnitude that was there.
template <class T>
double disturb(T* numbers, int64_t count, double unit, uint32_t seed);

}  // namespace reprise
