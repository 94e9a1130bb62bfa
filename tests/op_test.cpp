// Kinds of ops that a trace, the interpreter or the compiler could get wrong.
#include "reprise/reprise.h"
#include "tests/three_ways.h"

namespace reprise::test {
namespace {

namespace F = torch::nn::functional;

using Arguments = Lazy;

TEST_F(Arguments, ADerivativeThatIsZeroWithoutAStorage) {
  expect_eager_three_ways([](torch::Device device) -> Step {
    const auto x = random(device, {5, 4}).requires_grad_();
    return [=](int) -> Tensors {
      const auto y = torch::sgn(x);
      const auto grad = torch::autograd::grad({y.sum()}, {x})[0];
      return {y, grad, grad + 1};
    };
  });
}

TEST_F(Arguments, ResizeAsATensorThatIsPending) {
  for (int k = 0; k < 3; ++k) {
    const auto pending = torch::ones({3, 4}).to(torch::kLazy) + 1;
    auto out = torch::empty({0}, torch::kLazy);
    out.resize_as_(pending);
    EXPECT_EQ(out.sizes(), pending.sizes());
    out.copy_(pending);
    EXPECT_EQ(out.sum().item<float>(), 24.0f);
    mark_step();
  }
}

TEST_F(Arguments, AnOpThatAlsoHasACompositeIsTheBackingDevicesOwn) {
  const Tensors inputs = {random(torch::kCPU, {64}), random(torch::kCPU, {64})};
  expect_eager_three_ways(inputs, [](Tensors& in) -> Tensors {
    return {at::silu_backward(in[0], in[1]), at::mish_backward(in[0], in[1])};
  });
}

TEST_F(Arguments, ATensorThatComesTwiceIsTheSameTensor) {
  for (int k = 0; k < 3; ++k) {
    auto x = torch::empty({0}, torch::kLazy);
    const auto y = torch::ones({3}).to(torch::kLazy);
    EXPECT_THROW(torch::cat_out(x, {x, y}), c10::Error);  // as eager does
    EXPECT_EQ((y + 1).sum().item<float>(), 6.0f);
    mark_step();
  }
}

TEST_F(Arguments, SeveralOutTensorsOfOneOp) {
  expect_eager_three_ways(
      [](torch::Device device) -> Step {
        const auto x = random(device, {6, 5});
        return [=](int) -> Tensors {
          auto values = torch::zeros({6, 5}, x.options());
          auto indices = torch::zeros({6, 5}, x.options().dtype(torch::kLong));
          at::sort_out(values, indices, x, 1);
          return {values, indices};
        };
      },
      {.compiled = false});
}

using DataDependentOps = Lazy;

TEST_F(DataDependentOps, ShapesThatDependOnValuesAreEagers) {
  for (int k = 0; k < 4; ++k) {
    const auto make = [&](torch::Device device) -> Tensors {
      torch::manual_seed(k);
      const auto x = random(device, {6, 3});
      const auto mask = x > 0.3;
      const auto [values, inverse, counts] =
          at::_unique2((x * 2).to(torch::kLong), true, true, true);
      const auto found = torch::nonzero(mask);
      return {found,
              found.select(1, 0) + 1,
              torch::masked_select(x, mask),
              x.index({mask}).sum(),
              values,
              inverse,
              counts,
              torch::bincount(found.select(1, 1)),
              x.repeat_interleave(torch::tensor({1, 0, 2}).to(device), 1)};
    };
    const Tensors eager = make(eager_device()), lazy = make(torch::kLazy);
    for (size_t o = 0; o < eager.size(); ++o) {
      SCOPED_TRACE(o);
      expect_same_bits(lazy[o], eager[o]);
    }
    mark_step();
  }
}

TEST_F(DataDependentOps, BooleanMasksWriteAndRead) {
  const auto run = [](torch::Device device) {
    auto x = torch::arange(6).to(torch::kFloat).to(device);
    Tensors out;
    for (int k = 0; k < 5; ++k) {
      x.index_put_({x > 3}, torch::full({1}, 0.5, x.options()));  // 0-dim ones: see README's limits
      x.masked_fill_(x == 0.5, 4 + k);
      out.push_back(torch::where(x > 4, x, -x));
      x.masked_scatter_(x < 1, torch::arange(6, x.options()));
      out.push_back(x.clone());
      if (device.is_lazy()) mark_step();
    }
    return out;
  };
  const Tensors eager = run(eager_device()), lazy = run(torch::kLazy);
  for (size_t o = 0; o < eager.size(); ++o) {
    SCOPED_TRACE(o);
    expect_same_bits(lazy[o], eager[o]);
  }
}

/// Where no index is a mask, the result's shape is known, and the call is a step.
TEST_F(DataDependentOps, PositionsAreTraced) {
  const auto x = torch::randn({5, 4, 3}), index = torch::tensor({4, 0, -2}), other = torch::tensor({{1}, {2}});
  expect_eager_three_ways({x, index, other}, [](Tensors& in) -> Tensors {
    using torch::indexing::Slice;
    const auto leaf = in[0].detach().requires_grad_();
    const auto y = leaf.index({in[1]}) * 2;
    const auto z = leaf.index({in[1], Slice(), in[2]}).tanh();
    const auto grad = torch::autograd::grad({y.sum() + z.square().sum()}, {leaf})[0];
    return {y.detach(), z.detach(), grad};
  }, {.tolerance = 10});
}

TEST_F(DataDependentOps, IndicesOnTheHostAreTaken) {
  for (int k = 0; k < 3; ++k) {
    const auto make = [](torch::Device device) -> Tensors {
      const auto x = torch::arange(12).to(device).view({4, 3}) * 2;
      const auto index = torch::tensor({3, 1});  // as CUDA allows
      auto y = x.clone();
      y.index_put_({index}, torch::zeros({3}, y.options()));
      return {x.index({index}), y, x.index({torch::tensor({true, false, true, true})})};
    };
    const Tensors eager = make(eager_device()), lazy = make(torch::kLazy);
    for (size_t o = 0; o < eager.size(); ++o) expect_same_bits(lazy[o], eager[o]);
    mark_step();
  }
}

TEST_F(DataDependentOps, StepsAroundThemAreVerified) {
  const auto x = random(torch::kLazy, {8});
  Statistics settled;
  for (int k = 0; k < 6; ++k) {
    if (k == 2) settled = statistics();
    const auto y = torch::relu(x * 2 + 1);
    const auto positive = torch::masked_select(y, y > 0);
    EXPECT_EQ((positive + 1).numel(), positive.size(0));
    mark_step();
  }
  EXPECT_EQ(since(settled).ops_recorded, 0u) << explain();
}

using Lists = Lazy;

TEST_F(Lists, AreArgumentsAndResults) {
  expect_eager_three_ways(
      {random(torch::kCPU, {4, 6}), random(torch::kCPU, {2, 6})}, [](Tensors& in) -> Tensors {
        auto parts = in[0].split(2, 1);
        auto rows = in[0].unbind(0);
        const auto meshes = torch::meshgrid({in[0][0], in[1][0]}, "ij");
        return {torch::cat({in[0], in[1]}), torch::stack({rows[0], rows[2]}), parts[0] + parts[2],
                torch::cat(in[0].chunk(4)), meshes[0] * meshes[1], torch::vstack({in[1], in[0]}),
                torch::block_diag({in[0], in[1]}), torch::einsum("ij,kj->ik", {in[0], in[1]})};
      });
}

TEST_F(Lists, OfSeveralResultsAreTuples) {
  expect_eager_three_ways({random(torch::kCPU, {5, 4})}, [](Tensors& in) -> Tensors {
    const auto [sorted, order] = in[0].sort(1);
    const auto [top, where] = in[0].topk(2, 1);
    const auto [largest, at] = in[0].max(0);
    const auto [variance, mean] = torch::var_mean(in[0], 1);
    const auto [smallest, biggest] = torch::aminmax(in[0]);
    return {sorted, order, top, where, largest, at, variance, mean, smallest, biggest};
  });
}

TEST_F(Lists, OfLengthsThatChangeAreOtherTraces) {
  for (int k = 0; k < 9; ++k) {
    Tensors parts;
    for (int t = 0; t <= k % 3; ++t) parts.push_back(torch::ones({2}, torch::kLazy) * t);
    EXPECT_EQ(torch::cat(parts).size(0), 2 * (k % 3 + 1));
    EXPECT_EQ(torch::stack(parts).sum().item<float>(), k % 3 == 0 ? 0.0f : k % 3 == 1 ? 2.0f : 6.0f);
    mark_step();
  }
}

class Dtypes : public Lazy, public testing::WithParamInterface<torch::Dtype> {};

TEST_P(Dtypes, AreComputedAsByEager) {
  const auto dtype = GetParam();
  const bool floating = c10::isFloatingType(dtype);
  expect_eager_three_ways(
      {random(torch::kCPU, {4, 4}, dtype), random(torch::kCPU, {4, 4}, dtype)},
      [=](Tensors& in) -> Tensors {
        if (dtype == torch::kBool) {
          return {in[0] & in[1], in[0] ^ in[1], ~in[0], in[0].sum(), in[0].any(1), in[0] == in[1],
                  in[0].to(torch::kFloat) * 2};
        }
        Tensors out{in[0] + in[1] * 2, in[0].sum(1), in[0] == in[1], in[0].abs(), -in[1]};
        in[1].mul_(in[0]);
        if (floating) {
          out = joined(out, {torch::mm(in[0], in[1]), in[0].exp(), in[0].softmax(1), in[0] / 3,
                             in[0].to(torch::kFloat)});
        }
        return out;
      },
      {.compiled = !c10::isComplexType(dtype), .tolerance = 10});
}

INSTANTIATE_TEST_SUITE_P(All, Dtypes,
                         testing::Values(torch::kFloat, torch::kDouble, torch::kHalf,
                                         torch::kBFloat16, torch::kLong, torch::kInt, torch::kByte,
                                         torch::kBool, torch::kComplexFloat, torch::kComplexDouble),
                         [](const auto& info) { return std::string(c10::toString(info.param)); });

using Shapes = Lazy;

TEST_F(Shapes, WithoutDimensionsAndWithoutElements) {
  expect_eager_three_ways(
      {random(torch::kCPU, {}), torch::zeros({0, 3}), random(torch::kCPU, {1}),
       torch::zeros({0})},
      [](Tensors& in) -> Tensors {
        in[0].add_(1);
        in[3].mul_(2);
        return {in[0] * 2,        in[1] + 1,          in[1].sum(),           in[1].sum(0),
                in[0].view({1}),  in[2].squeeze(),    torch::cat({in[1], in[1]}),
                in[0] + in[2],    in[1].t(),          torch::mm(in[1].t(), in[1]),
                in[3].sum(),      in[0].expand({3}),  in[1].view({3, 0}),    in[0].reshape({1, 1})};
      });
}

TEST_F(Shapes, StridedAndChannelsLastAreKept) {
  expect_eager_three_ways(
      {random(torch::kCPU, {2, 3, 4, 5}).contiguous(torch::MemoryFormat::ChannelsLast),
       random(torch::kCPU, {4, 6}).t()},
      [](Tensors& in) -> Tensors {
        return {in[0] * 2, in[0].relu().contiguous(), in[1] + 1, torch::zeros_like(in[0]),
                in[1].clone(), in[0].to(torch::kDouble), in[0].permute({0, 2, 3, 1}) + 1};
      });
}

using Layers = Lazy;

TEST_F(Layers, ConvolutionsAndPooling) {
  expect_eager_three_ways(
      [](torch::Device device) -> Step {
        torch::nn::Sequential model(
            torch::nn::Conv2d(torch::nn::Conv2dOptions(3, 4, 3).padding(1)), torch::nn::ReLU(),
            torch::nn::MaxPool2d(2),
            torch::nn::Conv2d(torch::nn::Conv2dOptions(4, 4, 3).groups(2).bias(false)),
            torch::nn::AvgPool2d(torch::nn::AvgPool2dOptions(2)),
            torch::nn::ConvTranspose2d(torch::nn::ConvTranspose2dOptions(4, 2, 2).stride(2)),
            torch::nn::AdaptiveAvgPool2d(1), torch::nn::Flatten());
        model->to(device);
        const auto x = random(device, {2, 3, 12, 12});
        return [=](int) mutable -> Tensors {
          const auto y = model->forward(x);
          return joined({y}, torch::autograd::grad({y.square().sum()}, model->parameters()));
        };
      },
      {.tolerance = 10});
}

TEST_F(Layers, BatchNormKeepsItsRunningStatistics) {
  expect_eager_three_ways(
      [](torch::Device device) -> Step {
        torch::nn::BatchNorm2d norm(3);
        norm->to(device);
        const auto x = random(device, {4, 3, 5, 5});
        return [=](int k) mutable -> Tensors {
          const auto y = norm->forward(x * (k + 1.5) + 0.3 * (k + 1));
          return joined({y}, joined(state_of(*norm),
                                    torch::autograd::grad({y.pow(3).sum()}, norm->parameters())));
        };
      },
      {.tolerance = 10});
}

TEST_F(Layers, BatchNormInEvaluationLeavesThemAlone) {
  expect_eager_three_ways([](torch::Device device) -> Step {
    torch::nn::BatchNorm1d norm(3);
    norm->to(device);
    norm->eval();
    const auto x = random(device, {4, 3});
    return [=](int) mutable -> Tensors { return joined({norm->forward(x)}, state_of(*norm)); };
  });
}

TEST_F(Layers, OtherNorms) {
  expect_eager_three_ways(
      [](torch::Device device) -> Step {
        torch::nn::LayerNorm layer(torch::nn::LayerNormOptions({6}));
        torch::nn::GroupNorm group(2, 4);
        torch::nn::InstanceNorm1d instance(torch::nn::InstanceNorm1dOptions(4).affine(true));
        for (auto* module : std::initializer_list<torch::nn::Module*>{
                 layer.get(), group.get(), instance.get()}) {
          module->to(device);
        }
        auto x = random(device, {3, 4, 6}).requires_grad_();
        return [=](int) mutable -> Tensors {
          const auto y = layer->forward(group->forward(instance->forward(x)));
          return {y, torch::autograd::grad({y.exp().sum()}, {x})[0]};
        };
      },
      {.tolerance = 10});
}

TEST_F(Layers, EmbeddingsGetSparseRowsRight) {
  expect_eager_three_ways(
      [](torch::Device device) -> Step {
        torch::nn::Embedding table(torch::nn::EmbeddingOptions(10, 4).padding_idx(0));
        torch::nn::EmbeddingBag bag(torch::nn::EmbeddingBagOptions(10, 3).mode(torch::kSum));
        table->to(device);
        bag->to(device);
        const auto index = torch::tensor({{1, 2, 0}, {9, 2, 2}}).to(device);
        return [=](int) mutable -> Tensors {
          const auto y = table->forward(index), z = bag->forward(index);
          const auto gradients =
              torch::autograd::grad({y.exp().sum() + z.exp().sum()}, {table->weight, bag->weight});
          return joined({y, z}, gradients);
        };
      },
      {.tolerance = 10});
}

TEST_F(Layers, AttentionTakesEagersKernel) {
  for (const bool causal : {false, true}) {
    expect_eager_three_ways(
        {random(torch::kCPU, {2, 2, 8, 16}), random(torch::kCPU, {2, 2, 8, 16}),
         random(torch::kCPU, {2, 2, 8, 16})},
        [=](Tensors& in) -> Tensors {
          for (auto& tensor : in) tensor.requires_grad_();
          const auto y = torch::scaled_dot_product_attention(in[0], in[1], in[2], {}, 0.0, causal);
          return joined({y}, torch::autograd::grad({y.square().sum()}, in));
        },
        {.tolerance = 10});
  }
}

TEST_F(Layers, AttentionWithMasksIsEagers) {
  expect_eager_three_ways(
      {random(torch::kCPU, {1, 2, 6, 8}), random(torch::kCPU, {1, 2, 6, 8}),
       random(torch::kCPU, {6, 6})},
      [](Tensors& in) -> Tensors {
        const auto allowed = torch::ones({6, 6}, in[0].options()).tril().to(torch::kBool);
        return {torch::scaled_dot_product_attention(in[0], in[1], in[1], allowed),
                torch::scaled_dot_product_attention(in[0], in[1], in[0], in[2]),
                torch::scaled_dot_product_attention(in[0], in[1], in[0], {}, 0.0, false, 0.7)};
      },
      {.tolerance = 10});
}

TEST_F(Layers, AttentionLayersAndTransformers) {
  expect_eager_three_ways(
      [](torch::Device device) -> Step {
        torch::nn::MultiheadAttention attention(8, 2);
        torch::nn::TransformerEncoderLayer layer(
            torch::nn::TransformerEncoderLayerOptions(8, 2).dim_feedforward(16).dropout(0));
        attention->to(device);
        layer->to(device);
        const auto x = random(device, {5, 2, 8});
        return [=](int) mutable -> Tensors {
          const auto [y, weights] = attention->forward(x, x, x);
          const auto z = layer->forward(y);
          return joined({y, weights, z},
                        torch::autograd::grad({z.square().sum()}, layer->parameters()));
        };
      },
      {.tolerance = 100});
}

TEST_F(Layers, RecurrentLayers) {
  expect_eager_three_ways(
      [](torch::Device device) -> Step {
        torch::nn::LSTM lstm(torch::nn::LSTMOptions(4, 6).num_layers(2));
        lstm->to(device);
        const auto x = random(device, {5, 2, 4});
        return [=](int) mutable -> Tensors {
          const auto y = std::get<0>(lstm->forward(x));
          return joined({y}, torch::autograd::grad({y.square().sum()}, lstm->parameters()));
        };
      },
      {.tolerance = 100});
}

/// Not to the bit: on the CPU eager multiplies the inputs of all time steps at once (RNN.cpp,
/// FullLayer), which it asks the tensor's device for, and on other devices one by one. On a GPU
/// they are cuDNN's, between segments.
TEST_F(Layers, GatedRecurrentLayers) {
  uint64_t recorded_at_last = 0;
  const auto run = [&](torch::Device device, int steps) -> Tensors {
    torch::manual_seed(5);
    torch::nn::GRU gru(torch::nn::GRUOptions(6, 3).bidirectional(true));
    torch::nn::RNN rnn(torch::nn::RNNOptions(6, 4));
    gru->to(device);
    rnn->to(device);
    const auto x = random(device, {5, 2, 6});
    Tensors out;
    for (int step = 0; step < steps; ++step) {
      const Statistics before = statistics();
      const auto y = std::get<0>(gru->forward(x));
      const auto z = std::get<0>(rnn->forward(y));
      out = joined({y, z}, torch::autograd::grad({y.square().sum() + z.sum()}, joined(gru->parameters(), rnn->parameters())));
      mark_step();
      wait_for_compiles();
      recorded_at_last = since(before).ops_recorded;
    }
    return out;
  };
  const Statistics before = statistics();
  const Tensors expected = run(eager_device(), 1), actual = run(torch::kLazy, 6);
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t k = 0; k < expected.size(); ++k) expect_close(actual[k], expected[k], 100);
  EXPECT_EQ(recorded_at_last, 0u);
  if (eager_device().is_cpu()) {
    EXPECT_EQ(since(before).segments_recorded, 1u);
  }
}

TEST_F(Layers, Losses) {
  expect_eager_three_ways(
      {random(torch::kCPU, {5, 4}), torch::tensor({0, 3, 1, 2, 2}), random(torch::kCPU, {5, 4})},
      [](Tensors& in) -> Tensors {
        in[0].requires_grad_();
        const auto losses = torch::stack(
            {F::cross_entropy(in[0], in[1]), F::mse_loss(in[0], in[2]), F::l1_loss(in[0], in[2]),
             F::smooth_l1_loss(in[0], in[2]),
             F::binary_cross_entropy_with_logits(in[0], torch::sigmoid(in[2])),
             F::kl_div(in[0].log_softmax(1), in[2].softmax(1)),
             F::cosine_similarity(in[0], in[2]).sum(), F::huber_loss(in[0], in[2])});
        return {losses, torch::autograd::grad({losses.sum()}, {in[0]})[0]};
      },
      {.tolerance = 10});
}

TEST_F(Layers, InterpolationAndPadding) {
  expect_eager_three_ways(
      {random(torch::kCPU, {1, 2, 4, 4})},
      [](Tensors& in) -> Tensors {
        const std::vector<double> twice{2, 2};
        return {F::interpolate(in[0], F::InterpolateFuncOptions().scale_factor(twice)),
                F::interpolate(in[0], F::InterpolateFuncOptions()
                                          .scale_factor(twice)
                                          .mode(torch::kBilinear)
                                          .align_corners(false)),
                F::pad(in[0], F::PadFuncOptions({1, 2, 0, 1})),
                F::pad(in[0], F::PadFuncOptions({1, 1, 1, 1}).mode(torch::kReflect)),
                F::unfold(in[0], F::UnfoldFuncOptions({2, 2}))};
      },
      {.tolerance = 10});
}

TEST_F(Layers, LinearAlgebraAndFourierTransforms) {
  expect_eager_three_ways(
      {random(torch::kCPU, {4, 4}, torch::kDouble)},
      [](Tensors& in) -> Tensors {
        const auto spd = torch::mm(in[0], in[0].t()) + 4 * torch::eye(4, in[0].options());
        return {torch::linalg_cholesky(spd), torch::linalg_inv(spd), torch::linalg_det(spd),
                torch::linalg_solve(spd, in[0]), torch::fft_irfft(torch::fft_rfft(in[0]), 4),
                in[0].cumsum(0), torch::cdist(in[0], spd)};
      },
      {.compiled = false});
}

}  // namespace
}  // namespace reprise::test
