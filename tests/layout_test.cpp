// Sparse and quantized tensors: calls that take one run between segments.
#include <functional>

#include "reprise/reprise.h"
#include "tests/three_ways.h"

namespace reprise::test {
namespace {

using Function = std::function<Tensors(torch::Device device)>;

struct OtherLayouts : ::testing::Test {
  void SetUp() override { begin_test(/*compile=*/false); }
};

/// Several times, so that what is dense about it is recorded and verified.
void expect_same_as_eager(const Function& function) {
  for (int time = 0; time < 4; ++time) {
    SCOPED_TRACE(c10::str("time ", time));
    torch::manual_seed(5);
    const Tensors wanted = function(eager_device());
    torch::manual_seed(5);
    const Tensors got = function(torch::kLazy);
    ASSERT_EQ(got.size(), wanted.size());
    for (size_t k = 0; k < got.size(); ++k) {
      SCOPED_TRACE(c10::str("output ", k));
      EXPECT_TRUE(got[k].device().is_lazy());
      EXPECT_EQ(got[k].layout(), wanted[k].layout());
      EXPECT_EQ(got[k].sizes(), wanted[k].sizes());
      EXPECT_EQ(got[k].is_quantized(), wanted[k].is_quantized());
      EXPECT_EQ(got[k].is_non_overlapping_and_dense(), wanted[k].is_non_overlapping_and_dense());
      const auto dense = [](torch::Tensor tensor) {
        if (tensor.is_quantized()) tensor = tensor.dequantize();
        return tensor.layout() == torch::kStrided ? tensor : tensor.to_dense();
      };
      expect_same_bits(dense(got[k].detach().cpu()), dense(wanted[k].detach().cpu()));
    }
    mark_step();
  }
}

torch::Tensor mostly_zeros(torch::Device device, torch::IntArrayRef sizes) {
  const auto x = torch::randn(sizes).to(device);
  return x * (x > 0.5).to(torch::kFloat);
}

TEST_F(OtherLayouts, SparseProductsAndTheirGradients) {
  expect_same_as_eager([](torch::Device device) -> Tensors {
    const auto sparse = mostly_zeros(device, {6, 5}).to_sparse().requires_grad_();
    const auto dense = torch::randn({5, 3}).to(device).requires_grad_();
    const auto y = torch::mm(sparse, dense);
    (y * y).sum().backward();
    return {y, dense.grad(), sparse, sparse.grad(), sparse.detach().coalesce().values() * 2,
            sparse.detach() * 3, torch::sparse_coo_tensor(sparse._indices(), sparse._values() + 1, {6, 5})};
  });
}

TEST_F(OtherLayouts, AKernelSeesThatAGradientIsWanted) {
  if (!eager_device().is_cpu()) GTEST_SKIP() << "the op has a kernel on the CPU alone";
  expect_same_as_eager([](torch::Device device) -> Tensors {
    const auto rows = mostly_zeros(device, {6, 5}).to_sparse_csr().requires_grad_();
    const auto dense = torch::randn({5, 3}).to(device).requires_grad_();
    const auto y = std::get<0>(at::_sparse_mm_reduce_impl(rows, dense, "amax"));
    const auto gradients = torch::autograd::grad({y.sum()}, {rows, dense});
    return {y, gradients[0], gradients[1]};
  });
}

TEST_F(OtherLayouts, CompressedRowsAndColumns) {
  expect_same_as_eager([](torch::Device device) -> Tensors {
    const auto dense = torch::randn({5, 3}).to(device);
    const auto rows = mostly_zeros(device, {6, 5}).to_sparse_csr();
    const auto columns = mostly_zeros(device, {6, 5}).to_sparse_csc();
    return {rows, columns, torch::mm(rows, dense), rows.crow_indices(), rows.values() + 1};
  });
}

TEST_F(OtherLayouts, AreCopiedFromTheHostAndBack) {
  for (const bool compressed : {false, true}) {
    const auto host = compressed ? torch::eye(4).to_sparse_csr() : torch::eye(4).to_sparse();
    const auto lazy = host.to(torch::kLazy);
    EXPECT_TRUE(lazy.device().is_lazy());
    EXPECT_EQ(lazy.layout(), host.layout());
    EXPECT_TRUE(lazy.cpu().device().is_cpu());
    expect_same_bits((lazy.cpu()).to_dense(), torch::eye(4));
    expect_same_bits(lazy.to_dense().cpu() + 1, torch::eye(4) + 1);
  }
}

TEST_F(OtherLayouts, PartsShareTheirMemory) {
  expect_same_as_eager([](torch::Device device) -> Tensors {
    const auto sparse = mostly_zeros(device, {6, 5}).to_sparse();
    const auto values = sparse._values(), again = sparse._values();
    values.mul_(2);                         // pending, where the device is lazy
    const auto before = sparse.to_dense();  // sees it
    again.add_(1);
    const auto after = values + again;
    const auto indices = torch::arange(3).to(device).unsqueeze(0);
    const auto own = torch::rand({3}).to(device) * 2;
    const auto made = torch::sparse_coo_tensor(indices, own, {4});
    own.add_(5);
    return {before, sparse, after, made, made._values()};
  });
}

TEST_F(OtherLayouts, AnEmbeddingWithSparseGradientsIsTrained) {
  expect_same_as_eager([](torch::Device device) -> Tensors {
    torch::nn::Embedding table(torch::nn::EmbeddingOptions(10, 4).sparse(true));
    table->to(device);
    torch::optim::SGD optimizer(table->parameters(), 0.1);
    torch::Tensor loss;
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      loss = table(torch::tensor({1, 3, 3, step}).to(device)).square().sum();
      loss.backward();
      EXPECT_TRUE(table->weight.grad().is_sparse());
      optimizer.step();
    }
    return {loss, table->weight};
  });
}

TEST_F(OtherLayouts, QuantizedTensors) {
  expect_same_as_eager([](torch::Device device) -> Tensors {
    const auto x = torch::randn({4, 4}).to(device);
    const auto quantized = torch::quantize_per_tensor(x, 0.1, 2, torch::kQInt8);
    EXPECT_EQ(quantized.q_scale(), 0.1);
    return {quantized, quantized.dequantize() * 2, quantized.int_repr(),
            torch::quantize_per_channel(x, torch::full({4}, 0.1).to(device),
                                        torch::zeros({4}, torch::kLong).to(device), 0,
                                        torch::kQUInt8)};
  });
}

}  // namespace
}  // namespace reprise::test
