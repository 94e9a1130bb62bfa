/// What an op costs on the lazy device, with so little to compute that nothing else
/// counts: a chain of 100 ops on tensors of 8 floats.
///
///   chain100/eager    on the backing device
///   chain100/record   run and written down for the first time
///   chain100/verify   compared with the record, not run
///   chain100/replay   compared with the record, then run as a compiled program
///   never_repeats     100 ops chosen at random, other ones in each step; and the same on
///                     64 x 256 numbers, the activations of a small network
///   branches          the chain with one of four ops in its middle, in turns, compiled
///
/// The counter `vs_eager` is the time in proportion to eager's, `vs_straight` that in
/// proportion to `chain100/replay`'s, taken in turns.
#include <benchmark/benchmark.h>
#include <reprise/reprise.h>
#include <reprise/testing.h>

#include <functional>
#include <random>
#include <string>

#include "harness.h"
#include "paired_timing.h"
#include "workloads.h"

namespace {

/// A way to run the chain. Its time is that of `timed`; `prepare` and `clean_up` surround it.
struct Mode {
  std::string name;
  bool compile;
  int settling_steps;
  std::function<void()> prepare;
  std::function<void()> timed;
  std::function<void()> clean_up;

  double run(int64_t repetitions) const {
    double seconds = 0.0;
    for (int64_t k = 0; k < repetitions; ++k) {
      prepare();
      seconds += bench::seconds_of(1, timed);
      clean_up();
    }
    return seconds;
  }
};

void settle(const Mode& mode) {
  for (int step = 0; step < mode.settling_steps; ++step) {
    mode.run(1);
    if (mode.compile) reprise::wait_for_compiles();
  }
}

/// Against the baseline, and where there is a `straight` mode, against that.
void measure(benchmark::State& state, const Mode& baseline, const Mode& mode,
             const Mode* straight) {
  torch::NoGradGuard no_grad;
  reprise::options().compile = mode.compile;
  settle(mode);
  const auto before = reprise::statistics();
  const auto timing = bench::time_in_pairs(
      [&](int64_t times) { return baseline.run(times); },
      [&](int64_t times) { return mode.run(times); });
  const auto after = reprise::statistics();

  for (auto _ : state) {
    state.PauseTiming();
    mode.prepare();
    state.ResumeTiming();
    mode.timed();
    state.PauseTiming();
    mode.clean_up();
    state.ResumeTiming();
  }
  state.counters["vs_eager"] = 1.0 / timing.speedup;
  if (straight != nullptr) {
    settle(*straight);
    const auto against = bench::time_in_pairs(
        [&](int64_t times) { return straight->run(times); },
        [&](int64_t times) { return mode.run(times); });
    state.counters["vs_straight"] = 1.0 / against.speedup;
  }
  state.counters["us_per_op"] = 1e6 * timing.candidate_s / bench::kChainOps;
  state.counters["recorded"] = static_cast<double>(after.ops_recorded - before.ops_recorded);
  state.counters["verified"] = static_cast<double>(after.ops_verified - before.ops_verified);
  state.counters["replayed"] =
      static_cast<double>(after.segments_replayed - before.segments_replayed);
}

/// Ops in an order that does not come again.
class Wandering {
 public:
  torch::Tensor step(torch::Tensor x, const torch::Tensor& factor) {
    for (int op = 0; op < bench::kChainOps; ++op) {
      switch (random_() % 6) {
        case 0: x = x * factor; break;
        case 1: x = torch::relu(x); break;
        case 2: x = x + factor; break;
        case 3: x = torch::abs(x); break;
        case 4: x = torch::maximum(x, factor); break;
        default: x = torch::sqrt(x); break;
      }
    }
    return x;
  }

 private:
  std::minstd_rand random_;
};

/// The chain, one of four ops in its middle.
torch::Tensor branching(const torch::Tensor& x, const torch::Tensor& factor, int path) {
  auto y = bench::chain(x, factor, bench::kChainOps / 2);
  switch (path % 4) {
    case 0: y = y * factor; break;
    case 1: y = y + factor; break;
    case 2: y = y - factor; break;
    default: y = y / factor; break;
  }
  y = torch::relu(y);
  return bench::chain(y, factor, bench::kChainOps / 2 - 2);
}

}  // namespace

int main(int argc, char** argv) {
  const auto x = torch::rand({8}, reprise::backing_device());
  const auto factor = torch::ones({8}, reprise::backing_device());
  const auto lazy_x = x.to(torch::kLazy);
  const auto lazy_factor = factor.to(torch::kLazy);
  reprise::sync();

  const auto nothing = [] {};
  const auto lazy_chain = [&] { bench::chain(lazy_x, lazy_factor); };
  const auto lazy_step = [&] {
    const auto result = bench::chain(lazy_x, lazy_factor);
    reprise::sync();
  };
  Wandering eager_walk, lazy_walk;
  int eager_path = 0, path = 0;
  constexpr int kSettle = 20;
  // As many as it takes to notice that nothing repeats: 100,000 ops.
  constexpr int kNotice = 1'100;
  const Mode eager{"chain100/eager", false, kSettle, nothing, [&] { bench::chain(x, factor); },
                   nothing};
  const Mode replay{"chain100/replay", true, kSettle, nothing, lazy_step, nothing};
  const Mode wandering{"", false, kSettle, nothing, [&] { eager_walk.step(x, factor); }, nothing};
  const auto large = torch::rand({64, 256}, reprise::backing_device());
  const auto lazy_large = large.to(torch::kLazy);
  const Mode wandering_large{"", false, kSettle, nothing,
                             [&] { eager_walk.step(large, large); }, nothing};
  const Mode branching_eager{"", false, kSettle, nothing,
                             [&] { branching(x, factor, eager_path++); }, nothing};
  struct Row {
    Mode mode;
    const Mode* baseline;
    const Mode* straight = nullptr;
  };
  const std::vector<Row> rows = {
      {eager, &eager},
      {{"chain100/record", false, kSettle, reprise::testing::forget_traces, lazy_step, nothing},
       &eager},
      {{"chain100/verify", false, kSettle, nothing, lazy_chain,
        reprise::testing::discard_segment},
       &eager},
      {replay, &eager},
      {{"never_repeats", true, kNotice, nothing,
        [&] {
          const auto result = lazy_walk.step(lazy_x, lazy_factor);
          reprise::sync();
        },
        nothing},
       &wandering},
      {{"never_repeats/64x256", true, kNotice, nothing,
        [&] {
          const auto result = lazy_walk.step(lazy_large, lazy_large);
          reprise::sync();
        },
        nothing},
       &wandering_large},
      {{"branches", true, 4 * kSettle, nothing,
        [&] {
          const auto result = branching(lazy_x, lazy_factor, path++);
          reprise::sync();
        },
        nothing},
       &branching_eager,
       &replay},
  };
  benchmark::AddCustomContext("backing_device", reprise::backing_device().str());
  for (const Row& row : rows) {
    benchmark::RegisterBenchmark(row.mode.name.c_str(),
                                 [&](benchmark::State& state) {
                                   measure(state, *row.baseline, row.mode, row.straight);
                                 })
        ->Unit(benchmark::kMicrosecond);
  }
  return bench::run_registered(argc, argv);
}
