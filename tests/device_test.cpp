// What a program does to get its tensors to the lazy device and back.
#include <limits>
#include <sstream>

#include "reprise/reprise.h"
#include "reprise/testing.h"
#include "tests/expect_error.h"
#include "tests/three_ways.h"

namespace reprise::test {
namespace {

using Device = Lazy;

TEST_F(Device, WhatIsOnTheDeviceIsNotCopiedToIt) {
  const auto x = torch::ones({3}).to(torch::kLazy);
  EXPECT_EQ(x.device(), torch::Device(torch::kLazy, 0));
  EXPECT_TRUE(x.to(torch::kLazy).is_same(x));
  EXPECT_TRUE(x.to(torch::Device("lazy:0")).is_same(x));
  torch::nn::Linear model(3, 3);
  model->to(torch::kLazy);
  const auto before = model->weight.storage().unsafeGetStorageImpl();
  model->to(torch::kLazy);
  EXPECT_EQ(model->weight.storage().unsafeGetStorageImpl(), before);
}

TEST_F(Device, ArithmeticIsEagers) {
  expect_eager_three_ways({random(torch::kCPU, {4, 5}), random(torch::kCPU, {5})},
                          [](Tensors& in) -> Tensors {
                            return {in[0] * 2 + in[1], torch::relu(in[0] - 0.5), in[0].sum(1)};
                          });
}

TEST_F(Device, TensorsSayWhereTheyLive) {
  const auto x = torch::ones({2, 3}).to(torch::kLazy);
  EXPECT_TRUE(x.is_lazy());
  EXPECT_EQ(x.device().type(), torch::kLazy);
  const auto y = torch::zeros({2}, torch::kLazy);
  EXPECT_EQ((x.sum(0)[0] + y).device(), x.device());
  EXPECT_EQ(x.to(torch::kCPU).device().type(), torch::kCPU);
  EXPECT_EQ(torch::empty_like(x).device(), x.device());
  EXPECT_EQ(torch::zeros({2}, x.options()).device(), x.device());
}

TEST_F(Device, ItsKindIsChosenBeforeItIsUsed) {
  const auto before = backing_device();
  const auto some = torch::ones({2}).to(torch::kLazy);
  set_backing_device(before);
  EXPECT_EQ(backing_device(), before);
  EXPECT_EQ((torch::ones({2}, torch::kLazy) + some).sum().item<float>(), 4.0f);
  expect_error<c10::ValueError>([] { set_backing_device(torch::kMeta); }, "cpu, cuda or cuda:i, not meta");
  expect_error<c10::ValueError>([] { set_backing_device({torch::kCUDA, 100}); }, "there is no cuda:100 here");
  if (torch::cuda::is_available()) {
    const auto other = before.is_cpu() ? torch::kCUDA : torch::kCPU;
    expect_error([&] { set_backing_device(other); }, "lazy tensors were made already");
  }
  if (!before.is_cuda() || torch::cuda::device_count() < 2) return;
  set_backing_device({torch::kCUDA, 1});
  EXPECT_EQ(torch::ones({2}, torch::kLazy).device().index(), 1);
  set_backing_device(before);
}

TEST_F(Device, FactoriesMakeLazyTensors) {
  expect_eager_three_ways([](torch::Device device) -> Step {
    const auto on = torch::TensorOptions(device);
    return [=](int) -> Tensors {
      return {torch::zeros({2, 3}, on),
              torch::ones({3}, on.dtype(torch::kLong)),
              torch::full({2}, 1.5, on),
              torch::arange(0, 7, 2, on),
              torch::linspace(0, 1, 5, on),
              torch::eye(3, on),
              torch::tensor({1.0f, 2.0f}, on),
              torch::scalar_tensor(4.0, on),
              torch::tril(torch::ones({3, 3}, on))};
    };
  });
}

TEST_F(Device, WhatIsLikeALazyTensorIsMadeWhereItIsAsked) {
  const auto x = torch::arange(6).view({2, 3}).to(torch::kFloat).to(torch::kLazy);
  const auto y = x + 1;  // pending
  for (int round = 0; round < 6; ++round) {
    SCOPED_TRACE(round);
    if (round == 4) reprise::testing::pause_recording(std::numeric_limits<uint32_t>::max());
    const Tensors host{torch::zeros_like(y, torch::kCPU), torch::full_like(x, 2, torch::kCPU),
                       torch::empty_like(x, torch::kCPU).fill_(3),
                       x.new_ones({2}, torch::TensorOptions(torch::kCPU)),
                       torch::rand_like(x, torch::kCPU)};
    const Tensors lazy{torch::zeros_like(x), torch::full_like(x, 2, torch::kLazy),
                       torch::empty_like(x, x.device()).fill_(3), x.new_ones({2})};
    for (const auto& tensor : host) {
      ASSERT_TRUE(tensor.device().is_cpu());
      EXPECT_NE(tensor.data_ptr(), nullptr);
    }
    for (size_t k = 0; k < lazy.size(); ++k) {
      ASSERT_TRUE(lazy[k].device().is_lazy());
      EXPECT_TRUE(lazy[k].cpu().equal(host[k]));
    }
    mark_step();
  }
  reprise::testing::pause_recording(0);
}

TEST_F(Device, AModuleGoesThereAndBack) {
  torch::nn::Sequential model(torch::nn::Linear(4, 8), torch::nn::BatchNorm1d(8),
                              torch::nn::Linear(8, 2));
  const Tensors before = state_of(*model);
  Tensors copies;
  for (const auto& tensor : before) copies.push_back(tensor.detach().clone());
  model->to(torch::kLazy);
  for (const auto& parameter : model->parameters()) {
    EXPECT_TRUE(parameter.is_lazy());
    EXPECT_TRUE(parameter.is_leaf());
    EXPECT_TRUE(parameter.requires_grad());
  }
  // As on any device the parameter objects stay: an optimizer made before knows them.
  EXPECT_TRUE(model->parameters()[0].is_same(before[0]));
  model->to(torch::kCPU);
  const Tensors after = state_of(*model);
  for (size_t k = 0; k < after.size(); ++k) {
    EXPECT_EQ(after[k].device().type(), torch::kCPU);
    EXPECT_TRUE(torch::equal(after[k], copies[k]));
  }
}

TEST_F(Device, AModuleChangesItsDtypeThere) {
  torch::nn::Linear model(3, 2);
  const auto weight = model->weight.detach().clone();
  model->to(torch::kLazy);
  model->to(torch::kDouble);
  EXPECT_EQ(model->weight.scalar_type(), torch::kDouble);
  EXPECT_TRUE(model->weight.is_lazy());
  EXPECT_TRUE(torch::equal(model->weight.cpu(), weight.to(torch::kDouble)));
}

class NetImpl : public torch::nn::Cloneable<NetImpl> {
 public:
  NetImpl() { reset(); }
  void reset() override {
    linear_ = register_module("linear", torch::nn::Linear(3, 3));
    scale_ = register_buffer("scale", torch::ones({3}));
  }
  torch::Tensor forward(const torch::Tensor& x) { return linear_->forward(x) * scale_; }

 private:
  torch::nn::Linear linear_{nullptr};
  torch::Tensor scale_;
};
TORCH_MODULE(Net);

TEST_F(Device, ADeepCopyOfAModuleIsIndependent) {
  Net net;
  net->to(torch::kLazy);
  auto copy = std::dynamic_pointer_cast<NetImpl>(net->clone());
  const auto x = torch::ones({1, 3}).to(torch::kLazy);
  const auto before = net->forward(x).detach().cpu();
  EXPECT_TRUE(torch::equal(copy->forward(x).detach().cpu(), before));
  {
    torch::NoGradGuard no_grad;
    copy->parameters()[0].zero_();
  }
  EXPECT_TRUE(copy->parameters()[0].is_lazy());
  EXPECT_TRUE(torch::equal(net->forward(x).detach().cpu(), before));
  EXPECT_FALSE(torch::equal(copy->forward(x).detach().cpu(), before));
}

TEST_F(Device, ADeepCopyGoesToTheDevice) {
  Net net;
  const auto copy = net->clone(torch::Device(torch::kLazy));
  EXPECT_TRUE(copy->parameters()[0].is_lazy());
  EXPECT_FALSE(net->parameters()[0].is_lazy());
}

TEST_F(Device, ACloneDoesNotSeeLaterWrites) {
  expect_eager_three_ways({random(torch::kCPU, {6})}, [](Tensors& in) -> Tensors {
    const auto y = in[0] * 2;
    const auto copy = y.clone();
    y.add_(1);
    return {copy, y};
  });
}

TEST_F(Device, ValuesAreReadOfPendingTensors) {
  for (int way = 0; way < 3; ++way) {  // recorded, then verified
    const auto x = torch::full({3}, 2.0).to(torch::kLazy);
    const auto y = x * x;
    EXPECT_EQ(y.sum().item<float>(), 12.0f);
    EXPECT_TRUE(torch::equal(y.cpu(), torch::full({3}, 4.0)));
    EXPECT_TRUE(y.equal(x + x));
    EXPECT_TRUE(torch::allclose(y, x + x));
    EXPECT_FALSE((y > 5).any().item<bool>());
    EXPECT_TRUE(static_cast<bool>((y > 3).all().item<bool>()));
    EXPECT_EQ(y.argmax().item<int64_t>(), 0);
    mark_step();
  }
}

TEST_F(Device, TensorsArePrinted) {
  const auto print = [](const torch::Tensor& tensor) {
    std::ostringstream out;
    out << tensor;
    return out.str();
  };
  const auto x = torch::tensor({1.5f, -2.0f}).to(torch::kLazy);
  for (int way = 0; way < 2; ++way) {
    const std::string text = print(x * 2);
    EXPECT_NE(text.find(" 3"), std::string::npos) << text;
    EXPECT_NE(text.find("-4"), std::string::npos) << text;
    EXPECT_NE(text.find("Lazy"), std::string::npos) << text;
    mark_step();
  }
  EXPECT_NE(print(torch::zeros({}, torch::kLazy)).find("0"), std::string::npos);
  std::ostringstream module;
  torch::nn::Linear linear(2, 3);
  linear->to(torch::kLazy);
  module << linear;
  EXPECT_NE(module.str().find("Linear"), std::string::npos);
}

TEST_F(Device, ACopyIntoALazyTensorIsSeen) {
  const auto x = torch::zeros({4}, torch::kLazy);
  for (int way = 0; way < 3; ++way) {
    const auto y = x + 1;
    x.copy_(torch::full({4}, static_cast<float>(way)));
    EXPECT_EQ(y.sum().item<float>(), way == 0 ? 4.0f : 4.0f * static_cast<float>(way));
    EXPECT_EQ(x.sum().item<float>(), 4.0f * static_cast<float>(way));
    mark_step();
  }
}

TEST_F(Device, ACopyFromTheHostIsNotAliased) {
  const auto host = torch::ones({3});
  const auto lazy = host.to(torch::kLazy);
  host.add_(1);
  EXPECT_TRUE(torch::equal(lazy.cpu(), torch::ones({3})));
  lazy.mul_(5);
  EXPECT_TRUE(torch::equal(host, torch::full({3}, 2.0)));
  const auto back = lazy.cpu();
  lazy.add_(1);
  EXPECT_TRUE(torch::equal(back, torch::full({3}, 5.0)));
}

TEST_F(Device, ACpuTensorIsFilledFromALazyOne) {
  const auto x = torch::arange(6, torch::kLazy).view({2, 3});
  const auto host = torch::empty({3, 2}, torch::kLong);
  host.copy_(x.t() * 2);
  EXPECT_TRUE(torch::equal(host, torch::arange(6).view({2, 3}).t() * 2));
}

TEST_F(Device, NonBlockingCopiesAreRight) {
  const auto x = torch::arange(8).to(torch::kLazy, torch::kFloat, /*non_blocking=*/true);
  EXPECT_TRUE(torch::equal((x * 2).to(torch::kCPU, /*non_blocking=*/true),
                           torch::arange(8).to(torch::kFloat) * 2));
}

TEST_F(Device, ToALazyDtypeIsPartOfTheStep) {
  expect_eager_three_ways({random(torch::kCPU, {3, 3})}, [](Tensors& in) -> Tensors {
    const auto twice = in[0].to(torch::kDouble) * 2;
    return {twice, twice.to(torch::kInt), in[0].to(in[0].options())};
  });
}

TEST_F(Device, AModuleIsSavedFromTheHostAndLoadedIntoALazyOne) {
  // libtorch's unpickler knows no lazy device (unpickler.cpp, 2.11), so that
  // what is saved must lie on the host.
  torch::nn::Linear model(3, 2), other(3, 2);
  std::stringstream file;
  model->to(torch::kLazy);
  const auto weight = model->weight.detach().cpu();
  model->to(torch::kCPU);
  torch::save(model, file);
  other->to(torch::kLazy);
  torch::load(other, file);
  EXPECT_TRUE(torch::equal(other->weight.cpu(), weight));
}

TEST_F(Device, MarkStepWithNothingToDoIsHarmless) {
  const Statistics before = statistics();
  for (int k = 0; k < 3; ++k) mark_step();
  sync();
  EXPECT_EQ(since(before).segments_recorded, 0u);
  EXPECT_EQ(since(before).segments_interpreted, 0u);
}

TEST_F(Device, StorageIsSharedAndCounted) {
  const auto x = torch::zeros({4}, torch::kLazy);
  const auto y = x.view({2, 2});
  EXPECT_TRUE(x.is_alias_of(y));
  EXPECT_EQ(x.storage().nbytes(), 16u);
  EXPECT_EQ((x + 1).storage().nbytes(), 16u);
}

}  // namespace
}  // namespace reprise::test
