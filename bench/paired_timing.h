/// Times two ways of doing the same work against each other.
///
/// The ways take turns, so that what slows the machine for a while slows both, and
/// their ratio is the median over the pairs.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace bench {

/// Does so many repetitions; returns their time in seconds, so that it can leave
/// preparations out.
using Timed = std::function<double(int64_t repetitions)>;

/// Seconds that so many repetitions of `work` take, for use in a `Timed`.
double seconds_of(int64_t repetitions, const std::function<void()>& work);

/// Of an odd number of values the one in the middle, of an even number the upper one there.
double median(std::vector<double> values);

struct PairedTiming {
  double baseline_s = 0.0;   ///< Median time of a repetition of the baseline.
  double candidate_s = 0.0;  ///< The same of the candidate.
  double speedup = 0.0;      ///< Median of baseline / candidate over the pairs.
  int64_t pairs = 0;
};

/// A turn lasts for some milliseconds, however short a repetition is: as in a program,
/// most of them follow one of their own kind and find their caches warm.
///
/// Runs pairs for the seconds that the environment's `REPRISE_BENCH_SECONDS` says, 2
/// by default; at least 10 and at most 2,000 of them.
PairedTiming time_in_pairs(const Timed& baseline, const Timed& candidate);

/// Largest difference between two lists of tensors, pair by pair, in proportion to
/// the largest magnitude in the expected one: max |actual − expected| / max |expected|.
/// Infinite where a number is missing on one side: nan, inf, or another shape.
double max_relative_difference(
    const std::vector<torch::Tensor>& expected, const std::vector<torch::Tensor>& actual);

}  // namespace bench
