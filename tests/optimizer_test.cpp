// Optimizers, and the numbers of theirs that change from step to step.
#include "reprise/reprise.h"
#include "tests/three_ways.h"

namespace reprise::test {
namespace {

using Optimizers = Lazy;

/// A small model, trained; compares loss and parameters.
template <class Optimizer, class Options>
Program training(Options options) {
  return [=](torch::Device device) -> Step {
    torch::nn::Sequential model(torch::nn::Linear(6, 8), torch::nn::Tanh(),
                                torch::nn::Linear(8, 2));
    model->to(device);
    auto optimizer = std::make_shared<Optimizer>(model->parameters(), options);
    const auto x = random(device, {5, 6}), y = random(device, {5, 2});
    return [=](int) mutable -> Tensors {
      optimizer->zero_grad();
      const auto loss = torch::mse_loss(model->forward(x), y);
      loss.backward();
      optimizer->step();
      return joined({loss}, model->parameters());
    };
  };
}

TEST_F(Optimizers, SgdWithMomentum) {
  expect_eager_three_ways(training<torch::optim::SGD>(
                              torch::optim::SGDOptions(0.1).momentum(0.9).weight_decay(0.01)),
                          {.repeats_at = 2});
}

TEST_F(Optimizers, SgdWithoutMomentumRepeatsAtOnce) {
  expect_eager_three_ways(training<torch::optim::SGD>(torch::optim::SGDOptions(0.1)),
                          {.repeats_at = 1});
}

TEST_F(Optimizers, Adam) {
  expect_eager_three_ways(training<torch::optim::Adam>(torch::optim::AdamOptions(0.01)),
                          {.repeats_at = 2, .tolerance = 10});
}

TEST_F(Optimizers, AdamWithAmsgrad) {
  expect_eager_three_ways(
      training<torch::optim::Adam>(torch::optim::AdamOptions(0.01).amsgrad(true)),
      {.repeats_at = 2, .tolerance = 10});
}

TEST_F(Optimizers, AdamW) {
  expect_eager_three_ways(
      training<torch::optim::AdamW>(torch::optim::AdamWOptions(0.01).weight_decay(0.1)),
      {.repeats_at = 2, .tolerance = 10});
}

TEST_F(Optimizers, RmsProp) {
  expect_eager_three_ways(
      training<torch::optim::RMSprop>(torch::optim::RMSpropOptions(0.01).momentum(0.5)),
      {.repeats_at = 2, .tolerance = 10});
}

TEST_F(Optimizers, Adagrad) {
  // Its rate changes with the number of the step.
  expect_eager_three_ways(
      training<torch::optim::Adagrad>(torch::optim::AdagradOptions(0.05).lr_decay(0.1)),
      {.repeats_at = 1, .tolerance = 10});
}

TEST_F(Optimizers, LbfgsReadsItsLossesAndIsRight) {
  const auto run = [](torch::Device device) {
    torch::manual_seed(3);
    auto w = random(device, {4}).requires_grad_();
    torch::optim::LBFGS optimizer({w}, torch::optim::LBFGSOptions(0.5).max_iter(4));
    Tensors losses;
    for (int k = 0; k < 3; ++k) {
      losses.push_back(optimizer.step([&] {
        optimizer.zero_grad();
        const auto loss = (w * w).sum() + w.cos().sum();
        loss.backward();
        return loss;
      }));
    }
    losses.push_back(w);
    return losses;
  };
  const Tensors eager = run(eager_device()), lazy = run(torch::kLazy);
  for (size_t k = 0; k < eager.size(); ++k) expect_same_bits(lazy[k].detach(), eager[k].detach());
}

/// Bias corrections and a schedule: after the third step nothing is new.
template <class Optimizer, class Options>
void expect_few_programs(Options options, bool exact) {
  begin_test(/*compile=*/!exact);
  const auto run = [&](torch::Device device, const std::function<void(int)>& each) {
    torch::manual_seed(1);
    torch::nn::Linear model(4, 3);
    model->to(device);
    Optimizer optimizer(model->parameters(), options);
    const auto x = random(device, {5, 4});
    for (int k = 0; k < 14; ++k) {
      auto& group = optimizer.param_groups()[0].options();
      static_cast<Options&>(group).lr(0.01 / (1 + k));
      optimizer.zero_grad();
      model->forward(x).square().mean().backward();
      optimizer.step();
      each(k);
    }
    return state_of(*model);
  };
  const Tensors eager = run(eager_device(), [](int) {});
  Statistics settled;
  const Statistics before = statistics();
  const Tensors lazy = run(torch::kLazy, [&](int k) {
    mark_step();
    if (k == 4) wait_for_compiles();
    if (k == 5) settled = statistics();
  });
  const Statistics after_settling = since(settled);
  EXPECT_EQ(after_settling.ops_recorded, 0u) << explain();
  EXPECT_EQ(after_settling.mismatches, 0u);
  EXPECT_EQ(after_settling.programs_requested, 0u);
  EXPECT_LE(since(before).mismatches, 2u);
  if (!exact) {
    EXPECT_GE(since(before).programs_requested, 1u);
    EXPECT_LE(since(before).programs_requested, 3u);
    EXPECT_GE(after_settling.segments_replayed, 8u) << explain();
  }
  for (size_t k = 0; k < eager.size(); ++k) {
    if (exact) {
      expect_same_bits(lazy[k], eager[k]);
    } else {
      expect_close(lazy[k], eager[k], 10);
    }
  }
}

TEST_F(Optimizers, ALearningRateScheduleMakesNoNewPrograms) {
  for (const bool exact : {true, false}) {
    expect_few_programs<torch::optim::SGD>(torch::optim::SGDOptions(0.1).momentum(0.9), exact);
  }
}

TEST_F(Optimizers, BiasCorrectionsMakeNoNewPrograms) {
  for (const bool exact : {true, false}) {
    expect_few_programs<torch::optim::Adam>(torch::optim::AdamOptions(0.1), exact);
    expect_few_programs<torch::optim::AdamW>(torch::optim::AdamWOptions(0.1), exact);
  }
}

TEST_F(Optimizers, AScheduleByStepLRIsFollowed) {
  const auto run = [](torch::Device device) {
    torch::manual_seed(1);
    auto w = random(device, {4}).requires_grad_();
    torch::optim::SGD optimizer({w}, torch::optim::SGDOptions(1.0));
    torch::optim::StepLR schedule(optimizer, 2, 0.5);
    for (int k = 0; k < 9; ++k) {
      optimizer.zero_grad();
      w.sin().sum().backward();
      optimizer.step();
      schedule.step();
      if (device.is_lazy()) mark_step();
    }
    return w.detach();
  };
  expect_same_bits(run(torch::kLazy), run(eager_device()));
}

TEST_F(Optimizers, ClippedGradientsAreEagers) {
  expect_eager_three_ways(
      [](torch::Device device) -> Step {
        torch::nn::Linear model(4, 4);
        model->to(device);
        auto optimizer =
            std::make_shared<torch::optim::SGD>(model->parameters(), torch::optim::SGDOptions(0.1));
        const auto x = random(device, {5, 4});
        return [=](int) mutable -> Tensors {
          optimizer->zero_grad();
          model->forward(x).exp().sum().backward();
          torch::nn::utils::clip_grad_norm_(model->parameters(), 0.5);  // reads the norm
          optimizer->step();
          return state_of(*model);
        };
      },
      {.tolerance = 10});
}

TEST_F(Optimizers, AGradientScaleThatChangesIsAnInput) {
  // A float that user code computes anew in each step.
  const auto run = [](torch::Device device) {
    torch::manual_seed(1);
    const auto x = random(device, {4});
    auto y = torch::zeros_like(x);
    for (int k = 0; k < 8; ++k) {
      y.add_(x, 1.0 / (k + 1));
      y = torch::lerp(y, x * (0.5 + k), 0.25) / (k + 2.0);
      if (device.is_lazy()) mark_step();
    }
    return y;
  };
  expect_same_bits(run(torch::kLazy), run(eager_device()));
}

/// Flags and integers that change, given to ops that cast them to their tensor's dtype.
TEST_F(Optimizers, FlagsAndIntegersThatTensorsAreFilledWithAreInputs) {
  const auto run = [](torch::Device device, const std::function<void(int)>& each) {
    torch::manual_seed(1);
    const auto x = random(device, {4, 3});
    Tensors results;
    for (int k = 0; k < 12; ++k) {
      const bool flag = k % 3 == 1;
      const auto mask = torch::zeros({4, 3}, x.options().dtype(torch::kBool)).fill_(flag);
      mask[1].fill_(!flag);
      const auto counts = torch::full({3}, 5 + k, x.options().dtype(torch::kLong));
      const auto bytes = torch::zeros({3}, x.options().dtype(torch::kByte)).masked_fill_(counts > 7, k);
      const auto halves = (x + 0.5 * k).to(torch::kHalf).masked_fill(mask, flag);
      const auto rows = counts.index_fill(0, torch::zeros({1}, counts.options()), 3 * k);
      const auto spread = counts.scatter(0, torch::ones({1}, counts.options()), k - 9);
      results = {mask, counts, bytes, halves, rows, spread, torch::where(mask, x, -x)};
      each(k);
    }
    return results;
  };
  for (const bool compile : {false, true}) {
    SCOPED_TRACE(compile);
    begin_test(compile);
    const Tensors eager = run(eager_device(), [](int) {});
    Statistics settled;
    const Statistics before = statistics();
    const Tensors lazy = run(torch::kLazy, [&](int k) {
      mark_step();
      if (k == 5) wait_for_compiles();
      if (k == 6) settled = statistics();
    });
    EXPECT_EQ(since(settled).ops_recorded, 0u) << explain();
    EXPECT_EQ(since(settled).programs_requested, 0u) << explain();
    if (compile) {
      EXPECT_GE(since(settled).segments_replayed, 4u) << explain();
      EXPECT_LE(since(before).programs_requested, 3u) << explain();
    }
    for (size_t k = 0; k < eager.size(); ++k) expect_same_bits(lazy[k], eager[k]);
  }
}

}  // namespace
}  // namespace reprise::test
