// One session a thread; what is pending in one is completed when another reads it.
#include <atomic>
#include <thread>

#include "reprise/reprise.h"
#include "reprise/testing.h"
#include "tests/three_ways.h"

namespace reprise::test {
namespace {

using Threads = Lazy;

template <class Function>
void in_threads(int count, const Function& function) {
  std::vector<std::thread> threads;
  std::vector<std::exception_ptr> errors(static_cast<size_t>(count));
  for (int t = 0; t < count; ++t) {
    threads.emplace_back([&, t] {
      try {
        function(t);
      } catch (...) {
        errors[static_cast<size_t>(t)] = std::current_exception();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

TEST_F(Threads, EachHasItsOwnSession) {
  for (const bool compile : {false, true}) {
    begin_test(compile);
    Tensors out(2);
    in_threads(2, [&](int t) {
      auto x = torch::full({4}, t + 1.0f).to(torch::kLazy);
      for (int k = 0; k < 40; ++k) {
        x = torch::tanh(x * 1.5) + t;
        if (k % 2 == 0) mark_step();
        if (k == 20) wait_for_compiles();
      }
      out[static_cast<size_t>(t)] = x;
    });
    for (int t = 0; t < 2; ++t) {
      auto x = torch::full({4}, t + 1.0f);
      for (int k = 0; k < 40; ++k) x = torch::tanh(x * 1.5) + t;
      expect_close(out[static_cast<size_t>(t)], x);
    }
  }
}

TEST_F(Threads, WhatIsPendingInOneIsReadByAnother) {
  const auto x = torch::ones({3}).to(torch::kLazy);
  for (int k = 0; k < 4; ++k) {
    const auto y = x * 2 + 1;  // pending from the second time on
    torch::Tensor z;
    std::thread([&] {
      EXPECT_EQ(y.sum().item<float>(), 9.0f);
      z = y + 1;
    }).join();
    EXPECT_EQ((z + y).sum().item<float>(), 21.0f);
    mark_step();
  }
}

TEST_F(Threads, OpsRunWhenAllElseOfAThreadHasEnded) {
  struct Last {
    torch::Tensor x;
    float* sum = nullptr;
    ~Last() { *sum = (x + 1).sum().item<float>(); }
  };
  for (const uint64_t paused : {uint64_t{0}, uint64_t{1'000'000}}) {
    SCOPED_TRACE(paused);
    float sum = 0;
    std::thread([&] {
      torch::ones({1}, eager_device());  // what libtorch itself has for a thread of a GPU outlives it
      thread_local Last last;  // made before ours, and so destroyed after it
      last.sum = &sum;
      last.x = torch::ones({4}).to(torch::kLazy);
      reprise::testing::pause_recording(paused);
      for (int k = 0; k < 4; ++k) last.x = last.x * 0.5;
    }).join();
    EXPECT_EQ(sum, 4.25f);
  }
}

TEST_F(Threads, WhatIsPendingWhenAThreadEndsIsCompleted) {
  for (int k = 0; k < 4; ++k) {
    torch::Tensor y;
    std::thread([&] {
      const auto x = torch::ones({3}).to(torch::kLazy);
      y = x * 2 + 1;
    }).join();
    EXPECT_EQ(y.sum().item<float>(), 9.0f);
    y.add_(1);
    EXPECT_EQ(y.sum().item<float>(), 12.0f);
  }
}

TEST_F(Threads, SharedParametersServeManyReaders) {
  for (const bool compile : {false, true}) {
    begin_test(compile);
    torch::nn::Sequential model(torch::nn::Linear(6, 16), torch::nn::ReLU(),
                                torch::nn::Linear(16, 3));
    const auto input = torch::randn({5, 6});
    torch::Tensor expected;
    {
      torch::NoGradGuard no_grad;
      expected = model->forward(input);
    }
    model->to(torch::kLazy);
    std::atomic<int> wrong{0};
    in_threads(8, [&](int) {
      torch::NoGradGuard no_grad;
      for (int k = 0; k < 60; ++k) {
        const auto y = model->forward(input.to(torch::kLazy));
        if (k % 3 != 0) mark_step();
        if (!torch::allclose(y.cpu(), expected, 1e-5, 1e-5)) ++wrong;
        if (k == 30) wait_for_compiles();
      }
    });
    EXPECT_EQ(wrong, 0);
  }
}

TEST_F(Threads, AWriteInOneIsSeenInTheNextByAnother) {
  const auto x = torch::zeros({3}).to(torch::kLazy);
  for (int k = 0; k < 8; ++k) {
    std::thread([&] { x.add_(1); }).join();
    EXPECT_EQ((x * 1).sum().item<float>(), 3.0f * static_cast<float>(k + 1));
    x.add_(0);
    mark_step();
  }
}

TEST_F(Threads, TensorsArePassedInAChain) {
  // A producer's pending results are another's inputs, step after step.
  for (int k = 0; k < 3; ++k) {
    auto x = torch::ones({4}).to(torch::kLazy);
    for (int hop = 0; hop < 6; ++hop) {
      std::thread([&] { x = x * 2 - 0.5; }).join();
      x = x + 0.25;
    }
    auto expected = torch::ones({4});
    for (int hop = 0; hop < 6; ++hop) expected = expected * 2 - 0.5 + 0.25;
    expect_close(x, expected);
    mark_step();
  }
}

TEST_F(Threads, TwoTrainTheirOwnModelsAtOnce) {
  begin_test(/*compile=*/true);
  const auto train = [](torch::Device device, int t) {
    torch::nn::Linear model(4, 2);
    {
      torch::NoGradGuard no_grad;
      model->weight.fill_(0.1 * (t + 1));
      model->bias.fill_(0.5);
    }
    model->to(device);
    torch::optim::SGD optimizer(model->parameters(), 0.05);
    const auto x = torch::arange(12).to(torch::kFloat).view({3, 4}).div(10).to(device);
    for (int k = 0; k < 60; ++k) {
      optimizer.zero_grad();
      model->forward(x).square().mean().backward();
      optimizer.step();
      if (k == 30 && device.is_lazy()) {
        mark_step();
        wait_for_compiles();
      }
    }
    return model->weight.detach();
  };
  Tensors out(2);
  in_threads(2, [&](int t) { out[static_cast<size_t>(t)] = train(torch::kLazy, t); });
  for (int t = 0; t < 2; ++t) {
    expect_close(out[static_cast<size_t>(t)], train(eager_device(), t), 10);
  }
}

TEST_F(Threads, AnErrorInOneIsNotTheOthers) {
  if (!eager_device().is_cpu()) GTEST_SKIP() << "an assertion in a CUDA kernel ends the process";
  const auto table = torch::ones({4, 2}).to(torch::kLazy);
  in_threads(2, [&](int t) {
    for (int k = 0; k < 10; ++k) {
      const auto index = torch::tensor({0, t == 1 && k % 2 == 1 ? 9 : 1}).to(torch::kLazy);
      try {
        const auto y = torch::embedding(table, index).sum();
        EXPECT_EQ(y.item<float>(), 4.0f);
        EXPECT_FALSE(t == 1 && k % 2 == 1);
      } catch (const c10::Error&) {
        EXPECT_TRUE(t == 1 && k % 2 == 1);
      } catch (const std::exception&) {
        EXPECT_TRUE(t == 1 && k % 2 == 1);
      }
    }
  });
}

TEST_F(Threads, BackwardRunsOnTheCallersThread) {
  std::thread::id backward;
  auto x = torch::ones({2}).to(torch::kLazy).requires_grad_();
  const auto y = x * 2;
  y.register_hook([&](const torch::Tensor&) { backward = std::this_thread::get_id(); });
  y.sum().backward();
  EXPECT_EQ(backward, std::this_thread::get_id());
}

TEST_F(Threads, HogwildTrainsOneModelFromMany) {
  for (const bool compile : {false, true}) {
    begin_test(compile);
    // Each pulls its own row towards a target through a shared parameter: whatever the
    // order of the updates, all rows get there.
    constexpr int kThreads = 4, kSteps = 80;
    auto weight = torch::zeros({kThreads, 8}).to(torch::kLazy);
    const auto target = torch::linspace(-1, 1, 8);
    in_threads(kThreads, [&](int t) {
      auto row = weight.select(0, t).detach().requires_grad_();
      torch::optim::SGD optimizer({row}, 0.5);
      const auto goal = (target * (t + 1)).to(torch::kLazy);
      for (int k = 0; k < kSteps; ++k) {
        optimizer.zero_grad();
        (row - goal).square().sum().mul(0.5).backward();
        optimizer.step();
        if (k % 4 == 3) mark_step();
        if (k == kSteps / 2) wait_for_compiles();
      }
    });
    const auto result = weight.cpu();
    for (int t = 0; t < kThreads; ++t) {
      EXPECT_TRUE(torch::allclose(result[t], target * (t + 1), 1e-4, 1e-4)) << t << result;
    }
  }
}

TEST_F(Threads, ALoadersThreadMakesTheBatches) {
  const auto sum_of_losses = [](torch::Device device, bool threaded) {
    torch::manual_seed(4);
    const auto data = torch::randn({24, 5});
    torch::nn::Linear model(5, 1);
    model->to(device);
    torch::optim::SGD optimizer(model->parameters(), 0.05);
    double sum = 0;
    const auto step = [&](const torch::Tensor& batch) {
      optimizer.zero_grad();
      const auto loss = model->forward(batch).square().mean();
      loss.backward();
      optimizer.step();
      sum += loss.item<float>();
    };
    for (int k = 0; k < 12; ++k) {
      const auto make = [&] { return data.slice(0, k * 2, k * 2 + 2).to(device) * 2; };
      torch::Tensor batch;
      if (threaded) {
        std::thread([&] { batch = make(); }).join();
      } else {
        batch = make();
      }
      step(batch);
    }
    return sum;
  };
  EXPECT_EQ(sum_of_losses(torch::kLazy, true), sum_of_losses(eager_device(), false));
}

TEST_F(Threads, TwoThatReadEachOthersPendingTensorsDoNotWaitForEver) {
  for (int round = 0; round < 20; ++round) {
    std::vector<torch::Tensor> mine(2);
    std::atomic<int> ready{0};
    in_threads(2, [&](int t) {
      const auto x = torch::full({4}, t + 1.0f).to(torch::kLazy);
      for (int k = 0; k < 3; ++k) {
        mine[static_cast<size_t>(t)] = x * 2 + k;  // pending from the second time on
        mark_step();
      }
      mine[static_cast<size_t>(t)] = x * 2 + 0;
      ++ready;
      while (ready < 2) std::this_thread::yield();
      const auto other = mine[static_cast<size_t>(1 - t)] + mine[static_cast<size_t>(t)];
      EXPECT_EQ(other.sum().item<float>(), 24.0f);
    });
  }
}

}  // namespace
}  // namespace reprise::test
