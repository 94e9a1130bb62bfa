// Bad input: libtorch's own error, or one in its style, at the line where eager
// raises it; and the program goes on with values as eager would have.
#include <functional>
#include <limits>
#include <string>

#include "reprise/reprise.h"
#include "reprise/testing.h"
#include "tests/three_ways.h"

namespace reprise::test {
namespace {

using Errors = Lazy;

/// What `function` throws; empty where it throws nothing.
template <class Function>
std::string message_of(const Function& function) {
  try {
    function();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

::testing::AssertionResult holds(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "'" << part << "' is not in: " << text;
}

TEST_F(Errors, DataPtrOfALazyTensorSaysWhatToDo) {
  const auto x = torch::ones({2, 3}).to(torch::kLazy);
  for (int way = 0; way < 2; ++way) {
    const auto y = x * 2;
    for (const auto& tensor : {x, y}) {
      EXPECT_TRUE(holds(message_of([&] { tensor.data_ptr(); }), ".cpu()"));
      EXPECT_TRUE(holds(message_of([&] { tensor.data_ptr<float>(); }), ".cpu()"));
      EXPECT_TRUE(holds(message_of([&] { tensor.const_data_ptr<float>(); }), ".cpu()"));
      EXPECT_TRUE(holds(message_of([&] { tensor.mutable_data_ptr<float>(); }), ".cpu()"));
      EXPECT_NE(message_of([&] { tensor.accessor<float, 2>(); }), "");
    }
    EXPECT_EQ(y.sum().item<float>(), 12.0f);
    mark_step();
  }
}

TEST_F(Errors, MixedDevicesAreNamed) {
  const auto x = torch::ones({3}).to(torch::kLazy);
  const auto host = torch::ones({3});
  for (int way = 0; way < 3; ++way) {
    const auto y = x + 1;
    for (const auto& message :
         {message_of([&] { (void)(y + host); }), message_of([&] { (void)(host * y); }),
          message_of([&] { y.add_(host); }), message_of([&] { (void)torch::cat({y, host}); })}) {
      EXPECT_TRUE(holds(message, "Expected all tensors to be on the same device"));
      EXPECT_TRUE(holds(message, "lazy"));
      EXPECT_TRUE(holds(message, "cpu"));
    }
    EXPECT_NE(message_of([&] { (void)torch::mm(host.view({1, 3}), y.view({3, 1})); }), "");
    EXPECT_NE(message_of([&] { host.add_(y); }), "");
    EXPECT_EQ((y * 2).sum().item<float>(), 12.0f);
    mark_step();
  }
  EXPECT_TRUE(torch::equal(host, torch::ones({3})));
}

TEST_F(Errors, AScalarOfTheHostIsNoMixedDevice) {
  expect_eager_three_ways({random(torch::kCPU, {3})}, [](Tensors& in) -> Tensors {
    return {in[0] * torch::tensor(2.0f), in[0] + torch::tensor(3, torch::kLong),
            torch::tensor(1.5) - in[0]};
  });
}

TEST_F(Errors, AShapeErrorIsRaisedAtItsLineWithEagersWords) {
  const auto step = [](torch::Device device, int k) {
    const auto x = torch::ones({2, 3}).to(device), w = torch::ones({4, 5}).to(device);
    const auto y = x * 2;
    std::string message;
    if (k % 2 == 0) message = message_of([&] { (void)torch::mm(y, w); });
    const auto z = y + 1;
    if (k % 3 == 0) message += message_of([&] { (void)(z + w); });
    EXPECT_EQ(z.sum().item<float>(), 18.0f);
    return message;
  };
  for (int k = 0; k < 8; ++k) {
    const std::string lazy = step(torch::kLazy, k), eager = step(eager_device(), k);
    const auto first_line = [](const std::string& text) { return text.substr(0, text.find('\n')); };
    EXPECT_EQ(first_line(lazy), first_line(eager));
    mark_step();
  }
}

TEST_F(Errors, AShapeErrorInAModelLeavesItsValues) {
  torch::nn::Sequential model(torch::nn::Linear(4, 3), torch::nn::ReLU(), torch::nn::Linear(3, 2));
  torch::nn::Sequential eager(torch::nn::Linear(4, 3), torch::nn::ReLU(), torch::nn::Linear(3, 2));
  {
    torch::NoGradGuard no_grad;
    for (size_t k = 0; k < 4; ++k) eager->parameters()[k].copy_(model->parameters()[k]);
  }
  model->to(torch::kLazy);
  eager->to(eager_device());
  for (int k = 0; k < 6; ++k) {
    const auto x = torch::full({2, k == 3 ? 5 : 4}, 0.5f);
    torch::Tensor lazy_out, eager_out;
    const auto lazy = message_of([&] { lazy_out = model->forward(x.to(torch::kLazy)); });
    const auto message = message_of([&] { eager_out = eager->forward(x.to(eager_device())); });
    EXPECT_EQ(lazy.substr(0, lazy.find('\n')), message.substr(0, message.find('\n')));
    EXPECT_EQ(lazy.empty(), k != 3);
    if (k != 3) expect_same_bits(lazy_out.detach(), eager_out.detach());
    mark_step();
  }
}

TEST_F(Errors, AFailedInPlaceOpChangesNothing) {
  const auto x = torch::ones({3}).to(torch::kLazy);
  for (int k = 0; k < 4; ++k) {
    x.add_(1);
    EXPECT_NE(message_of([&] { x.add_(torch::ones({5}, torch::kLazy)); }), "");
    EXPECT_NE(message_of([&] { x.resize_({-3}); }), "");
    EXPECT_NE(message_of([&] { (void)x.view({7}); }), "");
    EXPECT_NE(message_of([&] { (void)x.select(0, 9); }), "");
    EXPECT_EQ(x.sum().item<float>(), 3.0f * static_cast<float>(k + 2));
    mark_step();
  }
}

TEST_F(Errors, ADtypeThatTheBackingDeviceCannotDo) {
  const auto bits = torch::ones({3}, torch::kInt).to(torch::kLazy);
  const auto flags = torch::ones({3}, torch::kBool).to(torch::kLazy);
  for (int k = 0; k < 3; ++k) {
    const auto y = bits + 1;
    EXPECT_NE(message_of([&] { (void)(flags - flags); }), "");
    EXPECT_NE(message_of([&] { y.div_(2); }), "");
    EXPECT_NE(message_of([&] { (void)torch::linalg_inv(bits.view({3, 1})); }), "");
    EXPECT_EQ(y.sum().item<int>(), 6);
    mark_step();
  }
}

TEST_F(Errors, ASingularMatrixIsOneInAnyStep) {
  for (const bool compiled : {false, true}) {
    begin_test(compiled);
    const auto step = [](const torch::Tensor& matrix) {
      auto y = torch::linalg_inv(matrix);
      for (int k = 0; k < 20; ++k) y = y.sin() + 0.25;
      return y.sum().item<float>();
    };
    for (int k = 0; k < 12; ++k) {
      const auto matrix = torch::eye(3) * (k + 1), singular = torch::zeros({3, 3});
      EXPECT_NEAR(step(matrix.to(torch::kLazy)), step(matrix), 1e-3);
      EXPECT_TRUE(holds(message_of([&] { step(singular.to(torch::kLazy)); }), "singular"));
      EXPECT_TRUE(holds(message_of([&] { (void)torch::linalg_cholesky(singular.to(torch::kLazy)); }),
                        "positive-definite"));
      mark_step();
      wait_for_compiles();
    }
  }
}

/// A number that changes is an input of a program; one that eager refuses never gets there.
TEST_F(Errors, ANumberThatADtypeCannotHoldIsRefusedAtItsLine) {
  const auto run = [](torch::Device device, double factor) {
    const auto whole = torch::zeros({3}, torch::TensorOptions(device).dtype(torch::kByte));
    const auto half = torch::zeros({3}, torch::TensorOptions(device).dtype(torch::kHalf));
    std::vector<std::string> said;
    const auto note = [&](const std::function<torch::Tensor()>& call) {
      torch::Tensor made;
      const std::string message = message_of([&] { made = call(); });
      said.push_back(message.substr(0, message.find('\n')));
      if (made.defined()) said.back() += c10::str(made.to(torch::kCPU, torch::kDouble));
    };
    for (int k = 0; k < 8; ++k) {
      note([&] { return whole.clone().fill_(50 * k); });
      note([&] { return whole.clone().fill_(50 * factor * k); });
      note([&] { return torch::full({2}, -20 * k, whole.options()); });
      note([&] { return whole.masked_fill(whole == 0, 100 - 60 * k); });
      note([&] { return half.clone().fill_(20000 * k); });
      if (device.is_lazy()) mark_step();
    }
    return said;
  };
  for (const bool compile : {false, true}) {
    begin_test(compile);
    const auto lazy = run(torch::kLazy, 1.5), eager = run(eager_device(), 1.5);
    for (size_t k = 0; k < eager.size(); ++k) EXPECT_EQ(lazy[k], eager[k]) << "call " << k;
  }
}

TEST_F(Errors, AStorageThatIsTooSmallIsNotTaken) {
  auto a = torch::ones({4}).to(torch::kLazy), b = torch::empty({0}, a.options());
  EXPECT_TRUE(holds(message_of([&] { b.set_(a.storage(), 0, {1000}, {1}); }), "needs a storage of 4000 bytes and got one of 16"));
  EXPECT_TRUE(holds(message_of([&] { b.set_(a.storage(), 3, {2}, {1}); }), "needs a storage of 20 bytes"));
  EXPECT_TRUE(holds(message_of([&] { b.set_(a.storage(), -1, {2}, {1}); }), "there is no such tensor"));
  EXPECT_EQ(b.numel(), 0);
  b.set_(a.storage(), 2, {2}, {1});
  b.zero_();
  EXPECT_EQ(a.sum().item<float>(), 2.0F);
}

TEST_F(Errors, AnOpThatTheBackingDeviceDoesNotHaveIsNamed) {
  if (!eager_device().is_cpu()) GTEST_SKIP() << "an op of CUDA's alone is used";
  const auto x = torch::ones({2, 3}).to(torch::kLazy);
  for (int k = 0; k < 3; ++k) {
    const auto y = x * 2;
    const auto message = message_of([&] { (void)torch::_cslt_compress(y); });
    EXPECT_NE(message, "");
    EXPECT_TRUE(holds(message, "_cslt_compress"));
    EXPECT_EQ(y.sum().item<float>(), 12.0f);
    mark_step();
  }
}

TEST_F(Errors, TwoViewsThatAreAlikeAreTwoTensors) {
  const auto message = [](torch::Device device) {
    const auto x = torch::zeros({0}, device) * 2;
    const auto index = torch::zeros({1}, torch::kLong).to(device);
    return message_of([&] { x.index_put_({index}, x.view({-1}).slice(0, 0, 1)); });
  };
  const auto eager = message(eager_device());
  EXPECT_TRUE(holds(eager, "out of bounds")) << eager;
  for (const bool paused : {false, true}) {
    if (paused) reprise::testing::pause_recording(std::numeric_limits<uint32_t>::max());
    EXPECT_TRUE(holds(message(torch::kLazy), "out of bounds"));
  }
  reprise::testing::pause_recording(0);
}

TEST_F(Errors, AnIndexOutOfRangeIsRaisedAtItsLineWhileRecording) {
  torch::nn::Embedding table(5, 2);
  table->to(torch::kLazy);
  const auto good = torch::tensor({0, 4}).to(torch::kLazy);
  const auto bad = torch::tensor({0, 9}).to(torch::kLazy);
  if (!eager_device().is_cpu()) GTEST_SKIP() << "an assertion in a CUDA kernel ends the process";
  EXPECT_NE(message_of([&] { (void)table->forward(bad); }), "");
  EXPECT_EQ(table->forward(good).size(0), 2);
}

TEST_F(Errors, AnIndexOutOfRangeInAVerifiedStepIsRaisedWhenItRuns) {
  if (!eager_device().is_cpu()) GTEST_SKIP() << "an assertion in a CUDA kernel ends the process";
  for (const bool compile : {false, true}) {
    SCOPED_TRACE(compile);
    begin_test(compile);
    const auto table = torch::arange(10, torch::kLazy).to(torch::kFloat).view({5, 2});
    const auto step = [&](const torch::Tensor& index) {
      const auto rows = torch::embedding(table, index.to(torch::kLazy));
      return rows * 2 + 1;
    };
    for (int k = 0; k < 3; ++k) {
      EXPECT_EQ(step(torch::tensor({0, 4})).sum().item<float>(), 40.0f);
      mark_step();
      wait_for_compiles();
    }
    {
      torch::Tensor y;
      const auto message = message_of([&] {
        y = step(torch::tensor({0, 9}));
        mark_step();
      });
      EXPECT_NE(message, "");
      // What was not made cannot be read, and says why.
      if (y.defined()) {
        EXPECT_NE(message_of([&] { (void)y.cpu(); }), "");
        EXPECT_NE(message_of([&] { (void)(y + 1).cpu(); }), "");
      }
    }
    for (int k = 0; k < 3; ++k) {
      EXPECT_EQ(step(torch::tensor({1, 2})).sum().item<float>(), 32.0f);
      mark_step();
    }
  }
}

TEST_F(Errors, AnErrorInAVerifiedStepKeepsWhatCameBefore) {
  if (!eager_device().is_cpu()) GTEST_SKIP() << "an assertion in a CUDA kernel ends the process";
  const auto table = torch::arange(10, torch::kLazy).to(torch::kFloat).view({5, 2});
  const auto counter = torch::zeros({1}, torch::kLazy);
  float expected = 0;
  for (int k = 0; k < 6; ++k) {
    const auto index = torch::tensor({0, k == 3 ? 7 : 1}).to(torch::kLazy);
    const auto message = message_of([&] {
      counter.add_(1);
      const auto rows = torch::embedding(table, index);
      counter.add_(rows.sum());
      mark_step();
    });
    EXPECT_EQ(message.empty(), k != 3);
    expected += k == 3 ? 1 : 7;
    EXPECT_EQ(counter.item<float>(), expected) << k;
  }
}

TEST_F(Errors, AnExceptionInAHookLeavesTheProgramUsable) {
  for (int k = 0; k < 4; ++k) {
    auto x = torch::ones({3}).to(torch::kLazy).requires_grad_();
    const auto y = x * 2;
    if (k % 2 == 1) {
      y.register_hook([](const torch::Tensor&) -> torch::Tensor {
        throw std::runtime_error("the user's own");
      });
    }
    const auto message = message_of([&] { y.exp().sum().backward(); });
    EXPECT_EQ(message.empty(), k % 2 == 0) << message;
    if (k % 2 == 0) {
      expect_close(x.grad(), torch::full({3}, 2 * std::exp(2.0f)));
    }
    EXPECT_EQ(y.sum().item<float>(), 6.0f);
    mark_step();
  }
}

TEST_F(Errors, BackwardOfNothingIsLibtorchsError) {
  const auto x = torch::ones({3}).to(torch::kLazy);
  EXPECT_TRUE(holds(message_of([&] { x.sum().backward(); }), "does not require grad"));
  auto w = torch::ones({3}).to(torch::kLazy).requires_grad_();
  EXPECT_TRUE(holds(message_of([&] { (w * 2).backward(); }), "scalar"));
  const auto y = w.exp().sum();
  y.backward();
  EXPECT_TRUE(holds(message_of([&] { y.backward(); }), "second time"));
}

TEST_F(Errors, ItemOfManyNumbersIsLibtorchsError) {
  const auto x = torch::ones({3}).to(torch::kLazy);
  for (int k = 0; k < 2; ++k) {
    EXPECT_NE(message_of([&] { (void)(x * 2).item<float>(); }), "");
    EXPECT_EQ((x * 2)[1].item<float>(), 2.0f);
    mark_step();
  }
}

/// PyTorch's Python puts kernels of its own in place of libtorch's when it compiles in this
/// process; none of them is to be seen.
TEST_F(Errors, OfViewsInPlaceAreEagersAlsoBesideACompiler) {
  expect_eager_three_ways({torch::rand({3, 4})}, [](Tensors& in) -> Tensors {
    return {(in[0] * 0.40625).cos() + 1};  // an artifact of its own
  });
  const auto message = [](torch::Tensor tensor) -> std::string {
    try {
      tensor.t_();
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    return "";
  };
  const std::string eager = message(torch::ones({2, 3, 4}, eager_device()));
  EXPECT_NE(eager, "");
  EXPECT_EQ(message(torch::ones({2, 3, 4}, torch::kLazy)), eager);
}

}  // namespace
}  // namespace reprise::test
