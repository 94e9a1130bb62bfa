/// Every model of the zoo on the lazy device, against eager on its backing device.
///
/// A row `model/mode` has the counters
///   eager_ms, reprise_ms   median time of a step, taken in turns; eager in its own process
///   speedup                median of their ratio
///   max_rel_diff           of losses, outputs, gradients and moments, see max_relative_difference
///   disturbed_diff         largest one of eager's own when its inputs and parameters change
///                          in the last place; measured where max_rel_diff is above 1e-5
///   programs               programs compiled, or loaded from the artifact store, for it
///   first_compiled_step_s  from the first step to the end of the first compiled one
///   compiled               share of the timed segments that ran as compiled programs
///   compared_compiled      the same of the segments whose numbers are compared
/// and, where the backing device is a GPU,
///   host_ms                median time until a step's calls have returned, with the GPU idle
///                          before
///   eager_queued_ms, reprise_queued_ms   a step of some that nobody waits for one by one
#include <benchmark/benchmark.h>
#include <reprise/reprise.h>

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "eager_process.h"
#include "harness.h"
#include "paired_timing.h"
#include "workloads.h"

namespace {

using Clock = std::chrono::steady_clock;

constexpr double kCompileTimeout_s = 300.0;
constexpr int kSettlingRounds = 10;
constexpr int kStepsPerRound = 4;
constexpr int kContestSteps = 30;
constexpr int kComparedSteps = 5;
constexpr uint64_t kDisturbedRuns = 12;
constexpr double kTolerance = 1e-5;  // as bench/report.py has it
constexpr double kComparedLearningRate = 1e-9;  // see Job::set_learning_rate
constexpr double kLearningRates[] = {1e-3, kComparedLearningRate, 1e-3, 1e-3};

/// On a GPU, beside its host.
struct Queued {
  double host_s = 0.0;
  double eager_s = 0.0;
  double lazy_s = 0.0;
};

struct Row {
  bench::PairedTiming timing;
  double max_rel_diff = 0.0;
  std::optional<double> disturbed_diff;
  double compared_compiled = 0.0;
  double programs = 0.0;
  double compiled = 0.0;
  std::optional<double> first_compiled_step_s;
  std::optional<Queued> queued;
  bench::Job lazy;
};

uint64_t programs_ready(const reprise::Statistics& statistics) {
  return statistics.programs_compiled + statistics.programs_loaded;
}

void lazy_step(bench::Job& job) {
  const auto output = job.step();
  reprise::sync();
}

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

void queued_lazy_steps(bench::Job& job, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    job.step();
    reprise::mark_step();
  }
  reprise::sync();
}

Queued measure_queued(bench::Job& job, bench::EagerProcess& eager, double step_s) {
  constexpr int kSamples = 9;
  constexpr double kQueue_s = 50e-3;
  std::vector<double> host_s, eager_s, lazy_s;
  const auto steps = std::max<int64_t>(10, static_cast<int64_t>(kQueue_s / step_s));
  for (int sample = 0; sample < kSamples; ++sample) {
    lazy_step(job);
    const auto begin = Clock::now();
    {
      const auto output = job.step();
      reprise::mark_step();
    }
    host_s.push_back(seconds_since(begin));
    reprise::sync();
    eager_s.push_back(eager.queued_steps(steps) / static_cast<double>(steps));
    lazy_s.push_back(bench::seconds_of(1, [&] { queued_lazy_steps(job, steps); }) /
                     static_cast<double>(steps));
  }
  return {bench::median(host_s), bench::median(eager_s), bench::median(lazy_s)};
}

/// Share of the segments since `before` that ran as compiled programs.
double compiled_share(const reprise::Statistics& before) {
  const auto now = reprise::statistics();
  const auto replayed = static_cast<double>(now.segments_replayed - before.segments_replayed);
  const auto others = static_cast<double>(
      now.segments_interpreted - before.segments_interpreted + now.segments_recorded -
      before.segments_recorded);
  return replayed + others > 0 ? replayed / (replayed + others) : 0.0;
}

/// Steps until one runs compiled; nothing when none does. The learning rate changes on
/// the way, as with a schedule, so that the program has it as an input.
std::optional<double> step_until_compiled(bench::Job& job) {
  const auto begin = Clock::now();
  if (job.set_learning_rate) {
    for (const double rate : kLearningRates) {
      job.set_learning_rate(rate);
      lazy_step(job);
    }
  }
  const auto failures = reprise::statistics().compile_failures;
  while (seconds_since(begin) < kCompileTimeout_s) {
    const auto replayed = reprise::statistics().segments_replayed;
    lazy_step(job);
    const auto now = reprise::statistics();
    if (now.segments_replayed > replayed) {
      return seconds_since(begin);
    }
    if (now.compile_failures > failures) {
      break;
    }
  }
  return std::nullopt;
}

/// Steps until no program is compiled any more, since a later step may differ from the
/// first, and until program and interpreter have had their turns.
void step_until_settled(bench::Job& job) {
  for (int round = 0; round < kSettlingRounds; ++round) {
    const auto before = reprise::statistics();
    for (int step = 0; step < kStepsPerRound; ++step) {
      lazy_step(job);
    }
    reprise::wait_for_compiles();
    const auto after = reprise::statistics();
    if (after.programs_requested == before.programs_requested &&
        after.ops_recorded == before.ops_recorded) {
      break;
    }
  }
  for (int step = 0; step < kContestSteps; ++step) {
    lazy_step(job);
  }
}

/// Outputs or losses of some steps of a fresh job, and what else there is to compare.
std::vector<torch::Tensor> numbers_of(bench::Job job) {
  if (job.set_learning_rate) {
    job.set_learning_rate(kComparedLearningRate);
  }
  std::vector<torch::Tensor> numbers;
  for (int step = 0; step < kComparedSteps; ++step) {
    const auto output = job.step();
    reprise::sync();  // Here the timed steps end too: what follows is not part of them.
    numbers.push_back(output.to(
        torch::kCPU, output.scalar_type(), /*non_blocking=*/false, /*copy=*/true));
  }
  for (const auto& tensor : job.state()) {
    numbers.push_back(tensor.to(torch::kCPU));
  }
  return numbers;
}

/// Compares fresh jobs, whose lazy one finds the programs of this row compiled.
void compare(const bench::Workload& workload, torch::Device eager_device, Row& row) {
  const auto eager = numbers_of(workload.on(eager_device));
  // No turns for the interpreter now.
  const bool demote = std::exchange(reprise::options().demote_slow_programs, false);
  const auto before = reprise::statistics();
  const auto lazy = numbers_of(workload.on(torch::kLazy));
  row.compared_compiled = compiled_share(before);
  reprise::options().demote_slow_programs = demote;
  row.max_rel_diff = bench::max_relative_difference(eager, lazy);
  if (row.max_rel_diff <= kTolerance) {
    return;
  }
  // Does the model magnify rounding, by a ReLU's gate that flips, say?
  double largest = 0.0;
  for (uint64_t run = 1; run <= kDisturbedRuns; ++run) {
    const auto disturbed = numbers_of(workload.on(eager_device, run));
    largest = std::max(largest, bench::max_relative_difference(eager, disturbed));
  }
  row.disturbed_diff = largest;
}

Row measure(const bench::Workload& workload) {
  const auto eager_device = reprise::backing_device();
  const auto before = reprise::statistics();
  Row row;
  row.lazy = workload.on(torch::kLazy);
  row.first_compiled_step_s = step_until_compiled(row.lazy);
  step_until_settled(row.lazy);
  row.programs = static_cast<double>(programs_ready(reprise::statistics()) - programs_ready(before));
  compare(workload, eager_device, row);
  reprise::wait_for_compiles();

  bench::EagerProcess eager(workload.name(), eager_device);
  const auto settled = reprise::statistics();
  row.timing = bench::time_in_pairs(
      [&](int64_t steps) { return eager.steps(steps); },
      [&](int64_t steps) { return bench::seconds_of(steps, [&] { lazy_step(row.lazy); }); });
  row.compiled = compiled_share(settled);
  if (eager_device.is_cuda()) {
    row.queued = measure_queued(row.lazy, eager, row.timing.candidate_s);
  }
  row.programs += static_cast<double>(programs_ready(reprise::statistics()) - programs_ready(settled));
  return row;
}

void run(benchmark::State& state, const bench::Workload& workload) {
  // Google Benchmark calls this several times, to find how many iterations it wants.
  static std::map<std::string, Row> measured;
  auto found = measured.find(workload.name());
  if (found == measured.end()) {
    measured.clear();  // Frees the model before.
    found = measured.emplace(workload.name(), measure(workload)).first;
  }
  auto& row = found->second;
  for (auto _ : state) {
    lazy_step(row.lazy);
  }
  state.counters["eager_ms"] = 1e3 * row.timing.baseline_s;
  state.counters["reprise_ms"] = 1e3 * row.timing.candidate_s;
  state.counters["speedup"] = row.timing.speedup;
  state.counters["pairs"] = static_cast<double>(row.timing.pairs);
  state.counters["max_rel_diff"] = row.max_rel_diff;
  if (row.disturbed_diff) {
    state.counters["disturbed_diff"] = *row.disturbed_diff;
  }
  state.counters["programs"] = row.programs;
  state.counters["compiled"] = row.compiled;
  state.counters["compared_compiled"] = row.compared_compiled;
  if (row.queued) {
    state.counters["host_ms"] = 1e3 * row.queued->host_s;
    state.counters["eager_queued_ms"] = 1e3 * row.queued->eager_s;
    state.counters["reprise_queued_ms"] = 1e3 * row.queued->lazy_s;
  }
  if (row.first_compiled_step_s) {
    state.counters["first_compiled_step_s"] = *row.first_compiled_step_s;
  } else {
    state.SetLabel("not compiled");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (bench::served_eager_steps(argc, argv)) {
    return 0;
  }
  benchmark::AddCustomContext("backing_device", reprise::backing_device().str());
  for (const auto& workload : bench::workloads()) {
    benchmark::RegisterBenchmark(
        workload.name().c_str(), [&](benchmark::State& state) { run(state, workload); })
        ->Unit(benchmark::kMillisecond);
  }
  return bench::run_registered(argc, argv);
}
