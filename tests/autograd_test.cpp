// Gradients: libtorch's own engine, whose ops end in the same step.
#include <thread>

#include "reprise/reprise.h"
#include "tests/three_ways.h"

namespace reprise::test {
namespace {

using Autograd = Lazy;

TEST_F(Autograd, LeavesGetTheirGradients) {
  expect_eager_three_ways({random(torch::kCPU, {4, 3}), random(torch::kCPU, {3, 2})},
                          [](Tensors& in) -> Tensors {
                            for (auto& tensor : in) tensor.requires_grad_();
                            const auto y = torch::tanh(torch::mm(in[0], in[1])).pow(2).sum();
                            y.backward();
                            return {y, in[0].grad(), in[1].grad()};
                          });
}

TEST_F(Autograd, GradientsAccumulateOverBackwards) {
  expect_eager_three_ways([](torch::Device device) -> Step {
    auto w = random(device, {3}).requires_grad_();
    const auto x = random(device, {3});
    return [=](int) mutable -> Tensors {
      w.mutable_grad() = torch::Tensor();
      (w * x).sum().backward();
      (w * w * x).sum().backward();
      return {w.grad()};
    };
  });
}

TEST_F(Autograd, GradientsAccumulateOverSteps) {
  expect_eager_three_ways(
      [](torch::Device device) -> Step {
        auto w = random(device, {3}).requires_grad_();
        return [=](int k) mutable -> Tensors {
          (w * w).sum().backward();
          const auto sum = w.grad().clone();
          if (k % 4 == 3) w.mutable_grad().zero_();
          return {sum};
        };
      },
      {.repeats_at = 2, .compiled = false});
}

TEST_F(Autograd, SecondOrderGradients) {
  expect_eager_three_ways({random(torch::kCPU, {5})}, [](Tensors& in) -> Tensors {
    in[0].requires_grad_();
    const auto y = (in[0].sin() * in[0].exp()).sum();
    const auto first = torch::autograd::grad({y}, {in[0]}, {}, true, /*create_graph=*/true)[0];
    const auto second = torch::autograd::grad({first.sum()}, {in[0]})[0];
    return {first, second};
  });
}

struct Cube : torch::autograd::Function<Cube> {
  static torch::Tensor forward(torch::autograd::AutogradContext* context, torch::Tensor x,
                               double scale) {
    context->save_for_backward({x});
    context->saved_data["scale"] = scale;
    return x * x * x * scale;
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* context,
                                               torch::autograd::tensor_list gradient) {
    const auto x = context->get_saved_variables()[0];
    return {gradient[0] * 3 * x * x * context->saved_data["scale"].toDouble(), {}};
  }
};

TEST_F(Autograd, CustomFunctionsAreCaptured) {
  expect_eager_three_ways({random(torch::kCPU, {4})}, [](Tensors& in) -> Tensors {
    in[0].requires_grad_();
    const auto y = Cube::apply(in[0], 2.0);
    y.sum().backward();
    return {y, in[0].grad()};
  });
}

TEST_F(Autograd, HooksSeeAndChangeGradients) {
  expect_eager_three_ways({random(torch::kCPU, {4})}, [](Tensors& in) -> Tensors {
    in[0].requires_grad_();
    torch::Tensor seen;
    const auto y = in[0] * 2;
    y.register_hook([&](const torch::Tensor& gradient) {
      seen = gradient.clone();
      return gradient * 10;
    });
    y.retain_grad();
    (y * y).sum().backward();
    return {seen, y.grad(), in[0].grad()};
  });
}

TEST_F(Autograd, NoGradAndDetachCutTheGraph) {
  expect_eager_three_ways({random(torch::kCPU, {4})}, [](Tensors& in) -> Tensors {
    in[0].requires_grad_();
    torch::Tensor frozen;
    {
      torch::NoGradGuard no_grad;
      frozen = in[0] * 3;
    }
    EXPECT_FALSE(frozen.requires_grad());
    const auto y = (in[0] * frozen + in[0].detach()).sum();
    EXPECT_TRUE(y.requires_grad());
    y.backward();
    return {in[0].grad(), frozen};
  });
}

TEST_F(Autograd, LeavesAreUpdatedUnderNoGrad) {
  expect_eager_three_ways([](torch::Device device) -> Step {
    auto w = random(device, {3, 3}).requires_grad_();
    const auto x = random(device, {5, 3});
    return [=](int) mutable -> Tensors {
      const auto loss = torch::mm(x, w).square().mean();
      const auto gradient = torch::autograd::grad({loss}, {w})[0];
      torch::NoGradGuard no_grad;
      w.sub_(gradient, 0.1);
      return {loss, w};
    };
  });
}

TEST_F(Autograd, TheSameGraphTwiceWhenRetained) {
  expect_eager_three_ways({random(torch::kCPU, {4})}, [](Tensors& in) -> Tensors {
    in[0].requires_grad_();
    const auto y = in[0].exp().sum();
    y.backward({}, /*keep_graph=*/true);
    y.backward();
    return {in[0].grad()};
  });
}

TEST_F(Autograd, InPlaceOpsOnViewsKeepTheGraphRight) {
  expect_eager_three_ways({random(torch::kCPU, {4, 4})}, [](Tensors& in) -> Tensors {
    in[0].requires_grad_();
    const auto y = in[0] * 1;
    y.select(0, 1).mul_(3);
    y.slice(1, 2, 4).exp_();
    y.sum().backward();
    return {y, in[0].grad()};
  });
}

TEST_F(Autograd, AWriteThatBreaksTheGraphIsAnErrorInEveryWay) {
  for (int way = 0; way < 3; ++way) {
    auto x = torch::ones({3}).to(torch::kLazy).requires_grad_();
    const auto y = x.exp();
    y.add_(1);
    EXPECT_THROW(y.sum().backward(), c10::Error);
    mark_step();
  }
}

TEST_F(Autograd, AnInPlaceOpOnALeafIsAnErrorInEveryWay) {
  const auto x = torch::ones({3}).to(torch::kLazy).requires_grad_();
  for (int way = 0; way < 2; ++way) {
    EXPECT_THROW(x.add_(1), c10::Error);
    EXPECT_EQ((x * 2).sum().item<float>(), 6.0f);
    mark_step();
  }
}

TEST_F(Autograd, InferenceModeRunsInAllWays) {
  expect_eager_three_ways([](torch::Device device) -> Step {
    torch::nn::Linear model(4, 3);
    model->to(device);
    const auto x = random(device, {2, 4});
    return [=](int) mutable -> Tensors {
      c10::InferenceMode inference;
      auto y = torch::relu(model->forward(x));
      EXPECT_TRUE(y.is_inference());
      y.mul_(2);
      return {y, y[0], y.t() + 1};
    };
  });
}

TEST_F(Autograd, InferenceModeAndTrainingShareNoTensorsByMistake) {
  // The same ops, once under inference mode and once with gradients.
  torch::nn::Linear model(4, 3);
  model->to(torch::kLazy);
  const auto x = random(torch::kLazy, {2, 4});
  for (int k = 0; k < 4; ++k) {
    {
      c10::InferenceMode inference;
      const auto y = model->forward(x);
      EXPECT_TRUE(y.is_inference());
      mark_step();
    }
    const auto y = model->forward(x);
    EXPECT_FALSE(y.is_inference());
    EXPECT_TRUE(y.requires_grad());
    y.sum().backward();
    EXPECT_TRUE(model->weight.grad().defined());
    mark_step();
  }
}

TEST_F(Autograd, AModulesParametersGetTheirGradients) {
  expect_eager_three_ways(
      [](torch::Device device) -> Step {
        torch::nn::Sequential model(torch::nn::Linear(6, 8), torch::nn::ReLU(),
                                    torch::nn::Linear(8, 1));
        model->to(device);
        const auto x = random(device, {7, 6});
        return [=](int) mutable -> Tensors {
          model->zero_grad();  // detaches the gradients that there are
          const auto loss = model->forward(x).square().mean();
          loss.backward();
          return joined({loss}, gradients_of(*model));
        };
      },
      {.repeats_at = 2});
}

TEST_F(Autograd, GradModeIsNotPartOfTheTrace) {
  // Ops below autograd are the same; the results must not be.
  const auto w = torch::ones({2}).to(torch::kLazy).requires_grad_();
  for (int k = 0; k < 4; ++k) {
    const bool grad = k % 2 == 1;
    torch::AutoGradMode mode(grad);
    const auto y = w * 2 + 1;
    EXPECT_EQ(y.requires_grad(), grad);
    EXPECT_EQ(y.sum().item<float>(), 6.0f);
    mark_step();
  }
}

TEST_F(Autograd, ManyLeavesInOneGraph) {
  expect_eager_three_ways([](torch::Device device) -> Step {
    Tensors leaves;
    for (int k = 0; k < 10; ++k) leaves.push_back(random(device, {2, 2}).requires_grad_());
    return [=](int) mutable -> Tensors {
      auto y = torch::eye(2, leaves[0].options().requires_grad(false));
      for (const auto& leaf : leaves) y = torch::mm(y, leaf) * 0.5;
      return torch::autograd::grad({y.sum()}, leaves);
    };
  });
}

TEST_F(Autograd, WritesByListsAreCounted) {
  const auto versions = [](torch::Device device) {
    std::vector<uint32_t> seen;
    const auto x = random(device, {3}), y = random(device, {2}, torch::kDouble);
    for (int k = 0; k < 3; ++k) {
      x.add_(1);  // a segment's first op does not go the way of the others
      torch::_foreach_mul_({x, y}, 2);
      seen.push_back(x._version());
      seen.push_back(y._version());
      mark_step();
    }
    auto base = random(device, {4});
    const auto view = base.view({2, 2});
    torch::_foreach_add_({view}, 1);
    base.requires_grad_(true);
    seen.push_back(view.is_leaf());
    (void)view.mul(2);
    seen.push_back(view.is_leaf());
    return seen;
  };
  EXPECT_EQ(versions(torch::kLazy), versions(eager_device()));
}

}  // namespace
}  // namespace reprise::test
