// Sizes that were never seen before: traced with the geometries that libtorch infers, not
// run, and replayed by a program over symbols at once.
#include "cpp_models/gpt.h"
#include "cpp_models/mlp.h"
#include "cpp_models/resnet.h"
#include "reprise/reprise.h"
#include "reprise/testing.h"
#include "tests/sized_steps.h"

namespace reprise::test {
namespace {

namespace F = torch::nn::functional;

class InferredSizes : public LazySizes {};

using SizedStep = std::function<Tensors(int64_t size)>;
using SizedProgram = std::function<SizedStep(torch::Device device)>;

/// Eager's and ours, side by side.
class Pair {
 public:
  explicit Pair(const SizedProgram& program)
      : eager_((torch::manual_seed(3), program(eager_device()))),
        lazy_((torch::manual_seed(3), program(torch::kLazy))) {
    mark_step();
  }

  /// One marked step of each.
  void step(int64_t size, double tolerance = 1) {
    SCOPED_TRACE(c10::str("size ", size));
    torch::manual_seed(static_cast<uint64_t>(size));
    const Tensors wanted = eager_(size);
    torch::manual_seed(static_cast<uint64_t>(size));
    const Tensors got = lazy_(size);
    mark_step();
    expect_all_close(got, wanted, tolerance);
  }

  /// Three sizes, after which there is a program over symbols.
  void learn(double tolerance = 1) {
    const Statistics before = statistics();
    for (const int64_t size : {4, 6, 9}) step(size, tolerance);
    wait_for_compiles();
    const Statistics did = since(before);
    ASSERT_EQ(did.programs_requested, 1u) << explain();
    ASSERT_LE(did.programs_compiled + did.programs_loaded, 1u) << explain();
    ASSERT_EQ(did.ops_inferred, 0u);
  }

  /// A new size: not an op of it is recorded.
  void expect_inferred(int64_t size, double tolerance = 1) {
    const Statistics before = statistics();
    step(size, tolerance);
    const Statistics did = since(before);
    EXPECT_EQ(did.ops_recorded, 0u) << explain();
    EXPECT_GT(did.ops_inferred, 0u) << explain();
    EXPECT_EQ(did.mismatches, 0u) << explain();
    EXPECT_EQ(did.segments_replayed + did.programs_checked, 1u) << explain();
  }

 private:
  SizedStep eager_, lazy_;
};

SizedProgram function(const std::function<Tensors(const torch::Tensor& x)>& f) {
  return [=](torch::Device device) -> SizedStep {
    return [=](int64_t size) { return f(torch::rand({size, 8}).to(device)); };
  };
}

TEST_F(InferredSizes, ANewSizeIsReplayedAtOnce) {
  Pair pair(function([](const torch::Tensor& x) -> Tensors {
    auto y = x;
    for (int k = 0; k < 32; ++k) y = torch::tanh(y * 1.25) + x;
    return {y, y.sum(0)};
  }));
  pair.learn();
  // The first ones are looked at beside the interpreter, then it is trusted.
  for (const int64_t size : {5, 12, 7, 31, 2}) pair.expect_inferred(size);
  const Statistics before = statistics();
  pair.expect_inferred(17);
  EXPECT_EQ(since(before).segments_interpreted, 0u) << explain();
  EXPECT_EQ(since(before).programs_requested, 0u) << explain();
  // A size that comes again gets a place in the trace tree, and is verified from then on.
  pair.expect_inferred(17);
  const Statistics again = statistics();
  pair.step(17);
  EXPECT_EQ(since(again).ops_inferred + since(again).ops_recorded, 0u) << explain();
  EXPECT_EQ(since(again).segments_replayed, 1u) << explain();
}

TEST_F(InferredSizes, OpsOfAllKinds) {
  Pair pair([](torch::Device device) -> SizedStep {
    const auto table = random(device, {20, 8}), filters = random(device, {4, 3, 3, 3});
    const auto bias = random(device, {4}), weight = random(device, {8});
    auto state = torch::zeros({8}).to(device);
    return [=](int64_t n) mutable -> Tensors {
      const auto x = torch::rand({n, 8}).to(device);
      const auto image = torch::rand({2, 3, n + 3, n + 5}).to(device);
      const auto index = torch::randint(20, {n}, torch::kLong).to(device);
      const auto o = x.options();
      state.add_(x.mean(0)).mul_(0.5);
      auto y = x.clone();
      y.narrow(0, 1, n - 2).add_(1);
      y.t().mul_(2);
      auto z = torch::zeros_like(x);
      z.copy_(x.slice(0, 0, 1));
      const auto [values, order] = x.sort(0);
      const auto [top, which] = x.topk(2, 0);
      const auto cut = x.split({2, n - 2});
      return {
          y, z, values, order, top, which, cut[1] * 2, state.clone(),
          // elementwise
          x.abs(), x + 1, 2 - x, x.relu(), x.pow(2), x.clamp(0.2, 0.7), torch::where(x > 0.5, x, -x),
          x.masked_fill(x > 0.5, 0), x.lt(0.5).logical_not(), torch::maximum(x, weight), torch::gelu(x),
          F::hardtanh(x), F::silu(x), x.to(torch::kDouble), x.isnan(),
          // made anew
          torch::ones({n, 2}, o), torch::full({n}, 3.0, o), torch::arange(n, o.dtype(torch::kLong)),
          torch::arange(1, 2 * n, 3, o.dtype(torch::kLong)), torch::eye(3, o).sum(), x.new_zeros({n + 1}),
          torch::rand_like(x), torch::randn({n}, o), torch::full_like(x, 0.5),
          // reductions
          x.sum(), x.sum(1), x.mean(0, true), x.max(), std::get<0>(x.max(0)), x.argmax(1), x.var(0),
          x.std(), x.prod(0), x.norm(), x.cumsum(0), x.logsumexp(0), x.softmax(0), x.log_softmax(1),
          x.amax({0, 1}), x.any(),
          // shapes
          x.t().contiguous(), x.unsqueeze(1).expand({n, 3, 8}).clone(), x.reshape({-1}), x.view({8, n}),
          x.flatten() * 2, x.repeat({2, 1}), x.flip(0), x.roll(1, 0), torch::cat({x, x}, 0),
          torch::stack({x, x}, 1), x.diagonal(), x.unbind(1)[3], x.tril(), x.permute({1, 0}),
          x.index_select(1, torch::arange(3, o.dtype(torch::kLong))), x.gather(0, order),
          torch::constant_pad_nd(x, {1, 1}), x.select(0, n - 1),
          // products and networks
          x.mm(x.t()), x.matmul(weight), torch::einsum("ij,kj->ik", {x, table}),
          torch::embedding(table, index), torch::layer_norm(x, {8}, weight, weight),
          torch::conv2d(image, filters, bias, 2, 1), torch::max_pool2d(image, 2),
          torch::conv_transpose2d(image, filters.transpose(0, 1).contiguous(), {}, 2),
          torch::group_norm(image, 3), torch::mse_loss(x, x * 2), torch::binary_cross_entropy(x, x),
          torch::huber_loss(x, x * 3), torch::upsample_nearest2d(image, {2 * n, 2 * n}),
          torch::scaled_dot_product_attention(x.view({1, 2, n, 4}), x.view({1, 2, n, 4}), x.view({1, 2, n, 4}))};
    };
  });
  pair.learn(4);
  for (const int64_t size : {5, 7, 11, 15}) pair.expect_inferred(size, 4);
}

template <class Model>
SizedProgram training(const std::function<Model()>& make,
                      const std::function<Tensors(int64_t size)>& batch) {
  return [=](torch::Device device) -> SizedStep {
    Model model = make();
    model->to(device);
    auto optimizer = std::make_shared<torch::optim::Adam>(model->parameters(),
                                                          torch::optim::AdamOptions(1e-3));
    return [=](int64_t size) mutable -> Tensors {
      const Tensors data = batch(size);
      optimizer->zero_grad();
      const auto loss = F::cross_entropy(model->forward(data[0].to(device)).flatten(0, -2),
                                         data[1].to(device));
      loss.backward();
      optimizer->step();
      return joined({loss.detach()}, gradients_of(*model));
    };
  };
}

/// Batches whose sizes never come again, trained with an optimizer whose numbers change at
/// every step.
void expect_learns_sizes(const SizedProgram& program, double tolerance) {
  Pair pair(program);
  // The first step makes the optimizer's state; in the others, its numbers become inputs.
  for (const int64_t size : {4, 6, 9, 5, 8, 7}) {
    pair.step(size, tolerance);
    wait_for_compiles();
  }
  const Statistics before = statistics();
  for (const int64_t size : {12, 11, 3, 10, 13}) pair.expect_inferred(size, tolerance);
  EXPECT_EQ(since(before).programs_requested, 0u) << explain();
}

TEST_F(InferredSizes, TrainingAnMlp) {
  expect_learns_sizes(training<cpp_models::Mlp>(
                          [] {
                            return cpp_models::Mlp(cpp_models::MlpOptions{
                                .inputs = 8, .hidden = {16, 16}, .outputs = 5});
                          },
                          [](int64_t size) -> Tensors {
                            return {torch::rand({size, 8}), torch::randint(5, {size}, torch::kLong)};
                          }),
                      40);
}

TEST_F(InferredSizes, TrainingAGpt) {
  expect_learns_sizes(
      training<cpp_models::Gpt>(
          [] {
            return cpp_models::Gpt(cpp_models::GptOptions{
                .width = 16, .heads = 2, .layers = 1, .attention = cpp_models::Attention::kMatmul});
          },
          [](int64_t size) -> Tensors {
            const auto tokens = torch::randint(90, {size, 2 * size + size % 3}, torch::kLong);
            return {tokens, tokens.flatten()};
          }),
      40);
}

TEST_F(InferredSizes, TrainingAResNet) {
  expect_learns_sizes(training<cpp_models::ResNet>(
                          [] {
                            return cpp_models::ResNet(cpp_models::ResNetOptions{.depth = 8});
                          },
                          [](int64_t size) -> Tensors {
                            return {torch::rand({size, 3, 16, 16}),
                                    torch::randint(10, {size}, torch::kLong)};
                          }),
                      4000);
}

SizedProgram chain(const std::function<torch::Tensor(torch::Tensor y, int64_t size)>& middle) {
  return [=](torch::Device device) -> SizedStep {
    const auto weight = random(device, {8});
    return [=](int64_t size) -> Tensors {
      auto y = torch::rand({size, 8}).to(device) * weight;
      for (int k = 0; k < 16; ++k) y = torch::tanh(y) + weight;
      y = middle(y, size);
      for (int k = 0; k < 16; ++k) y = torch::tanh(y) + weight;
      return {y};
    };
  };
}

TEST_F(InferredSizes, AnotherBranchIsRecorded) {
  Pair pair(chain([](torch::Tensor y, int64_t size) { return size > 20 ? y.exp() : y.sin(); }));
  pair.learn();
  pair.expect_inferred(5);
  const Statistics before = statistics();
  pair.step(21);
  EXPECT_GT(since(before).ops_inferred, 0u);
  EXPECT_GT(since(before).ops_recorded, 0u);
  EXPECT_EQ(since(before).mismatches, 1u);
  pair.expect_inferred(7);
}

TEST_F(InferredSizes, ARead) {
  float lazy_sum = 0;
  Pair pair(chain([&](torch::Tensor y, int64_t size) {
    if (size == 7) lazy_sum = y.sum().item<float>();
    return y * 2;
  }));
  pair.learn();
  pair.step(7);
  EXPECT_NE(lazy_sum, 0);
  pair.expect_inferred(8);
}

TEST_F(InferredSizes, AnErrorOfTheUserIsThrownAtItsLine) {
  for (const bool wide : {false, true}) {
    SCOPED_TRACE(wide);
    reprise::testing::forget_traces();
    std::string messages[2];
    int call = 0;
    Pair pair(chain([&](torch::Tensor y, int64_t size) {
      if (size != 7) return y + torch::ones({size, 8}, y.options());
      try {
        y = y + torch::ones({size + 1, 8}, y.options());
        ADD_FAILURE() << "nothing was thrown";
      } catch (const c10::Error& error) {
        messages[call++ % 2] = error.what_without_backtrace();
      }
      return wide ? y + 1 : y + torch::ones({size, 8}, y.options());
    }));
    pair.learn();
    pair.step(7);
    EXPECT_EQ(messages[0], messages[1]);
    EXPECT_NE(messages[0], "");
    pair.expect_inferred(8);
  }
}

TEST_F(InferredSizes, VectorsThatDoNotFitAreAnErrorAtTheirLine) {
  int caught = 0;
  Pair pair([&](torch::Device device) -> SizedStep {
    return [&, device](int64_t size) -> Tensors {
      const int64_t other = size == 7 ? 8 : size;
      auto a = torch::rand({size}).to(device);
      const auto b = torch::rand({other}).to(device), matrix = torch::rand({3, other}).to(device);
      for (int k = 0; k < 32; ++k) a = torch::tanh(a) + 0.1;
      const auto sum_where_it_fails = [&](const auto& op) {
        try {
          return op();
        } catch (const c10::Error&) {
          ++caught;
          return a.sum();
        }
      };
      return {sum_where_it_fails([&] { return torch::dot(a, b); }),
              sum_where_it_fails([&] { return torch::mv(matrix, a).sum(); })};
    };
  });
  pair.learn();
  pair.step(7);
  EXPECT_EQ(caught, 4);
  pair.expect_inferred(8);
}

TEST_F(InferredSizes, DropoutDropsTheSame) {
  Pair pair(chain([](torch::Tensor y, int64_t) { return torch::dropout(y, 0.4, true); }));
  pair.learn();
  for (const int64_t size : {5, 11, 3, 8}) pair.expect_inferred(size);
}

TEST_F(InferredSizes, FloatsThatFollowFromTheSizeAreInputs) {
  Pair pair(chain([](torch::Tensor y, int64_t size) { return y / std::sqrt(double(size)); }));
  for (const int64_t size : {4, 6, 9, 5, 8}) {
    pair.step(size);
    wait_for_compiles();
  }
  for (const int64_t size : {7, 11, 3}) pair.expect_inferred(size);
}

TEST_F(InferredSizes, StepsThatNobodyMarks) {
  torch::manual_seed(5);
  cpp_models::Mlp eager(cpp_models::MlpOptions{.inputs = 8, .hidden = {16, 16}, .outputs = 5});
  torch::manual_seed(5);
  cpp_models::Mlp lazy(cpp_models::MlpOptions{.inputs = 8, .hidden = {16, 16}, .outputs = 5});
  lazy->to(torch::kLazy);
  eager->to(eager_device());
  torch::optim::Adam eager_adam(eager->parameters(), 1e-3), lazy_adam(lazy->parameters(), 1e-3);
  Statistics before;
  const auto train = [](cpp_models::Mlp& model, torch::optim::Adam& adam, const Tensors& batch,
                        torch::Device device) {
    adam.zero_grad();
    const auto loss = F::cross_entropy(model->forward(batch[0].to(device)), batch[1].to(device));
    loss.backward();
    adam.step();
    return loss.detach();
  };
  for (int step = 0; step < 60; ++step) {
    const int64_t size = 3 + (step * 7) % 61;  // each once
    const Tensors batch{torch::rand({size, 8}), torch::randint(5, {size}, torch::kLong)};
    const auto wanted = train(eager, eager_adam, batch, eager_device());
    const auto got = train(lazy, lazy_adam, batch, torch::kLazy);
    if (step % 10 == 9) expect_close(got, wanted, 40);
    wait_for_compiles();
    if (step == 30) before = statistics();
  }
  mark_step();
  const Statistics did = since(before);
  EXPECT_EQ(did.ops_recorded, 0u) << explain();
  EXPECT_GT(did.segments_replayed + did.programs_checked, 25u) << explain();
  for (size_t k = 0; k < eager->parameters().size(); ++k) {
    expect_close(lazy->parameters()[k], eager->parameters()[k], 40);
  }
}

}  // namespace
}  // namespace reprise::test
