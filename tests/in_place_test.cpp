// Ops that write to a tensor that is there already.
#include "reprise/reprise.h"
#include "tests/three_ways.h"

namespace reprise::test {
namespace {

using InPlaceOps = Lazy;

TEST_F(InPlaceOps, WriteToInputsAndToIntermediates) {
  expect_eager_three_ways({random(torch::kCPU, {4, 4}), random(torch::kCPU, {4})},
                          [](Tensors& in) -> Tensors {
                            in[0].mul_(2).add_(in[1]);
                            auto y = in[0] + 1;
                            y.relu_();
                            y.sub_(in[0], 0.5);
                            in[1].copy_(y.sum(0));
                            return {y, in[0]};
                          });
}

TEST_F(InPlaceOps, StateIsCarriedFromStepToStep) {
  expect_eager_three_ways([](torch::Device device) -> Step {
    auto counter = torch::zeros({3}, device);
    auto total = random(device, {3});
    return [=](int) mutable -> Tensors {
      counter.add_(1);
      total.mul_(0.9).add_(counter);
      return {counter, total, total / counter};
    };
  });
}

TEST_F(InPlaceOps, AReadBeforeAWriteSeesTheOldValue) {
  expect_eager_three_ways({random(torch::kCPU, {5})}, [](Tensors& in) -> Tensors {
    const auto before = in[0] * 3;
    in[0].zero_();
    const auto after = in[0] + 1;
    in[0].fill_(7);
    return {before, after};
  });
}

TEST_F(InPlaceOps, ReturnTheSameTensor) {
  for (int way = 0; way < 2; ++way) {
    auto x = torch::ones({2}).to(torch::kLazy);
    auto& y = x.add_(1);
    EXPECT_TRUE(y.is_same(x));
    const auto z = torch::add_out(x, y, y);
    EXPECT_TRUE(z.is_same(x));
    EXPECT_EQ(x.sum().item<float>(), 8.0f);
    mark_step();
  }
}

TEST_F(InPlaceOps, BumpTheVersionCounterInEveryWay) {
  const auto x = torch::ones({2}).to(torch::kLazy);
  for (int way = 0; way < 3; ++way) {
    const auto before = x._version();
    x.add_(1);
    EXPECT_EQ(x._version(), before + 1);
    mark_step();
  }
}

TEST_F(InPlaceOps, OutOpsWriteWithoutResize) {
  expect_eager_three_ways({random(torch::kCPU, {3, 3}), torch::zeros({3, 3})},
                          [](Tensors& in) -> Tensors {
                            torch::mul_out(in[1], in[0], in[0]);
                            in[0].copy_(torch::mm(in[1], in[0]));
                            torch::mm_out(in[1], in[0], in[0]);
                            auto sum = torch::empty({3}, in[0].options());
                            torch::sum_out(sum, in[1], 0);
                            return {sum};
                          });
}

TEST_F(InPlaceOps, OutOpsResizeAnEmptyTensor) {
  for (int way = 0; way < 3; ++way) {
    const auto x = torch::arange(6, torch::kLazy).to(torch::kFloat).view({2, 3});
    auto out = torch::empty({0}, x.options());
    torch::mul_out(out, x, x);
    EXPECT_EQ(out.sizes(), x.sizes());
    out.add_(1);
    expect_same_bits(out, torch::arange(6).to(torch::kFloat).square().view({2, 3}) + 1);
    mark_step();
  }
}

TEST_F(InPlaceOps, IndexWritesReachTheirRows) {
  expect_eager_three_ways(
      {random(torch::kCPU, {5, 3}), torch::tensor({0, 2, 4}), random(torch::kCPU, {3, 3})},
      [](Tensors& in) -> Tensors {
        in[0].index_add_(0, in[1], in[2]);
        in[0].index_put_({in[1]}, in[2] * 2);
        in[0].index_fill_(1, torch::tensor({1}).to(in[0].device()), 9);
        in[0].scatter_(1, torch::zeros({5, 1}, in[1].options()), 3);
        in[0].masked_fill_(in[0] > 5, 0);
        return {};
      });
}

TEST_F(InPlaceOps, ForeachOpsWriteAllTheirTensors) {
  expect_eager_three_ways(
      {random(torch::kCPU, {3}), random(torch::kCPU, {2, 2}), random(torch::kCPU, {3}),
       random(torch::kCPU, {2, 2})},
      [](Tensors& in) -> Tensors {
        const Tensors first{in[0], in[1]}, second{in[2], in[3]};
        at::_foreach_mul_(first, 0.5);
        at::_foreach_add_(first, second, 2);
        at::_foreach_addcmul_(second, first, first);
        return joined(at::_foreach_sqrt(at::_foreach_abs(second)), at::_foreach_norm(first));
      });
}

TEST_F(InPlaceOps, AliasedInputsSeeEachOthersWrites) {
  expect_eager_three_ways([](torch::Device device) -> Step {
    const auto base = random(device, {8});
    const auto left = base.slice(0, 0, 5), right = base.slice(0, 3, 8);
    return [=](int) -> Tensors {
      left.mul_(0.5);
      right.add_(left.sum());
      left.sub_(right.clone());
      return {base, left + right};
    };
  });
}

TEST_F(InPlaceOps, TheSameTensorTwiceIsNotTwoTensors) {
  // A trace of f(a, b) must not serve f(a, a).
  const auto run = [](torch::Device device) {
    const auto a = torch::ones({2}).to(device), b = torch::full({2}, 3.0).to(device);
    Tensors out;
    for (const auto& [p, q] : {std::pair(a, b), std::pair(a, a), std::pair(a, b), std::pair(b, b),
                               std::pair(a, a)}) {
      p.add_(1);
      out.push_back((p * q).clone());
      mark_step();
    }
    return out;
  };
  const Tensors eager = run(eager_device()), lazy = run(torch::kLazy);
  for (size_t k = 0; k < eager.size(); ++k) expect_same_bits(lazy[k], eager[k]);
}

TEST_F(InPlaceOps, TypePromotionAndBroadcastAreEagers) {
  expect_eager_three_ways({random(torch::kCPU, {3, 1}), random(torch::kCPU, {4}, torch::kLong)},
                          [](Tensors& in) -> Tensors {
                            auto y = in[0] * in[1];
                            y.add_(in[1]);
                            y.div_(3);
                            in[1].mul_(2).add_(1);
                            return {y, in[1] / 2, in[1].floor_divide(2), y > 1, ~(y > 1)};
                          });
}

}  // namespace
}  // namespace reprise::test
