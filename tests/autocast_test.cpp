// `torch::autocast` for the backing device's type: eager's dtypes, and its bits where
// the same kernels run.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "cpp_models/gpt.h"
#include "cpp_models/lstm_lm.h"
#include "cpp_models/resnet.h"
#include "reprise/reprise.h"
#include "tests/three_ways.h"

namespace reprise::test {
namespace {

namespace F = torch::nn::functional;
using Autocast = Lazy;

/// What `torch.autocast` does in Python; libtorch has no class for it.
class AutocastGuard {
 public:
  explicit AutocastGuard(bool enabled = true)
      : type_(eager_device().type()), outer_(at::autocast::is_autocast_enabled(type_)) {
    at::autocast::set_autocast_enabled(type_, enabled);
    at::autocast::increment_nesting();
  }
  ~AutocastGuard() {
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(type_, outer_);
  }
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  const c10::DeviceType type_;
  const bool outer_;
};

/// bfloat16 keeps 8 bits: compiled values may be a few units off.
constexpr Ways kCast = {.tolerance = 4};
/// Of float32 numbers that bfloat16 ones go into: fused, those are not rounded.
constexpr double kFromCast = 4000;

TEST_F(Autocast, CastsWhatEagerCasts) {
  const Tensors inputs = {torch::randn({4, 4}), torch::randn({4, 4}), torch::rand({4, 4}) + 0.5};
  expect_eager_three_ways(inputs, [](Tensors& x) -> Tensors {
    const AutocastGuard autocast;
    return {
        torch::mm(x[0], x[1]),                      // the lower precision
        torch::addmm(x[0], x[1], x[2]),
        torch::linear(x[0], x[1], x[2][0]),
        torch::matmul(x[0], x[1].t()),
        torch::prod(x[2]),                          // float32
        torch::mm(x[0].to(torch::kDouble), x[1].to(torch::kDouble)),  // left alone
        torch::tanh(x[0]),                          // no policy
    };
  }, kCast);
}

TEST_F(Autocast, CastsUpAsEagerDoes) {
  const Tensors inputs = {torch::randn({4, 4}), torch::randn({4, 4})};
  expect_eager_three_ways(inputs, [](Tensors& x) -> Tensors {
    const AutocastGuard autocast;
    const auto low = x[1].to(torch::kBFloat16);
    return {
        torch::cat({x[0], low}),  // the widest
        torch::stack({low, x[0]}),
        torch::mse_loss(x[0].to(torch::kBFloat16), low),  // float32
        torch::nll_loss(low, torch::arange(4, low.options().dtype(torch::kLong))),
    };
  }, {.tolerance = kFromCast});
}

TEST_F(Autocast, EndsWithItsRegionAndNests) {
  const Tensors inputs = {torch::randn({4, 4}), torch::randn({4, 4})};
  expect_eager_three_ways(inputs, [](Tensors& x) -> Tensors {
    Tensors out = {torch::mm(x[0], x[1])};
    {
      const AutocastGuard on;
      out.push_back(torch::mm(x[0], x[1]));
      {
        const AutocastGuard off(/*enabled=*/false);
        out.push_back(torch::mm(x[0], x[1]));
      }
      out.push_back(torch::mm(x[1], x[0]));
    }
    out.push_back(torch::mm(x[1], x[0]));
    return out;
  }, kCast);
}

TEST_F(Autocast, TakesTheDtypeThatWasSet) {
  if (!eager_device().is_cpu()) GTEST_SKIP() << "half is the default on a GPU";
  const Tensors inputs = {torch::randn({4, 4}), torch::randn({4, 4})};
  at::autocast::set_autocast_dtype(torch::kCPU, torch::kHalf);
  expect_eager_three_ways(inputs, [](Tensors& x) -> Tensors {
    const AutocastGuard autocast;
    return {torch::mm(x[0], x[1])};
  }, kCast);
  at::autocast::set_autocast_dtype(torch::kCPU, torch::kBFloat16);
}

TEST_F(Autocast, RefusesWhatEagerRefuses) {
  if (!eager_device().is_cuda()) GTEST_SKIP() << "only CUDA's table bans an op";
  const AutocastGuard autocast;
  const auto x = torch::rand({3}, torch::kLazy);
  EXPECT_THROW(torch::binary_cross_entropy(x, x), c10::Error);
}

/// A weight that serves several times is cast once: its gradients are added in the
/// lower precision. Casts that were kept end with the region, so updates are seen.
TEST_F(Autocast, CastsAWeightOnceInARegion) {
  expect_eager_three_ways([](torch::Device device) -> Step {
    const auto x = random(device, {3, 4}), w = random(device, {4, 4}).requires_grad_();
    return [=](int) -> Tensors {
      w.mutable_grad().reset();
      torch::Tensor loss;
      {
        const AutocastGuard autocast;
        auto y = x;
        for (int k = 0; k < 4; ++k) y = torch::tanh(torch::mm(y, w));
        loss = y.to(torch::kFloat).square().sum();
      }
      loss.backward();
      torch::NoGradGuard no_grad;
      w.sub_(w.grad() * 0.01);
      return {loss.detach(), w.grad().clone(), w.detach().clone()};
    };
  }, {.tolerance = kFromCast});
}

template <class Model>
void expect_training(const std::function<Model()>& make, const torch::Tensor& input,
                     const torch::Tensor& target, const Ways& ways) {
  expect_eager_three_ways([&](torch::Device device) -> Step {
    Model model = make();
    model->to(device);
    const auto x = input.to(device), y = target.to(device);
    auto optimizer = std::make_shared<torch::optim::SGD>(
        model->parameters(), torch::optim::SGDOptions(1e-4).momentum(0.9));
    return [=](int) mutable -> Tensors {
      optimizer->zero_grad();
      torch::Tensor loss;
      {
        const AutocastGuard autocast;
        loss = F::cross_entropy(model->forward(x).flatten(0, -2), y);
      }
      loss.backward();
      optimizer->step();
      return joined({loss.detach()}, gradients_of(*model));
    };
  }, ways);
}

// Its batch norms of a few bfloat16 numbers magnify every rounding that a fused kernel saves.
TEST_F(Autocast, TrainsResNet) {
  expect_training<cpp_models::ResNet>(
      [] {
        return cpp_models::ResNet(
            cpp_models::ResNetOptions{.channels = 3, .classes = 4, .depth = 8, .width = 4});
      },
      torch::randn({4, 3, 8, 8}), torch::randint(4, {4}, torch::kLong),
      {.repeats_at = 2, .compiled = false});
}

TEST_F(Autocast, TrainsLstm) {
  expect_training<cpp_models::LstmLm>(
      [] {
        return cpp_models::LstmLm(
            cpp_models::LstmLmOptions{.vocabulary = 9, .embedding = 6, .hidden = 8, .layers = 2});
      },
      torch::randint(9, {3, 5}, torch::kLong), torch::randint(9, {15}, torch::kLong),
      {.repeats_at = 2, .tolerance = kFromCast});
}

TEST_F(Autocast, TrainsGpt) {
  for (const auto attention : {cpp_models::Attention::kMatmul, cpp_models::Attention::kFused}) {
    expect_training<cpp_models::Gpt>(
        [&] {
          return cpp_models::Gpt(cpp_models::GptOptions{.vocabulary = 11, .context = 8,
                                                        .width = 16, .heads = 2, .layers = 1,
                                                        .attention = attention});
        },
        torch::randint(11, {2, 8}, torch::kLong), torch::randint(11, {16}, torch::kLong),
        {.repeats_at = 2, .tolerance = kFromCast});
  }
}

}  // namespace
}  // namespace reprise::test
