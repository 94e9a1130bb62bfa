// C++ control flow needs no guards: another path is another op sequence. Each
// program here takes its paths often enough that all of them are recorded,
// verified and (once more, with compilation) replayed.
#include <stdexcept>

#include "reprise/reprise.h"
#include "tests/three_ways.h"

namespace reprise::test {
namespace {

using ControlFlow = Lazy;

/// Runs `steps` steps on eager and on lazy, which must agree in each: to the last
/// bit while interpreted, closely with programs. `mark`: a marked step each.
Statistics expect_eager(const Program& program, int steps, bool compile, bool mark = true) {
  begin_test(compile);
  torch::manual_seed(5);
  const Step eager = program(eager_device());
  std::vector<Tensors> expected;
  for (int k = 0; k < steps; ++k) {
    torch::manual_seed(100 + k);
    expected.emplace_back();
    for (const auto& tensor : eager(k)) expected.back().push_back(tensor.detach().clone());
  }
  torch::manual_seed(5);
  const Step lazy = program(torch::kLazy);
  const Statistics before = statistics();
  for (int k = 0; k < steps; ++k) {
    SCOPED_TRACE(k);
    torch::manual_seed(100 + k);
    const Tensors actual = lazy(k);
    if (mark) mark_step();
    for (size_t o = 0; o < actual.size(); ++o) {
      SCOPED_TRACE(o);
      if (compile) {
        expect_close(actual[o], expected[static_cast<size_t>(k)][o], 10);
      } else {
        expect_same_bits(actual[o], expected[static_cast<size_t>(k)][o]);
      }
    }
    if (compile && k == steps / 2) wait_for_compiles();
  }
  const Statistics did = since(before);
  EXPECT_GT(did.ops_verified, 0u) << explain();
  if (compile) {
    EXPECT_GT(did.segments_replayed, 0u) << explain();
  }
  return did;
}

void expect_eager_in_both(const Program& program, int steps) {
  expect_eager(program, steps, /*compile=*/false);
  expect_eager(program, steps, /*compile=*/true);
}

TEST_F(ControlFlow, ABranchTakenNowAndThen) {
  expect_eager_in_both(
      [](torch::Device device) -> Step {
        auto x = random(device, {4});
        return [=](int k) mutable -> Tensors {
          auto y = x * 2 + 1;
          if (k % 3 == 1) {
            y = y.relu() - 1;
          } else if (k % 3 == 2) {
            y = y.tanh().mul_(x);
          }
          x.add_(y, 0.1);
          return {y.sum(), x};
        };
      },
      24);
}

TEST_F(ControlFlow, AHostReadInTheMiddleDecides) {
  expect_eager_in_both(
      [](torch::Device device) -> Step {
        auto x = random(device, {4});
        return [=](int) mutable -> Tensors {
          x = x * 1.5;
          if (x.abs().max().item<float>() > 3) x = x / 4;
          return {x + 1};
        };
      },
      24);
}

TEST_F(ControlFlow, AWhileLoopOnAValue) {
  expect_eager_in_both(
      [](torch::Device device) -> Step {
        const auto start = random(device, {3}).abs() + 1;
        return [=](int k) -> Tensors {
          auto x = start * (k % 4 + 1);
          while (x.sum().item<float>() > 1) x = x * 0.5;
          return {x};
        };
      },
      16);
}

TEST_F(ControlFlow, LoopsOfChangingLength) {
  expect_eager_in_both(
      [](torch::Device device) -> Step {
        const auto w = random(device, {3, 3});
        return [=](int k) -> Tensors {
          auto x = torch::ones({1, 3}, w.options());
          for (int t = 0; t < 1 + k % 4; ++t) x = torch::tanh(torch::mm(x, w));
          return {x};
        };
      },
      20);
}

TEST_F(ControlFlow, EarlyExits) {
  expect_eager_in_both(
      [](torch::Device device) -> Step {
        auto x = random(device, {4});
        return [=](int k) mutable -> Tensors {
          x.add_(1);
          if (k % 5 == 4) return {x};
          const auto y = x * 2;
          if (k % 2 == 0) return {y, x};
          x.mul_(0.5);
          return {y + x, x};
        };
      },
      30);
}

TEST_F(ControlFlow, AnExceptionOfTheUsersInTheMiddleOfAStep) {
  expect_eager_in_both(
      [](torch::Device device) -> Step {
        auto x = random(device, {4}).requires_grad_();
        auto sum = torch::zeros({4}, device);
        return [=](int k) mutable -> Tensors {
          try {
            const auto y = (x * 3).exp();
            sum.add_(y.detach());
            if (k % 3 == 2) throw std::runtime_error("the user's own");
            y.sum().backward();
          } catch (const std::runtime_error&) {
            sum.mul_(0.5);
          }
          const auto gradient = x.grad().defined() ? x.grad().clone() : torch::zeros_like(sum);
          x.mutable_grad() = torch::Tensor();
          return {sum, gradient};
        };
      },
      18);
}

TEST_F(ControlFlow, TwoModelsTakeTurns) {
  expect_eager_in_both(
      [](torch::Device device) -> Step {
        torch::nn::Linear first(4, 4), second(4, 4);
        first->to(device);
        second->to(device);
        const auto x = random(device, {2, 4});
        return [=](int k) mutable -> Tensors {
          auto& model = k % 2 == 0 ? first : second;
          const auto y = model->forward(x).square().mean();
          const auto gradient = torch::autograd::grad({y}, {model->weight})[0];
          torch::NoGradGuard no_grad;
          model->weight.sub_(gradient, 0.1);
          return {y, model->weight};
        };
      },
      16);
}

TEST_F(ControlFlow, TrainingAndEvaluationMixed) {
  expect_eager_in_both(
      [](torch::Device device) -> Step {
        torch::nn::Sequential model(torch::nn::Linear(4, 8), torch::nn::BatchNorm1d(8),
                                    torch::nn::Dropout(0.5), torch::nn::Linear(8, 1));
        model->to(device);
        auto optimizer =
            std::make_shared<torch::optim::SGD>(model->parameters(), torch::optim::SGDOptions(0.1));
        const auto x = random(device, {6, 4});
        return [=](int k) mutable -> Tensors {
          if (k % 4 == 3) {
            torch::NoGradGuard no_grad;
            model->eval();
            return {model->forward(x)};
          }
          model->train();
          optimizer->zero_grad();
          const auto loss = model->forward(x).square().mean();
          loss.backward();
          optimizer->step();
          return joined({loss}, state_of(*model));
        };
      },
      20);
}

TEST_F(ControlFlow, AnotherLastBatch) {
  expect_eager_in_both(
      [](torch::Device device) -> Step {
        const auto w = random(device, {4, 2});
        auto total = torch::zeros({2}, device);
        return [=](int k) mutable -> Tensors {
          const auto x = random(device, {k % 5 == 4 ? 3 : 8, 4});
          const auto y = torch::mm(x, w);
          total.add_(y.sum(0));
          return {y, total};
        };
      },
      20);
}

TEST_F(ControlFlow, TheSameOpsOnOtherTensors) {
  // Which storages stand where is part of the trace.
  expect_eager_in_both(
      [](torch::Device device) -> Step {
        const auto a = random(device, {3}), b = random(device, {3});
        return [=](int k) -> Tensors {
          const auto& p = k % 2 == 0 ? a : b;
          const auto& q = k % 3 == 0 ? a : b;
          const auto y = p * 2 + q;
          (k % 4 == 0 ? p : q).mul_(0.9);
          return {y, a, b};
        };
      },
      30);
}

TEST_F(ControlFlow, AMismatchAfterAWriteDoesNotWriteTwice) {
  expect_eager_in_both(
      [](torch::Device device) -> Step {
        const auto x = torch::zeros({2}, device);
        return [=](int k) -> Tensors {
          x.add_(1);
          const auto y = x * 3;
          x.add_(y);
          const auto z = k % 4 == 3 ? x.exp() : x.sqrt();
          x.mul_(0.125);
          return {z, x};
        };
      },
      24);
}

TEST_F(ControlFlow, IntegersThatChangeAreRightIfSlow) {
  expect_eager(
      [](torch::Device device) -> Step {
        const auto x = random(device, {8, 3});
        return [=](int k) -> Tensors {
          return {x.slice(0, k % 6, k % 6 + 2) * (k % 3), x.select(0, k % 8)};
        };
      },
      30, /*compile=*/false);
}

TEST_F(ControlFlow, TheDefaultDtypeIsPartOfTheTrace) {
  for (int k = 0; k < 6; ++k) {
    const auto dtype = k % 2 == 0 ? torch::kFloat : torch::kDouble;
    torch::set_default_dtype(c10::scalarTypeToTypeMeta(dtype));
    const auto x = torch::ones({2}, torch::TensorOptions(torch::kLazy)) * 2;
    const auto y = torch::arange(3, torch::TensorOptions(torch::kLazy)) * 0.5;
    mark_step();
    EXPECT_EQ(x.scalar_type(), dtype) << k;
    EXPECT_EQ(y.scalar_type(), dtype) << k;
    EXPECT_EQ(x.sum().item<double>(), 4.0);
    mark_step();
  }
  torch::set_default_dtype(c10::scalarTypeToTypeMeta(torch::kFloat));
}

TEST_F(ControlFlow, MatmulPrecisionMayBeSetForOneBackend) {
  struct Setting {
    explicit Setting(at::Float32Precision precision) {
      at::globalContext().setFloat32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL, precision);
    }
  };
  struct Reset {
    ~Reset() { Setting{at::Float32Precision::NONE}; }
  } reset;
  expect_eager(
      [](torch::Device device) -> Step {
        const auto x = random(device, {8, 8});
        return [=](int k) -> Tensors {
          Setting{k % 4 == 3 ? at::Float32Precision::NONE : at::Float32Precision::BF16};
          return {x.mm(x).relu() + 1};
        };
      },
      24, /*compile=*/true);
}

TEST_F(ControlFlow, ManyReadsInOneStep) {
  expect_eager_in_both(
      [](torch::Device device) -> Step {
        auto x = random(device, {4});
        return [=](int) mutable -> Tensors {
          double sum = 0;
          for (int t = 0; t < 4; ++t) {
            x.mul_(0.9).add_(0.1);
            sum += x.sum().item<double>();
          }
          return {x, torch::full({}, sum)};
        };
      },
      12);
}

TEST_F(ControlFlow, AnErrorCaughtInEveryStepDoesNotEndItsRepeating) {
  for (const bool compile : {false, true}) {
    begin_test(compile);
    const auto x = random(torch::kLazy, {3, 4});
    const auto expected = torch::relu(x.cpu() * 2 + 1).sum().item<float>();
    Statistics settled;
    for (int k = 0; k < 10; ++k) {
      auto y = x * 2;
      EXPECT_THROW(torch::mm(y, y), c10::Error);
      y = torch::relu(y + 1);
      EXPECT_THROW(torch::mm(y, y), c10::Error);
      EXPECT_FLOAT_EQ(y.sum().item<float>(), expected);
      mark_step();
      if (k == 3) wait_for_compiles();
      if (k == 4) settled = statistics();
    }
    const Statistics did = since(settled);
    EXPECT_EQ(did.ops_recorded, 0u) << explain();
    EXPECT_GT(did.ops_verified, 0u);
    if (compile) {
      EXPECT_GE(did.segments_replayed, 5u) << explain();
    }
  }
}

TEST_F(ControlFlow, SegmentsThatDidNotRunForLongestAreForgotten) {
  options().trace_bytes = 1 << 18;
  const auto often = random(torch::kLazy, {5});
  const auto expected = torch::tanh(often.cpu() * 2).sum().item<float>();
  const Statistics before = statistics();
  constexpr int kShapes = 400;
  for (int size = 1; size <= kShapes; ++size) {
    const auto once = torch::ones({size}, torch::kLazy);
    EXPECT_EQ((once * 3 - 1).sum().item<float>(), 2.0f * static_cast<float>(size));
    mark_step();
    EXPECT_EQ(torch::tanh(often * 2).sum().item<float>(), expected);
    mark_step();
  }
  const Statistics did = since(before);
  EXPECT_GT(did.segments_forgotten, 50u) << explain();
  EXPECT_LT(did.segments_forgotten, static_cast<uint64_t>(kShapes));
  // The one that runs often was recorded once.
  EXPECT_EQ(did.ops_recorded, 4u * kShapes + 3u);
}

TEST_F(ControlFlow, ProgramsThatDidNotRunForLongestAreForgotten) {
  begin_test(/*compile=*/true);
  options().most_programs = 2;
  const auto x = random(torch::kLazy, {6}), host = x.cpu();
  const auto step = [](torch::Tensor y, int n) {
    for (int k = 0; k < n; ++k) y = torch::sigmoid(y);
    return y.sum().item<float>();
  };
  for (int k = 0; k < 3; ++k) {
    for (const int n : {1, 2, 3}) step(x, n);
    wait_for_compiles();
  }
  const Statistics before = statistics();
  options().compile = false;  // what comes is only recorded
  for (int size = 1; size <= 70; ++size) {
    (void)torch::ones({size}, torch::kLazy).sum().item<float>();
  }
  EXPECT_GE(since(before).segments_forgotten, 1u) << explain();
  for (const int n : {1, 2, 3}) EXPECT_FLOAT_EQ(step(x, n), step(host, n));
}

}  // namespace
}  // namespace reprise::test
