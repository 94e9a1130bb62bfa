#include "paired_timing.h"

#include <torch/utils.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <thread>

namespace bench {

namespace {

constexpr int64_t kFewestPairs = 10;
constexpr int64_t kMostPairs = 2000;
constexpr double kDefaultBudget_s = 2.0;
// A turn's first step finds the caches full of the other's data.
constexpr double kShortestTurn_s = 20e-3;
// After a parallel region libgomp's threads go on spinning for some milliseconds: those
// of the one process would take the cores of the other.
constexpr auto kPauseBetweenTurns = std::chrono::milliseconds(20);

/// The same for one pair of tensors. Numbers that are equal, infinite ones too, do not differ.
double relative_difference(const torch::Tensor& expected, const torch::Tensor& actual) {
  constexpr double kIncomparable = std::numeric_limits<double>::infinity();
  if (expected.sizes() != actual.sizes()) {
    return kIncomparable;
  }
  if (expected.numel() == 0 || torch::equal(expected, actual)) {
    return 0.0;
  }
  const auto difference = (actual - expected).abs().max().item<double>();
  const auto magnitude = expected.abs().max().item<double>();
  const double relative = magnitude > 0 ? difference / magnitude : kIncomparable;
  return relative >= 0 ? relative : kIncomparable;  // nan compares false
}

}  // namespace

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

double seconds_of(int64_t repetitions, const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t k = 0; k < repetitions; ++k) {
    work();
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

PairedTiming time_in_pairs(const Timed& baseline, const Timed& candidate) {
  const char* const seconds = std::getenv("REPRISE_BENCH_SECONDS");
  const double budget_s = seconds ? std::atof(seconds) : kDefaultBudget_s;
  double shortest_s = kShortestTurn_s;
  for (int warm_up = 0; warm_up < 3; ++warm_up) {
    shortest_s = std::min({shortest_s, baseline(1), candidate(1)});
  }
  const auto turn = static_cast<int64_t>(std::ceil(kShortestTurn_s / shortest_s));
  const auto pause = [] {
    if (torch::get_num_threads() > 1) {
      std::this_thread::sleep_for(kPauseBetweenTurns);
    }
  };
  std::vector<double> baseline_s, candidate_s, ratios;
  const auto begin = std::chrono::steady_clock::now();
  const auto elapsed_s = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  for (int64_t pair = 0; pair < kMostPairs && (pair < kFewestPairs || elapsed_s() < budget_s);
       ++pair) {
    pause();
    baseline_s.push_back(baseline(turn) / static_cast<double>(turn));
    pause();
    candidate_s.push_back(candidate(turn) / static_cast<double>(turn));
    ratios.push_back(baseline_s.back() / candidate_s.back());
  }
  const auto pairs = static_cast<int64_t>(ratios.size());
  return {median(baseline_s), median(candidate_s), median(ratios), pairs};
}

double max_relative_difference(
    const std::vector<torch::Tensor>& expected, const std::vector<torch::Tensor>& actual) {
  if (expected.size() != actual.size()) {
    return std::numeric_limits<double>::infinity();
  }
  double largest = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    largest = std::max(
        largest,
        relative_difference(
            expected[i].detach().to(torch::kCPU, torch::kDouble),
            actual[i].detach().to(torch::kCPU, torch::kDouble)));
  }
  return largest;
}

}  // namespace bench
