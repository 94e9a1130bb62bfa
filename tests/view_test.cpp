// Views: metadata over one shared storage, whoever writes through which.
#include "reprise/reprise.h"
#include "tests/three_ways.h"

namespace reprise::test {
namespace {

using namespace torch::indexing;
using Views = Lazy;

TEST_F(Views, MutationThroughAViewReachesTheBase) {
  expect_eager_three_ways({random(torch::kCPU, {4, 6})}, [](Tensors& in) -> Tensors {
    in[0].slice(1, 0, 3).mul_(2);
    in[0][1].fill_(5);
    in[0].t()[2].add_(1);
    in[0].view({2, 12}).select(1, 7).zero_();
    in[0].diagonal().sub_(1);
    return {in[0].sum(0)};
  });
}

TEST_F(Views, MutationOfTheBaseReachesItsViews) {
  expect_eager_three_ways({random(torch::kCPU, {4, 6})}, [](Tensors& in) -> Tensors {
    const auto base = in[0] * 1;
    const auto row = base[2], column = base.select(1, 3), all = base.flatten();
    base.add_(1);
    row.mul_(3);
    return {base, row, column, all, all.unfold(0, 4, 2)};
  });
}

TEST_F(Views, KeepEagersGeometry) {
  expect_eager_three_ways({random(torch::kCPU, {2, 3, 4})}, [](Tensors& in) -> Tensors {
    const auto y = in[0] + 0;
    return {y.permute({2, 0, 1}), y.transpose(0, 2), y.unsqueeze(1), y.expand({5, 2, 3, 4}),
            y.narrow(2, 1, 2),    y.squeeze(),       y.reshape({6, 4}).t(),
            y.movedim(0, 2),      y.flatten(1),      y.view({-1}).as_strided({3, 3}, {2, 1}, 4)};
  });
}

TEST_F(Views, IndexingWithSlicesReadsAndWrites) {
  expect_eager_three_ways({random(torch::kCPU, {5, 6})}, [](Tensors& in) -> Tensors {
    in[0].index_put_({Slice(1, 4), Slice(None, None, 2)}, 7);
    in[0].index_put_({0}, in[0].index({4}));
    return {in[0].index({Slice(), 1}), in[0].index({"...", Slice(2, None)}),
            in[0].index({None, 3})};
  });
}

TEST_F(Views, AsStridedOverlapsItself) {
  expect_eager_three_ways({random(torch::kCPU, {10})}, [](Tensors& in) -> Tensors {
    const auto windows = in[0].as_strided({4, 4}, {2, 1});
    const auto sums = windows.sum(1);
    in[0].as_strided({5}, {2}, 1).mul_(3);
    return {sums, windows, in[0].as_strided({3, 3}, {1, 1}).clone()};
  });
}

TEST_F(Views, OfAnotherDtypeShareTheBytes) {
  expect_eager_three_ways({random(torch::kCPU, {4, 4})}, [](Tensors& in) -> Tensors {
    const auto bits = in[0].view(torch::kInt);
    bits.bitwise_and_(0x7fffffff);  // the absolute value
    const auto halves = in[0].view(torch::kHalf);
    return {bits, halves.slice(1, 1, 8, 2), in[0] + 1};
  });
}

TEST_F(Views, OfComplexNumbersShareTheBytes) {
  expect_eager_three_ways(
      {random(torch::kCPU, {4, 2}), random(torch::kCPU, {3}, torch::kComplexFloat)},
      [](Tensors& in) -> Tensors {
        const auto complex = torch::view_as_complex(in[0]);
        complex.mul_(2);
        torch::real(complex).add_(1);
        torch::view_as_real(in[1]).mul_(3);
        return {complex, torch::imag(in[1]), torch::abs(in[1])};
      },
      {.compiled = false});
}

TEST_F(Views, ConjugateAndNegativeViewsAreResolved) {
  expect_eager_three_ways(
      {random(torch::kCPU, {3, 3}, torch::kComplexFloat)},
      [](Tensors& in) -> Tensors {
        const auto conjugate = in[0].conj();
        const auto product = torch::mm(in[0], conjugate.t());
        const auto negative = torch::imag(in[0].conj());
        return {conjugate, product, negative, negative + 1, conjugate.resolve_conj(),
                in[0].mH().contiguous()};
      },
      {.compiled = false});
}

TEST_F(Views, OfAnInputKeptOverSteps) {
  expect_eager_three_ways([](torch::Device device) -> Step {
    const auto table = random(device, {6, 2});
    const auto column = table.select(1, 1);
    return [=](int k) -> Tensors {
      column.add_(1);
      table[k % 1].mul_(2);
      return {table, column, column.view({2, 3}).sum(1)};
    };
  });
}

TEST_F(Views, MadeInOneStepAreWrittenInTheNext) {
  expect_eager_three_ways([](torch::Device device) -> Step {
    struct State {
      torch::Tensor base, view;
    };
    auto state = std::make_shared<State>();
    state->base = random(device, {4, 3});
    state->view = state->base[1];
    return [=](int) -> Tensors {
      state->view.add_(1);
      const auto next = state->base * 0.5;
      state->base = next;
      state->view = next[1];
      return {state->base, state->view};
    };
  });
}

TEST_F(Views, MetadataOpsInPlaceChangeTheTensorOnly) {
  for (int way = 0; way < 3; ++way) {
    const auto make = [](torch::Device device) -> Tensors {
      auto x = torch::arange(24).to(device).view({1, 4, 6}) * 2;
      auto y = x.detach();
      y.squeeze_(0);
      y.t_();
      auto z = y.detach();
      z.unsqueeze_(0).transpose_(0, 2).swapdims_(1, 2);
      z.add_(1);
      return {x, y, z, y * 2, z.sum(0)};
    };
    const Tensors eager = make(eager_device()), lazy = make(torch::kLazy);
    for (size_t k = 0; k < eager.size(); ++k) {
      EXPECT_EQ(lazy[k].strides(), eager[k].strides()) << k;
      expect_same_bits(lazy[k], eager[k]);
    }
    mark_step();
  }
}

TEST_F(Views, MetadataOpsInPlaceStayInTheStep) {
  expect_eager_three_ways({random(torch::kCPU, {3, 4})}, [](Tensors& in) -> Tensors {
    auto y = in[0] * 2;
    y.t_();
    auto z = y + 1;
    z.unsqueeze_(0);
    return {y, z, z.squeeze_().mm(in[0])};
  });
}

TEST_F(Views, ResizeGrowsAndShrinks) {
  for (int way = 0; way < 3; ++way) {
    const auto make = [](torch::Device device) -> Tensors {
      auto x = torch::arange(6).to(device) + 1;
      x.resize_({2, 2});
      auto y = x * 2;
      auto z = torch::zeros({2}, x.options());
      z.resize_({3, 3});
      z.zero_();
      z.add_(1);
      return {x, y, z};
    };
    const Tensors eager = make(eager_device()), lazy = make(torch::kLazy);
    for (size_t k = 0; k < eager.size(); ++k) expect_same_bits(lazy[k], eager[k]);
    mark_step();
  }
}

TEST_F(Views, SetTakesAnotherStorage) {
  for (int way = 0; way < 3; ++way) {
    const auto make = [](torch::Device device) -> Tensors {
      const auto x = torch::arange(6).to(device).to(torch::kFloat);
      const auto pending = x * 2;
      auto y = torch::empty({0}, x.options());
      y.set_(pending);
      y.add_(1);
      auto z = torch::empty({0}, x.options());
      z.set_(pending.storage(), 2, {2, 2}, {2, 1});
      return {pending, y, z, z + y.slice(0, 0, 2)};
    };
    const Tensors eager = make(eager_device()), lazy = make(torch::kLazy);
    for (size_t k = 0; k < eager.size(); ++k) expect_same_bits(lazy[k], eager[k]);
    mark_step();
  }
}

TEST_F(Views, SetDataSwapsTheContents) {
  auto x = torch::ones({2}).to(torch::kLazy);
  for (int way = 0; way < 3; ++way) {
    x.set_data((x * 2).detach());
    mark_step();
  }
  EXPECT_EQ(x.sum().item<float>(), 16.0f);
}

TEST_F(Views, OfAPendingTensorOutliveIt) {
  expect_eager_three_ways({random(torch::kCPU, {4, 4})}, [](Tensors& in) -> Tensors {
    torch::Tensor view;
    {
      const auto gone = in[0] * 2 + 1;
      view = gone[1];
    }
    return {view};
  });
}

TEST_F(Views, ChunksAndSplitsAreWrittenToOneByOne) {
  expect_eager_three_ways({random(torch::kCPU, {6, 4})}, [](Tensors& in) -> Tensors {
    const auto chunks = in[0].chunk(3, 0);
    chunks[0].mul_(2);
    chunks[2].add_(chunks[0]);
    const auto columns = in[0].unbind(1);
    columns[3].zero_();
    const auto parts = in[0].split_with_sizes({1, 3}, 1);
    return {parts[0], parts[1], columns[0] + columns[1], torch::stack(chunks)};
  });
}

}  // namespace
}  // namespace reprise::test
