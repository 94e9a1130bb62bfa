/// The lazy tensor core's own TorchScript backend, against eager, as a peer.
///
/// It claims the same device as Reprise, hence a program of its own. Its tensors are
/// of a type of their own, so `module->to(torch::kLazy)` throws; the weights of the
/// modules it can run are put in their places one by one. Rows that it cannot run
/// report its error: what it makes of a chunk's part lies on the CPU (torch 2.11), and
/// a module's own buffers cannot be moved. Counters as in bench_models and bench_overhead.
#include <benchmark/benchmark.h>
#include <torch/csrc/lazy/backend/backend_device.h>
#include <torch/csrc/lazy/core/lazy_graph_executor.h>
#include <torch/csrc/lazy/ts_backend/ts_backend_impl.h>

#include <map>

#include "eager_process.h"
#include "harness.h"
#include "paired_timing.h"
#include "workloads.h"

namespace {

namespace nn = torch::nn;

void sync() {
  const torch::lazy::BackendDevice device;
  torch::lazy::LazyGraphExecutor::Get()->SyncLiveTensorsGraph(&device, {}, /*wait=*/true);
  torch::lazy::LazyGraphExecutor::Get()->MarkStep(device);
}

void replace(torch::Tensor& tensor) {
  if (tensor.defined()) {
    tensor = tensor.detach().to(torch::kLazy);
  }
}

template <typename Module>
bool replace_weights(nn::Module& module) {
  auto* typed = dynamic_cast<Module*>(&module);
  if (typed == nullptr) {
    return false;
  }
  replace(typed->weight);
  if constexpr (requires { typed->bias; }) {
    replace(typed->bias);
  }
  if constexpr (requires { typed->running_mean; }) {
    replace(typed->running_mean);
    replace(typed->running_var);
  }
  return true;
}

/// Moves every weight of `model`, as `model.to(torch::kLazy)` would.
void move_to_lazy(nn::Module& model) {
  for (const auto& module : model.modules()) {
    const bool moved = replace_weights<nn::LinearImpl>(*module) ||
        replace_weights<nn::EmbeddingImpl>(*module) ||
        replace_weights<nn::LayerNormImpl>(*module) ||
        replace_weights<nn::Conv2dImpl>(*module) ||
        replace_weights<nn::ConvTranspose2dImpl>(*module) ||
        replace_weights<nn::BatchNorm2dImpl>(*module);
    const bool has_tensors = !module->parameters(/*recurse=*/false).empty() ||
        !module->buffers(/*recurse=*/false).empty();
    TORCH_CHECK(moved || !has_tensors, "cannot move the tensors of a ", module->name());
  }
}

bench::Job lazy_job(const bench::Workload& workload) {
  auto job = workload.on(torch::kCPU);
  move_to_lazy(*job.model);
  replace(*job.input);
  return job;
}

struct Row {
  bench::PairedTiming timing;
  double max_rel_diff = 0.0;
  bench::Job lazy;
};

void lazy_step(bench::Job& job) {
  const auto output = job.step();
  sync();
}

Row measure(const bench::Workload& workload) {
  Row row;
  row.lazy = lazy_job(workload);
  sync();
  row.max_rel_diff =
      bench::max_relative_difference({workload.on(torch::kCPU).step()}, {row.lazy.step()});
  bench::EagerProcess eager(workload.name(), torch::kCPU);
  row.timing = bench::time_in_pairs(
      [&](int64_t steps) { return eager.steps(steps); },
      [&](int64_t steps) { return bench::seconds_of(steps, [&] { lazy_step(row.lazy); }); });
  return row;
}

void run(benchmark::State& state, const bench::Workload& workload) {
  static std::map<std::string, Row> measured;
  try {
    auto found = measured.find(workload.name());
    if (found == measured.end()) {
      measured.clear();
      found = measured.emplace(workload.name(), measure(workload)).first;
    }
    auto& row = found->second;
    for (auto _ : state) {
      lazy_step(row.lazy);
    }
    state.counters["eager_ms"] = 1e3 * row.timing.baseline_s;
    state.counters["ltc_ms"] = 1e3 * row.timing.candidate_s;
    state.counters["speedup"] = row.timing.speedup;
    state.counters["max_rel_diff"] = row.max_rel_diff;
  } catch (const c10::Error& error) {
    state.SkipWithError(error.what_without_backtrace());
  } catch (const std::exception& error) {
    state.SkipWithError(error.what());
  }
}

/// As chain100/replay in bench_overhead: traced anew and run.
void run_chain(benchmark::State& state) {
  torch::NoGradGuard no_grad;
  const auto x = torch::rand({8});
  const auto factor = torch::ones({8});
  const auto lazy_x = x.to(torch::kLazy);
  const auto lazy_factor = factor.to(torch::kLazy);
  const auto step = [&] {
    const auto result = bench::chain(lazy_x, lazy_factor);
    sync();
  };
  const auto timing = bench::time_in_pairs(
      [&](int64_t times) { return bench::seconds_of(times, [&] { bench::chain(x, factor); }); },
      [&](int64_t times) { return bench::seconds_of(times, step); });
  for (auto _ : state) {
    step();
  }
  state.counters["vs_eager"] = 1.0 / timing.speedup;
  state.counters["us_per_op"] = 1e6 * timing.candidate_s / bench::kChainOps;
}

}  // namespace

int main(int argc, char** argv) {
  if (bench::served_eager_steps(argc, argv)) {
    return 0;
  }
  torch::lazy::InitTorchScriptBackend();
  benchmark::RegisterBenchmark("chain100/ltc", run_chain)->Unit(benchmark::kMicrosecond);
  for (const auto& workload : bench::workloads()) {
    if (workload.is_forward()) {
      benchmark::RegisterBenchmark(
          workload.name().c_str(), [&](benchmark::State& state) { run(state, workload); })
          ->Unit(benchmark::kMillisecond);
    }
  }
  return bench::run_registered(argc, argv);
}
