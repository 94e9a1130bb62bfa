/// What runs without Python: functions that are replayed by one call (reprise/compile.h).
///
///   explicit/chain100      100 ops on 8 floats
///   explicit/mlp_training  forward, backward and SGD with momentum of a small network
///   threads                8 threads that call one function
///
/// The counter `us_per_call` is the time of a call, `vs_eager` that in proportion to eager's,
/// taken in turns, `share_of_cores` the calls of all threads in proportion to those of one
/// thread times the cores.
#include <benchmark/benchmark.h>
#include <reprise/reprise.h>
#include <torch/torch.h>

#include <algorithm>
#include <functional>
#include <thread>
#include <vector>

#include "harness.h"
#include "paired_timing.h"

namespace {

using Call = std::function<void()>;

void measure(benchmark::State& state, const Call& eager, const Call& compiled) {
  for (int call = 0; call < 64; ++call) {  // until it is replayed, and known to be faster
    compiled();
    reprise::wait_for_compiles();
  }
  const auto repeat = [](const Call& call) {
    return [&call](int64_t times) {
      return bench::seconds_of(1, [&] {
        for (int64_t k = 0; k < times; ++k) call();
      });
    };
  };
  const auto before = reprise::statistics();
  const auto timing = bench::time_in_pairs(repeat(eager), repeat(compiled));
  for (auto _ : state) compiled();
  const auto after = reprise::statistics();
  state.counters["us_per_call"] = 1e6 * timing.candidate_s;
  state.counters["vs_eager"] = 1.0 / timing.speedup;
  state.counters["verified"] = static_cast<double>(after.ops_verified - before.ops_verified);
}

void chain100(benchmark::State& state) {
  torch::NoGradGuard no_grad;
  const auto chain = [](torch::Tensor x) {
    for (int k = 0; k < 50; ++k) x = x * 1.01 + 0.1;
    return x;
  };
  const auto host = torch::rand({8}), lazy = host.to(torch::kLazy);
  const auto compiled = reprise::compile(chain);
  measure(state, [&] { chain(host); }, [&] { compiled(lazy); });
}

void mlp_training(benchmark::State& state) {
  const auto make = [](torch::Device device) {
    torch::manual_seed(0);
    torch::nn::Sequential net(torch::nn::Linear(64, 128), torch::nn::ReLU(),
                              torch::nn::Linear(128, 128), torch::nn::ReLU(),
                              torch::nn::Linear(128, 10));
    net->to(device);
    auto sgd = std::make_shared<torch::optim::SGD>(net->parameters(),
                                                   torch::optim::SGDOptions(0.01).momentum(0.9));
    return [=](const torch::Tensor& x, const torch::Tensor& y) mutable {
      sgd->zero_grad();
      const auto loss = torch::nn::functional::cross_entropy(net->forward(x), y);
      loss.backward();
      sgd->step();
      return loss.detach();
    };
  };
  auto eager = make(torch::kCPU);
  const auto compiled = reprise::compile(make(torch::kLazy));
  const auto x = torch::rand({32, 64}), y = torch::randint(10, {32}, torch::kLong);
  const auto lazy_x = x.to(torch::kLazy), lazy_y = y.to(torch::kLazy);
  measure(state, [&] { eager(x, y); }, [&] { compiled(lazy_x, lazy_y); });
}

void threads(benchmark::State& state) {
  constexpr int kThreads = 8;
  torch::NoGradGuard no_grad;
  const auto weight = torch::rand({64, 64}).to(torch::kLazy);
  const auto compiled = reprise::compile([=](const torch::Tensor& x) {
    auto y = x;
    for (int k = 0; k < 4; ++k) y = torch::tanh(y.matmul(weight) * 0.1);
    return y;
  });
  const auto work = [&](int64_t calls) {
    torch::NoGradGuard guard;
    const auto x = torch::rand({32, 64}).to(torch::kLazy);
    for (int64_t k = 0; k < calls; ++k) compiled(x);
  };
  for (int call = 0; call < 64; ++call) {
    work(1);
    reprise::wait_for_compiles();
  }
  const auto timing = bench::time_in_pairs(
      [&](int64_t calls) { return kThreads * bench::seconds_of(1, [&] { work(calls); }); },
      [&](int64_t calls) {
        return bench::seconds_of(1, [&] {
          std::vector<std::thread> all;
          for (int k = 0; k < kThreads; ++k) all.emplace_back(work, calls);
          for (std::thread& thread : all) thread.join();
        });
      });
  for (auto _ : state) work(1);
  const int cores = std::min<int>(static_cast<int>(std::thread::hardware_concurrency()), kThreads);
  state.counters["share_of_cores"] = timing.speedup / cores;
}

BENCHMARK(chain100)->Name("explicit/chain100");
BENCHMARK(mlp_training)->Name("explicit/mlp_training");
BENCHMARK(threads)->Name("threads");

}  // namespace

int main(int argc, char** argv) {
  bench::set_threads();
  return bench::run_registered(argc, argv);
}
