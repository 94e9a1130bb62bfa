/// What runs without Python: functions that are replayed by one call (reprise/compile.h), and
/// programs whose store holds what an earlier run of them has compiled.
///
///   explicit/chain100      100 ops on 8 floats
///   explicit/mlp_training  forward, backward and SGD with momentum of a small network
///   explicit/mlp_training_adam  the same with Adam
///   explicit/gpt_training  the same of the zoo's GPT, eager in its own process
///   zoo/MODEL/MODE         what bench_models times, each step a call; with REPRISE_BENCH_ZOO=1
///   threads                8 threads that call one function
///   warm_start             a program that trains a small network with Adam and knows nothing
///                          of Reprise, started again; an iteration is a start
///
/// Counters:
///   us_per_call         time of a call
///   vs_eager            that in proportion to eager's, taken in turns
///   host_us             on a GPU: until the call has returned, with the GPU idle before
///   verified            ops of the timed calls that were verified, not replayed
///   share_of_cores      calls of all threads in proportion to those of one thread times the
///                       cores
///   eager_share         the same of eager, each thread with tensors of its own
///   machine_share       the same of a loop that touches no memory: what the machine gives. Below
///                       1 the cores are not the program's alone, and the others are to be seen
///                       in proportion to it
///   ms_to_first_replay  from the end of the first step, which is recorded, to the end of the
///                       first that a compiled program has a part in; median of the starts
///   python_mapped       whether a start has had libpython in its memory, 0 or 1
///   compiles, loads     programs, of the start with the most; loads are from the store
#include <benchmark/benchmark.h>
#include <reprise/reprise.h>
#include <torch/torch.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "child_process.h"
#include "eager_process.h"
#include "harness.h"
#include "paired_timing.h"
#include "workloads.h"

namespace {

using Call = std::function<void()>;

bench::Timed repeated(Call call) {
  return [call = std::move(call)](int64_t times) { return bench::seconds_of(times, call); };
}

/// Waits for what is queued on a GPU.
void wait() {
  if (reprise::backing_device().is_cuda()) torch::cuda::synchronize(reprise::backing_device().index());
}

double host_us(const Call& call) {
  std::vector<double> us;
  for (int k = 0; k < 101; ++k) {
    wait();
    us.push_back(1e6 * bench::seconds_of(1, call));
  }
  return bench::median(us);
}

/// `compiled` does not wait for a GPU.
void measure(benchmark::State& state, const bench::Timed& eager, const Call& compiled) {
  for (int call = 0; call < 64; ++call) {  // until it is replayed, and known to be faster
    compiled();
    reprise::wait_for_compiles();
  }
  const auto before = reprise::statistics();
  const auto timing = bench::time_in_pairs(eager, repeated([&] {
    compiled();
    wait();
  }));
  for (auto _ : state) compiled();
  const auto after = reprise::statistics();
  state.counters["us_per_call"] = 1e6 * timing.candidate_s;
  state.counters["vs_eager"] = 1.0 / timing.speedup;
  if (reprise::backing_device().is_cuda()) state.counters["host_us"] = host_us(compiled);
  state.counters["verified"] = static_cast<double>(after.ops_verified - before.ops_verified);
}

void chain100(benchmark::State& state) {
  torch::NoGradGuard no_grad;
  const auto chain = [](torch::Tensor x) {
    for (int k = 0; k < 50; ++k) x = x * 1.01 + 0.1;
    return x;
  };
  const auto eager = torch::rand({8}).to(reprise::backing_device()), lazy = eager.to(torch::kLazy);
  const auto compiled = reprise::compile(chain);
  const auto one = [&] {
    chain(eager);
    wait();
  };
  measure(state, repeated(one), [&] { compiled(lazy); });
}

using OptimizerPtr = std::shared_ptr<torch::optim::Optimizer>;

template <class MakeOptimizer>
void mlp_training(benchmark::State& state, const MakeOptimizer& optimizer_of) {
  const auto make = [&](torch::Device device) {
    torch::manual_seed(0);
    torch::nn::Sequential net(torch::nn::Linear(64, 128), torch::nn::ReLU(),
                              torch::nn::Linear(128, 128), torch::nn::ReLU(),
                              torch::nn::Linear(128, 10));
    net->to(device);
    const OptimizerPtr optimizer = optimizer_of(net->parameters());
    const auto step = [=](const torch::Tensor& x, const torch::Tensor& y) mutable {
      optimizer->zero_grad();
      const auto loss = torch::nn::functional::cross_entropy(net->forward(x), y);
      loss.backward();
      optimizer->step();
      return loss.detach();
    };
    return std::pair(step, optimizer);
  };
  const auto device = reprise::backing_device();
  auto eager = make(device).first;
  const auto [step, optimizer] = make(torch::kLazy);
  const auto compiled = reprise::compile(step, {.optimizers = {optimizer.get()}});
  const auto x = torch::rand({32, 64}).to(device);
  const auto y = torch::randint(10, {32}, torch::kLong).to(device);
  const auto lazy_x = x.to(torch::kLazy), lazy_y = y.to(torch::kLazy);
  const auto one = [&] {
    eager(x, y);
    wait();
  };
  measure(state, repeated(one), [&] { compiled(lazy_x, lazy_y); });
}

void with_sgd(benchmark::State& state) {
  mlp_training(state, [](std::vector<torch::Tensor> parameters) -> OptimizerPtr {
    return std::make_shared<torch::optim::SGD>(std::move(parameters),
                                               torch::optim::SGDOptions(0.01).momentum(0.9));
  });
}

void with_adam(benchmark::State& state) {
  mlp_training(state, [](std::vector<torch::Tensor> parameters) -> OptimizerPtr {
    return std::make_shared<torch::optim::Adam>(std::move(parameters), 1e-3);
  });
}

void step_of(benchmark::State& state, const bench::Workload& workload) {
  bench::EagerProcess eager(workload.name(), reprise::backing_device());
  const auto job = workload.on(torch::kLazy);
  const auto compiled = reprise::compile(job.step, {.optimizers = job.optimizers});
  measure(
      state, [&](int64_t steps) { return eager.steps(steps); },
      [&] {
        compiled();
        reprise::mark_step();  // where it is not replayed
      });
}

void gpt_training(benchmark::State& state) { step_of(state, bench::gpt_sgd_training()); }

void threads(benchmark::State& state) {
  constexpr int kThreads = 8;
  torch::NoGradGuard no_grad;
  const auto layers = [](torch::Tensor y, const torch::Tensor& weight) {
    for (int k = 0; k < 4; ++k) y = torch::tanh(y.matmul(weight) * 0.1);
    return y;
  };
  const auto weight = torch::rand({64, 64}).to(torch::kLazy);
  const auto compiled =
      reprise::compile([=](const torch::Tensor& x) { return layers(x, weight); });
  const auto work = [&](int64_t calls) {
    torch::NoGradGuard guard;
    const auto x = torch::rand({32, 64}).to(torch::kLazy);
    for (int64_t k = 0; k < calls; ++k) compiled(x);
  };
  const auto eager_work = [&](int64_t calls) {
    torch::NoGradGuard guard;
    const auto x = torch::rand({32, 64}), own_weight = torch::rand({64, 64});
    for (int64_t k = 0; k < calls; ++k) layers(x, own_weight);
  };
  const auto registers = [](int64_t calls) {
    constexpr int kSteps = 20'000;  // about a call's time
    uint64_t x = 88172645463325252u;
    for (int64_t k = 0; k < calls * kSteps; ++k) {  // xorshift: each step needs the one before
      x ^= x << 13;
      x ^= x >> 7;
      x ^= x << 17;
    }
    benchmark::DoNotOptimize(x);
  };
  for (int call = 0; call < 64; ++call) {
    work(1);
    reprise::wait_for_compiles();
  }
  const int cores = std::min<int>(static_cast<int>(std::thread::hardware_concurrency()), kThreads);
  const auto share_of_cores = [&](const std::function<void(int64_t)>& calls_of_one) {
    const auto timing = bench::time_in_pairs(
        [&](int64_t calls) { return kThreads * bench::seconds_of(1, [&] { calls_of_one(calls); }); },
        [&](int64_t calls) {
          return bench::seconds_of(1, [&] {
            std::vector<std::thread> all;
            for (int k = 0; k < kThreads; ++k) all.emplace_back(calls_of_one, calls);
            for (std::thread& thread : all) thread.join();
          });
        });
    return timing.speedup / cores;
  };
  for (auto _ : state) work(1);
  state.counters["share_of_cores"] = share_of_cores(work);
  state.counters["eager_share"] = share_of_cores(eager_work);
  state.counters["machine_share"] = share_of_cores(registers);
}

/// What a start of the small program tells of itself.
struct Start {
  double ms_to_first_replay = 0.0;
  uint64_t compiles = 0;
  uint64_t loads = 0;
  bool replayed = false;
  bool python_mapped = false;
};

constexpr std::string_view kStartFlag = "--train-a-small-network";
constexpr int kStarts = 9;

bool is_mapped(std::string_view library) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find(library) != std::string::npos) return true;
  }
  return false;
}

/// Calls `step`, which waits for its result, until a program has run, then a while longer, in
/// which other programs may be wanted.
Start start(const std::function<void()>& step) {
  constexpr double kLongest_s = 300.0;
  constexpr int kLaterSteps = 200;
  Start report;
  step();
  const auto begin = std::chrono::steady_clock::now();
  double seconds = 0.0;
  auto totals = reprise::statistics();
  while (totals.segments_replayed == 0 && totals.compile_failures == 0 && seconds < kLongest_s) {
    step();
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    totals = reprise::statistics();
  }
  report.ms_to_first_replay = 1e3 * seconds;
  report.replayed = totals.segments_replayed > 0;
  for (int k = 0; k < kLaterSteps; ++k) step();
  reprise::wait_for_compiles();
  totals = reprise::statistics();
  report.compiles = totals.programs_compiled;
  report.loads = totals.programs_loaded;
  report.python_mapped = is_mapped("libpython");
  return report;
}

/// To be called first in `main`. True when this process is a start of the small program.
bool served_start(int argc, char** argv) {
  if (argc != 2 || argv[1] != kStartFlag) return false;
  bench::set_threads();
  torch::manual_seed(0);
  torch::nn::Sequential net(torch::nn::Linear(64, 128), torch::nn::ReLU(),
                            torch::nn::Linear(128, 128), torch::nn::ReLU(),
                            torch::nn::Linear(128, 10));
  net->to(torch::kLazy);
  torch::optim::Adam adam(net->parameters(), torch::optim::AdamOptions(1e-3));
  const auto x = torch::rand({32, 64}).to(torch::kLazy);
  const auto y = torch::randint(10, {32}, torch::kLong).to(torch::kLazy);
  const Start report = start([&] {
    const auto loss = torch::nn::functional::cross_entropy(net->forward(x), y);
    adam.zero_grad();
    loss.backward();
    adam.step();
    loss.item<double>();
  });
  bench::channel_to_parent().send(report);
  return true;
}

/// A folder of its own for the small program's compiled programs.
class Store {
 public:
  Store() {
    if (::mkdtemp(path_.data()) == nullptr) {
      throw std::system_error(errno, std::generic_category(), path_);
    }
  }
  ~Store() { std::filesystem::remove_all(path_); }
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  /// Starts the small program with it. Throws std::runtime_error where it fails.
  Start start() const {
    const bench::ChildProcess child({std::string(kStartFlag)}, {"REPRISE_CACHE_DIR=" + path_});
    Start report;
    if (!child.channel().receive(report)) throw std::runtime_error("the small program has failed");
    return report;
  }

 private:
  std::string path_ = std::filesystem::temp_directory_path() / "reprise-warm-start-XXXXXX";
};

void warm_start(benchmark::State& state) {
  const Store store;
  if (!store.start().replayed) {
    state.SkipWithError("the start that was to fill the store has replayed nothing");
    return;
  }
  std::vector<double> ms;
  double python_mapped = 0.0, compiles = 0.0, loads = 0.0;
  for (auto _ : state) {
    const Start start = store.start();
    ms.push_back(start.ms_to_first_replay);
    python_mapped = std::max(python_mapped, start.python_mapped ? 1.0 : 0.0);
    compiles = std::max(compiles, static_cast<double>(start.compiles));
    loads = std::max(loads, static_cast<double>(start.loads));
  }
  state.counters["ms_to_first_replay"] = bench::median(ms);
  state.counters["python_mapped"] = python_mapped;
  state.counters["compiles"] = compiles;
  state.counters["loads"] = loads;
}

BENCHMARK(chain100)->Name("explicit/chain100");
BENCHMARK(with_sgd)->Name("explicit/mlp_training");
BENCHMARK(with_adam)->Name("explicit/mlp_training_adam");
BENCHMARK(gpt_training)->Name("explicit/gpt_training")->Unit(benchmark::kMillisecond);
BENCHMARK(threads)->Name("threads");
BENCHMARK(warm_start)->Name("warm_start")->Iterations(kStarts)->Unit(benchmark::kMillisecond);

}  // namespace

int main(int argc, char** argv) {
  if (bench::served_eager_steps(argc, argv) || served_start(argc, argv)) return 0;
  bench::set_threads();
  const char* const zoo = std::getenv("REPRISE_BENCH_ZOO");
  for (const auto& workload : bench::workloads()) {
    if (zoo == nullptr || std::string_view(zoo) != "1") break;
    benchmark::RegisterBenchmark(("zoo/" + workload.name()).c_str(),
                                 [&](benchmark::State& state) { step_of(state, workload); })
        ->Unit(benchmark::kMillisecond);
  }
  return bench::run_registered(argc, argv);
}
