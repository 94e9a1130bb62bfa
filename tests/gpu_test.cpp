// What only a GPU has: streams, graphs, and memory that is given back to a pool.
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/torch.h>

#include "cpp_models/mlp.h"
#include "reprise/reprise.h"
#include "tests/sized_steps.h"

namespace reprise::test {
namespace {

class Gpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!eager_device().is_cuda()) GTEST_SKIP() << "the backing device is no GPU";
    begin_test(/*compile=*/true);
  }
};

torch::nn::Sequential network(torch::Device device) {
  torch::manual_seed(1);
  torch::nn::Sequential net(torch::nn::Linear(8, 32), torch::nn::ReLU(), torch::nn::Linear(32, 32),
                            torch::nn::Tanh(), torch::nn::Linear(32, 32), torch::nn::ReLU(),
                            torch::nn::Linear(32, 32), torch::nn::Tanh(), torch::nn::Linear(32, 4));
  net->to(device);
  return net;
}

void settle() {
  mark_step();
  wait_for_compiles();
}

/// Losses and final parameters of some training steps.
template <class Optimizer, class Options>
Tensors train(torch::Device device, const Options& options, int steps) {
  auto net = network(device);
  Optimizer optimizer(net->parameters(), options);
  Tensors out;
  for (int step = 0; step < steps; ++step) {
    optimizer.zero_grad();
    const auto loss = (net->forward(given(device, {16, 8}, step)) - given(device, {16, 4}, 100 + step)).square().mean();
    loss.backward();
    optimizer.step();
    out.push_back(loss.detach());
    if (device.is_lazy()) settle();
  }
  for (const auto& parameter : net->parameters()) out.push_back(parameter.detach());
  return out;
}

TEST_F(Gpu, TrainingStepsAreReplayedAsGraphs) {
  const Statistics before = statistics();
  const auto options = torch::optim::SGDOptions(0.1).momentum(0.9);
  const Tensors lazy = train<torch::optim::SGD>(torch::kLazy, options, 24);
  expect_all_close(lazy, train<torch::optim::SGD>(eager_device(), options, 24), 100);
  EXPECT_GE(since(before).cuda_graph_replays, 8u) << explain();
}

TEST_F(Gpu, NumbersThatChangeReachTheGraph) {
  const Statistics before = statistics();
  const auto options = torch::optim::AdamOptions(1e-2);
  const Tensors lazy = train<torch::optim::Adam>(torch::kLazy, options, 24);
  expect_all_close(lazy, train<torch::optim::Adam>(eager_device(), options, 24), 1000);
  EXPECT_GE(since(before).cuda_graph_replays, 8u) << explain();
}

TEST_F(Gpu, ResultsThatAreHeldKeepTheirValues) {
  torch::NoGradGuard no_grad;
  auto lazy_net = network(torch::kLazy), eager_net = network(eager_device());
  const Statistics before = statistics();
  Tensors held, expected;
  for (int call = 0; call < 24; ++call) {
    const auto y = lazy_net->forward(given(torch::kLazy, {6, 8}, call));
    settle();
    expected.push_back(eager_net->forward(given(eager_device(), {6, 8}, call)));
    held.push_back(y);
    held.push_back(y.t());  // another view of the same memory
    expected.push_back(expected.back().t());
  }
  expect_all_close(held, expected, 10);
  EXPECT_GE(since(before).cuda_graph_replays, 8u) << explain();
}

TEST_F(Gpu, InputsThatMoveAndThoseThatStay) {
  torch::NoGradGuard no_grad;
  auto lazy_net = network(torch::kLazy), eager_net = network(eager_device());
  const Statistics before = statistics();
  Tensors others;  // so that inputs come to lie elsewhere
  for (int call = 0; call < 40; ++call) {
    const auto x = given(torch::kLazy, {6, 8}, call);
    if (call % 3 == 0) others.push_back(x);
    if (call == 30) {  // and a parameter
      for (const auto& net : {lazy_net, eager_net}) {
        auto& weight = net->ptr<torch::nn::LinearImpl>(0)->weight;
        weight.set_data(weight.clone() * 2);
      }
    }
    const auto y = lazy_net->forward(x);
    settle();
    expect_close(y, eager_net->forward(given(eager_device(), {6, 8}, call)), 10);
  }
  EXPECT_GE(since(before).cuda_graph_replays, 8u) << explain();
}

TEST_F(Gpu, TheUsersStreamIsTheOneUsed) {
  torch::NoGradGuard no_grad;
  auto lazy_net = network(torch::kLazy), eager_net = network(eager_device());
  const auto stream = c10::cuda::getStreamFromPool();
  for (int call = 0; call < 24; ++call) {
    const auto expected = eager_net->forward(given(eager_device(), {6, 8}, call));
    torch::cuda::synchronize();
    const c10::cuda::CUDAStreamGuard guard(call % 6 < 3 ? stream : c10::cuda::getDefaultCUDAStream());
    const auto y = lazy_net->forward(given(torch::kLazy, {6, 8}, call));
    settle();
    at::cuda::CUDAEvent done;
    done.record();  // on the current stream: waiting for it is enough
    done.synchronize();
    expect_close(y.to(eager_device()), expected, 10);
    torch::cuda::synchronize();
  }
}

TEST_F(Gpu, AResultIsReadWhereItWasMadeAfterTheProgramRanElsewhere) {
  torch::NoGradGuard no_grad;
  auto lazy_net = network(torch::kLazy), eager_net = network(eager_device());
  const c10::cuda::CUDAStream streams[] = {c10::cuda::getStreamFromPool(), c10::cuda::getStreamFromPool()};
  torch::Tensor before, expected_before;
  for (int call = 0; call < 40; ++call) {
    const auto x = given(torch::kLazy, {6, 8}, call), other = given(torch::kLazy, {512, 512}, call);
    const auto expected = eager_net->forward(given(eager_device(), {6, 8}, call));
    torch::cuda::synchronize();
    torch::Tensor y;
    {
      const c10::cuda::CUDAStreamGuard guard(streams[call % 2]);
      auto busy = other;
      for (int k = 0; call % 2 == 1 && k < 20; ++k) busy = busy.matmul(other) * 1e-2;  // ahead of the program there
      y = lazy_net->forward(x);
      settle();
    }
    if (before.defined()) {
      const c10::cuda::CUDAStreamGuard guard(streams[(call + 1) % 2]);
      expect_close(before.to(eager_device()).cpu(), expected_before.cpu(), 10);
    }
    before = y;
    expected_before = expected;
  }
}

TEST_F(Gpu, RandomTensorsThatAreUpdatedInPlaceHoldWhatTheyShould) {
  torch::NoGradGuard no_grad;
  auto lazy_net = network(torch::kLazy), eager_net = network(eager_device());
  Tensors held, expected;
  for (int call = 0; call < 24; ++call) {
    const auto run = [&](torch::nn::Sequential& net, torch::Device device) {
      torch::manual_seed(call);
      auto noise = torch::randn({6, 8}, device).mul_(3);
      return Tensors{noise, net->forward(noise)};
    };
    held = joined(held, run(lazy_net, torch::kLazy));
    settle();
    expected = joined(expected, run(eager_net, eager_device()));
  }
  expect_all_close(held, expected, 10);
}

TEST_F(Gpu, WhatCannotBeCapturedGoesOn) {
  const auto run = [](torch::Device device, int call) {
    auto x = given(device, {4, 4}, call);
    return x * 2;  // two launches
  };
  for (int call = 0; call < 12; ++call) {
    const auto y = run(torch::kLazy, call);
    settle();
    expect_close(y, run(eager_device(), call), 1);
  }
}

TEST_F(Gpu, CompiledFunctionsAreGraphsToo) {
  torch::NoGradGuard no_grad;
  auto lazy_net = network(torch::kLazy), eager_net = network(eager_device());
  const auto compiled = compile(lazy_net);
  const Statistics before = statistics();
  Tensors held, expected;
  for (int call = 0; call < 24; ++call) {
    held.push_back(compiled(given(torch::kLazy, {6, 8}, call)));
    expected.push_back(eager_net->forward(given(eager_device(), {6, 8}, call)));
    settle();
  }
  expect_all_close(held, expected, 10);
  EXPECT_GE(since(before).cuda_graph_replays, 8u) << explain();
}

/// Allocations of the GPU's memory so far.
int64_t allocations() {
  return c10::cuda::CUDACachingAllocator::get()->getDeviceStats(0).allocation[0].allocated;
}

TEST_F(Gpu, ATrainingStepThatIsReplayedNeedsNoNewMemory) {
  auto net = network(torch::kLazy);
  auto optimizer = torch::optim::SGD(net->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
  const auto step = compile([&](const torch::Tensor& x) {
    optimizer.zero_grad();
    const auto loss = net->forward(x).square().mean();
    loss.backward();
    optimizer.step();
    return loss.detach();
  });
  const auto x = given(torch::kLazy, {16, 8}, 1);
  for (int call = 0; call < 40; ++call) {
    step(x);
    settle();
  }
  // Gradients lie in the graph's memory, and those of the step before need not be kept.
  const Statistics before = statistics();
  const int64_t allocated = allocations();
  for (int call = 0; call < 10; ++call) step(x);
  EXPECT_EQ(since(before).cuda_graph_replays, 10u) << explain();
  EXPECT_EQ(allocations(), allocated);
}

TEST_F(Gpu, AProgramThatRunsOutOfMemoryFailsAndIsThereAgain) {
  torch::NoGradGuard no_grad;
  auto& allocator = *c10::cuda::CUDACachingAllocator::get();
  auto net = network(torch::kLazy);
  const auto x = given(torch::kLazy, {1 << 16, 8}, 1);
  torch::Tensor expected;
  for (int call = 0; call < 3; ++call) {  // not yet a graph, which has its memory
    expected = net->forward(x).cpu();
    settle();
  }
  const auto all = static_cast<double>(at::cuda::getCurrentDeviceProperties()->totalGlobalMem);
  torch::cuda::synchronize();
  allocator.emptyCache();
  const auto reserved = static_cast<double>(allocator.getDeviceStats(0).reserved_bytes[0].current);
  allocator.setMemoryFraction((reserved + (1 << 20)) / all, 0);
  EXPECT_THROW(net->forward(x).cpu(), c10::OutOfMemoryError);
  allocator.setMemoryFraction(1.0, 0);
  for (int call = 0; call < 12; ++call) {
    expect_close(net->forward(x).cpu(), expected, 10);
    settle();
  }
}

/// Looks rows of a table up, once with an index that is not there, in a process of its own: the
/// GPU is of no use afterwards.
[[noreturn]] void look_up_what_is_not_there(bool replayed) {
  torch::NoGradGuard no_grad;
  const auto table = given(torch::kLazy, {10, 4}, 1);
  const auto look_up = [&](int64_t index) {
    return ((table.index_select(0, torch::full({3}, index, torch::kLong).to(torch::kLazy)) + 1) * table[0]).sin();
  };
  for (int call = 0; replayed && call < 12; ++call) {
    look_up(call % 10).cpu();
    settle();
  }
  try {
    look_up(1 << 20).cpu();
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    std::_Exit(3);
  }
  std::_Exit(0);
}

TEST_F(Gpu, AnIndexThatIsNotThereIsEagersError) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(look_up_what_is_not_there(/*replayed=*/false), ::testing::ExitedWithCode(3), "device-side assert");
  EXPECT_EXIT(look_up_what_is_not_there(/*replayed=*/true), ::testing::ExitedWithCode(3), "device-side assert");
}

TEST_F(Gpu, APackageForAnotherArchitectureSaysSo) {
  const auto* const gpu = at::cuda::getCurrentDeviceProperties();
  const std::string other = gpu->major == 8 ? "sm_90" : "sm_80";
  const std::string path = ::testing::TempDir() + "another_architecture.pt2";
  torch::NoGradGuard no_grad;
  const auto net = network(torch::kLazy);
  export_package(net, std::tuple(given(torch::kLazy, {6, 8}, 1)), path, {.target = CompileTarget{.architecture = other}});
  try {
    load_package(path);
    ADD_FAILURE() << "loaded";
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what_without_backtrace()).find("it was compiled for " + other + ", and cuda:0 is"),
              std::string::npos)
        << error.what_without_backtrace();
  }
}

TEST_F(Gpu, DropoutDrawsEagersMask) {
  for (int call = 0; call < 10; ++call) {
    const auto run = [&](torch::Device device) {
      const auto x = given(device, {64, 33}, call).requires_grad_();
      torch::manual_seed(call);
      const auto y = torch::dropout(x * 2, 0.3, /*train=*/true) + torch::dropout(x.t(), 0.5, true).t();
      y.sum().backward();
      return Tensors{y.detach(), x.grad()};
    };
    const Tensors lazy = run(torch::kLazy);
    settle();
    expect_all_close(lazy, run(eager_device()), 10);
  }
}

TEST_F(Gpu, MemoryIsNearEagers) {
  const auto peak = [](torch::Device device) {
    auto& allocator = *c10::cuda::CUDACachingAllocator::get();
    allocator.emptyCache();
    allocator.resetPeakStats(0);
    const auto before = allocator.getDeviceStats(0).allocated_bytes[0].current;
    {
      torch::manual_seed(0);
      cpp_models::Mlp net(cpp_models::MlpOptions{});
      net->to(device);
      torch::optim::SGD optimizer(net->parameters(), 0.01);
      for (int step = 0; step < 12; ++step) {
        optimizer.zero_grad();
        net->forward(given(device, {512, 64}, step)).square().mean().backward();
        optimizer.step();
        if (device.is_lazy()) settle();
      }
    }
    return allocator.getDeviceStats(0).allocated_bytes[0].peak - before;
  };
  const auto eager = peak(eager_device()), lazy = peak(torch::kLazy);
  std::cout << "peak memory: eager " << eager << " bytes, lazy " << lazy << " bytes\n";
  EXPECT_LE(lazy, 2 * eager);  // that no step is leaked; what it is exactly, benches say
}

}  // namespace
}  // namespace reprise::test
