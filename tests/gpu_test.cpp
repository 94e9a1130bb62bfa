// What only a GPU has: streams, graphs, and memory that is given back to a pool.
#include <ATen/cuda/CUDAEvent.h>
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
