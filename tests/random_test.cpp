// Random numbers: for the same seed those of eager, in each way.
#include "reprise/reprise.h"
#include "tests/three_ways.h"

namespace reprise::test {
namespace {

using Random = Lazy;

TEST_F(Random, FactoriesDrawEagersNumbers) {
  expect_eager_three_ways([](torch::Device device) -> Step {
    const auto on = torch::TensorOptions(device);
    return [=](int) -> Tensors {
      return {torch::rand({5}, on), torch::randn({17}, on), torch::randint(0, 100, {4}, on),
              torch::randperm(9, on), torch::rand_like(torch::zeros({3}, on)),
              torch::randn({2, 3}, on.dtype(torch::kDouble))};
    };
  });
}

TEST_F(Random, FillsDrawEagersNumbers) {
  expect_eager_three_ways({torch::zeros({4, 5})}, [](Tensors& in) -> Tensors {
    const auto like = [&] { return torch::empty_like(in[0]); };
    in[0].normal_();
    in[0].slice(0, 1, 3).uniform_(2, 3);
    return {like().exponential_(2), like().bernoulli_(0.3), like().geometric_(0.5),
            like().cauchy_(),       like().log_normal_(),   like().random_(0, 7),
            in[0] * like().uniform_()};
  });
}

TEST_F(Random, FillsOfWhatLiesApartDrawEagersNumbers) {
  expect_eager_three_ways({torch::zeros({3, 4}), torch::zeros({4, 6})}, [](Tensors& in) -> Tensors {
    in[0].select(1, 1).uniform_(-1, 1);
    in[1].slice(0, 1, 4, 2).slice(1, 0, 6, 3).normal_();
    return {in[0] + 1};
  });
}

TEST_F(Random, DropoutDrawsEagersMask) {
  expect_eager_three_ways([](torch::Device device) -> Step {
    torch::nn::Sequential model(torch::nn::Linear(6, 32), torch::nn::Dropout(0.3),
                                torch::nn::ReLU(), torch::nn::Dropout(0.5),
                                torch::nn::Linear(32, 2));
    model->to(device);
    const auto x = random(device, {4, 6});
    return [=](int) mutable -> Tensors {
      const auto y = model->forward(x);
      return joined({y}, torch::autograd::grad({y.sum()}, model->parameters()));
    };
  });
}

TEST_F(Random, OtherDropoutsDrawEagersMask) {
  expect_eager_three_ways({random(torch::kCPU, {2, 6, 4})}, [](Tensors& in) -> Tensors {
    return {torch::feature_dropout(in[0], 0.5, true), torch::alpha_dropout(in[0], 0.2, true),
            torch::dropout(in[0], 0.5, false), torch::dropout(in[0], 1.0, true),
            torch::dropout_(in[0], 0.5, true)};
  });
}

TEST_F(Random, NumbersThatDependOnValuesAreEagers) {
  expect_eager_three_ways(
      {random(torch::kCPU, {4, 5}).abs()},
      [](Tensors& in) -> Tensors {
        const auto p = torch::sigmoid(in[0]);
        return {torch::bernoulli(p), torch::multinomial(p, 2), torch::poisson(in[0] * 3),
                at::normal(in[0], p)};
      },
      {.compiled = false});
}

TEST_F(Random, AStepDrawsNewNumbersEachTime) {
  for (const bool compile : {false, true}) {
    begin_test(compile);
    torch::Tensor last;
    for (int k = 0; k < 6; ++k) {
      const auto x = torch::rand({8}, torch::kLazy) * 2;
      mark_step();
      wait_for_compiles();
      const auto host = x.cpu();
      if (last.defined()) {
        EXPECT_FALSE(torch::equal(host, last));
      }
      last = host;
    }
  }
}

TEST_F(Random, TheOrderOfDrawsOnTwoDevicesIsTheOrderOfTheProgram) {
  // The host draws from the same generator between the draws of the step.
  if (!eager_device().is_cpu()) GTEST_SKIP() << "the host has a generator of its own";
  const auto run = [](torch::Device device) {
    torch::manual_seed(11);
    Tensors out;
    for (int k = 0; k < 4; ++k) {
      const auto a = torch::rand({3}, device) + 1;
      const auto host = torch::rand({2});
      const auto b = torch::rand({3}, device) + 2;
      if (device.is_lazy()) mark_step();
      out.insert(out.end(), {a, host, b});
    }
    return out;
  };
  const Tensors eager = run(torch::kCPU), lazy = run(torch::kLazy);
  for (size_t k = 0; k < eager.size(); ++k) {
    SCOPED_TRACE(k);
    expect_same_bits(lazy[k], eager[k]);
  }
}

TEST_F(Random, ASeedInTheMiddleOfAStepIsObeyed) {
  const auto run = [](torch::Device device) {
    Tensors out;
    for (int k = 0; k < 4; ++k) {
      torch::manual_seed(1);
      const auto a = torch::rand({3}, device) + 1;
      torch::manual_seed(2);
      const auto b = torch::rand({3}, device) + 2;
      if (device.is_lazy()) mark_step();
      out.insert(out.end(), {a, b});
    }
    return out;
  };
  const Tensors eager = run(eager_device()), lazy = run(torch::kLazy);
  for (size_t k = 0; k < eager.size(); ++k) {
    SCOPED_TRACE(k);
    expect_same_bits(lazy[k], eager[k]);
  }
}

TEST_F(Random, AGeneratorOfTheUsersIsUsed) {
  if (!eager_device().is_cpu()) GTEST_SKIP() << "a CPU generator is used";
  const auto run = [](torch::Device device) {
    auto generator = at::detail::createCPUGenerator(5);
    Tensors out;
    for (int k = 0; k < 3; ++k) {
      auto x = torch::empty({4}, device);
      x.normal_(0, 1, generator);
      out.push_back(x * 2);
      out.push_back(torch::rand({3}, generator, device));
      if (device.is_lazy()) mark_step();
    }
    return out;
  };
  const Tensors eager = run(torch::kCPU), lazy = run(torch::kLazy);
  for (size_t k = 0; k < eager.size(); ++k) {
    SCOPED_TRACE(k);
    expect_same_bits(lazy[k], eager[k]);
  }
}

TEST_F(Random, ACompileDrawsNoNumbersOfTheProgram) {
  begin_test(/*compile=*/true);
  const auto run = [](torch::Device device) {
    torch::manual_seed(3);
    auto x = torch::zeros({7}, device);
    for (int k = 0; k < 5; ++k) {
      x = torch::cos(x + torch::rand({7}, device)) * 1.25;
      if (device.is_lazy()) {
        mark_step();
        wait_for_compiles();
      }
    }
    return x;
  };
  const auto lazy = run(torch::kLazy);
  expect_close(lazy, run(eager_device()));
}

}  // namespace
}  // namespace reprise::test
