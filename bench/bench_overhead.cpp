/// What an op costs on the lazy device, with so little to compute that nothing else
/// counts: a chain of 100 ops on tensors of 8 floats.
///
///   chain100/eager    on the backing device
///   chain100/record   run and written down for the first time
///   chain100/verify   compared with the record, not run
///   chain100/replay   compared with the record, then run as a compiled program
///
/// The counter `vs_eager` is the time in proportion to eager's, taken in turns.
#include <benchmark/benchmark.h>
#include <reprise/reprise.h>
#include <reprise/testing.h>

#include <functional>
#include <string>

#include "harness.h"
#include "paired_timing.h"
#include "workloads.h"

namespace {

constexpr int kSettlingSteps = 20;

/// A way to run the chain. Its time is that of `timed`; `prepare` and `clean_up` surround it.
struct Mode {
  std::string name;
  bool compile;
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

void measure(benchmark::State& state, const Mode& eager, const Mode& mode) {
  torch::NoGradGuard no_grad;
  reprise::options().compile = mode.compile;
  for (int step = 0; step < kSettlingSteps; ++step) {
    mode.run(1);
    reprise::wait_for_compiles();
  }
  const auto before = reprise::statistics();
  const auto timing = bench::time_in_pairs(
      [&](int64_t times) { return eager.run(times); },
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
  state.counters["us_per_op"] = 1e6 * timing.candidate_s / bench::kChainOps;
  state.counters["recorded"] = static_cast<double>(after.ops_recorded - before.ops_recorded);
  state.counters["verified"] = static_cast<double>(after.ops_verified - before.ops_verified);
  state.counters["replayed"] =
      static_cast<double>(after.segments_replayed - before.segments_replayed);
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
  const std::vector<Mode> modes = {
      {"chain100/eager", false, nothing, [&] { bench::chain(x, factor); }, nothing},
      {"chain100/record", false, reprise::testing::forget_traces, lazy_step, nothing},
      {"chain100/verify", false, nothing, lazy_chain, reprise::testing::discard_segment},
      {"chain100/replay", true, nothing, lazy_step, nothing},
  };
  benchmark::AddCustomContext("backing_device", reprise::backing_device().str());
  for (const auto& mode : modes) {
    benchmark::RegisterBenchmark(
        mode.name.c_str(), [&](benchmark::State& state) { measure(state, modes.front(), mode); })
        ->Unit(benchmark::kMicrosecond);
  }
  return bench::run_registered(argc, argv);
}
