// TorchScript: what is recorded as a script module, and packages inside of one.
#include <torch/script.h>
#include <torch/torch.h>

#include <cstdlib>
#include <filesystem>

#include "cpp_models/gpt.h"
#include "reprise/reprise.h"
#include "tests/child_process.h"
#include "tests/expect_error.h"
#include "tests/sized_steps.h"

namespace reprise::test {
namespace {

class Scripts : public LazySizes {
 protected:
  void SetUp() override {
    LazySizes::SetUp();
    folder_ = make_folder("scripts");
  }
  std::string path(const std::string& name) const { return folder_ + "/" + name; }

  /// The module once it has been a file.
  torch::jit::Module saved(const torch::jit::Module& module) const {
    module.save(path("module.pt"));
    return torch::jit::load(path("module.pt"));
  }

  std::string folder_;
};

torch::nn::Sequential network() {
  torch::manual_seed(2);
  return torch::nn::Sequential(torch::nn::Linear(6, 16), torch::nn::BatchNorm1d(16), torch::nn::GELU(),
                               torch::nn::Linear(16, 3));
}

TEST_F(Scripts, AModuleWithItsWeightsAndNames) {
  auto net = network();
  net->eval();
  net->to(torch::kLazy);
  const auto x = torch::randn({5, 6});
  const auto script = saved(export_torchscript(net, std::tuple(x.to(torch::kLazy)), {"features"}));
  net->to(eager_device());
  torch::NoGradGuard no_grad;
  for (int repeat = 0; repeat < 2; ++repeat) {
    const auto y = torch::randn({5, 6}).to(eager_device());
    auto module = script;
    expect_same_bits(module.forward({y}).toTensor(), net->forward(y));
  }
  std::vector<std::string> names;
  for (const auto& each : script.named_parameters()) names.push_back(each.name);
  EXPECT_NE(std::find(names.begin(), names.end(), "3.weight"), names.end());
  EXPECT_NE(script.get_method("forward").graph()->toString().find("features"), std::string::npos);
}

TEST_F(Scripts, StatisticsOfBatchNormAreGoneOnWith) {
  auto net = network();
  net->to(torch::kLazy);
  const auto x = torch::randn({5, 6});
  torch::NoGradGuard no_grad;
  auto script = saved(export_torchscript(net, std::tuple(x.to(torch::kLazy))));
  net->to(eager_device());
  for (int step = 0; step < 3; ++step) {
    const auto y = torch::randn({5, 6}).to(eager_device());
    expect_same_bits(script.forward({y}).toTensor(), net->forward(y));
  }
  for (const auto& buffer : script.named_buffers()) {
    SCOPED_TRACE(buffer.name);
    expect_same_bits(buffer.value, net->named_buffers()[buffer.name]);
  }
}

TEST_F(Scripts, MarkedSizesMayBeOthers) {
  torch::manual_seed(0);
  cpp_models::Gpt model(cpp_models::GptOptions{.vocabulary = 11, .context = 32, .width = 16, .heads = 2,
                                               .layers = 2, .attention = cpp_models::Attention::kMatmul});
  model->eval();
  model->to(torch::kLazy);
  auto example = torch::randint(11, {2, 8}, torch::kLong).to(torch::kLazy);
  mark_dynamic(example, 0, {.name = "batch"});
  mark_dynamic(example, 1, {.name = "length", .most = 32});
  auto script = saved(export_torchscript(model, std::tuple(example)));
  model->to(eager_device());
  torch::NoGradGuard no_grad;
  for (const auto& [batch, length] : {std::pair(2, 8), std::pair(3, 11), std::pair(5, 32)}) {
    SCOPED_TRACE(c10::str(batch, " x ", length));
    const auto tokens = torch::randint(11, {batch, length}, torch::kLong).to(eager_device());
    expect_same_bits(script.forward({tokens}).toTensor(), model->forward(tokens));
  }
}

/// Lists, numbers, dtypes, views, several results.
TEST_F(Scripts, AFunctionOfSeveralTensors) {
  const auto function = [](const torch::Tensor& x, const torch::Tensor& index) {
    const auto parts = x.split(2, 1);
    const auto joined = torch::cat({parts[1], parts[0] * 2, torch::zeros({3, 1}, x.options())}, 1);
    auto y = joined.clone();
    y.narrow(1, 0, 2).add_(1.5);
    const auto [values, order] = y.sort(1, /*descending=*/true);
    return std::tuple(values.to(torch::kDouble), order, x.index({index, torch::indexing::Slice(1, 3)}),
                      torch::where(y > 0, y, -1.0).t());
  };
  const auto x = torch::randn({3, 4}), index = torch::tensor({2, 0});
  auto script =
      saved(export_torchscript(function, std::tuple(x.to(torch::kLazy), index.to(torch::kLazy))));
  const auto z = torch::randn({3, 4}).to(eager_device()), other = torch::tensor({1, 1}).to(eager_device());
  const auto results = script.forward({z, other}).toTuple()->elements();
  const auto [a, b, c, d] = function(z, other);
  const Tensors expected{a, b, c, d};
  ASSERT_EQ(results.size(), expected.size());
  for (size_t k = 0; k < expected.size(); ++k) expect_same_bits(results[k].toTensor(), expected[k]);
}

TEST_F(Scripts, WhatDrawsRandomNumbersIsAnError) {
  torch::nn::Sequential net(torch::nn::Linear(6, 6), torch::nn::Dropout(0.5));
  net->to(torch::kLazy);
  expect_error([&] { export_torchscript(net, std::tuple(torch::randn({5, 6}).to(torch::kLazy))); },
               "draws random numbers; is the module in training mode?");
}

TEST_F(Scripts, RunInStockPython) {
  const char* python = std::getenv("REPRISE_TEST_PYTHON");
  if (python == nullptr) GTEST_SKIP() << "REPRISE_TEST_PYTHON names no Python";
  if (!eager_device().is_cpu()) GTEST_SKIP() << "the script's tensors are on the CPU";
  const auto weight = torch::full({3}, 4).to(torch::kFloat).to(torch::kLazy);
  auto x = torch::randn({2, 3}).to(torch::kLazy);
  mark_dynamic(x, 0, {.name = "rows"});
  export_torchscript([=](const torch::Tensor& t) { return t * weight + 1; }, std::tuple(x)).save(path("p.pt"));
  const std::string script =
      "import torch\n"
      "module = torch.jit.load('" + path("p.pt") + "')\n"
      "for rows in (2, 7):\n"
      "    y = module(torch.ones(rows, 3))\n"
      "    assert torch.equal(y, torch.full((rows, 3), 5.0)), y\n";
  const Ended ended = run_python(script);
  EXPECT_EQ(ended.status, 0) << ended.output;
}

TEST_F(Scripts, APackageIsSavedInsideOfAModule) {
  auto net = network();
  net->eval();
  net->to(torch::kLazy);
  auto x = torch::randn({5, 6}).to(torch::kLazy);
  mark_dynamic(x, 0, {.name = "batch"});
  export_package(net, std::tuple(x), path("net.pt2"));
  torch::jit::Module module("Served");
  const c10::IValue package = package_for_script(path("net.pt2"));
  module.register_attribute("package", package.type(), package);
  module.define("def forward(self, x):\n  return torch.softmax(self.package.run([x])[0], 1)\n");
  std::filesystem::remove(path("net.pt2"));
  net->to(eager_device());
  torch::NoGradGuard no_grad;
  auto loaded = saved(module);
  for (const int64_t batch : {5, 8}) {
    const auto y = torch::randn({batch, 6}).to(eager_device());
    expect_close(loaded.forward({y}).toTensor(), torch::softmax(net->forward(y), 1), 20);
  }
  const char* python = std::getenv("REPRISE_TEST_PYTHON");
  const char* library = std::getenv("REPRISE_TEST_LIBRARY");
  if (python == nullptr || library == nullptr || !eager_device().is_cpu()) return;
  const auto y = torch::ones({4, 6});
  const double expected = torch::softmax(net->forward(y), 1)[0][0].item<double>();
  const std::string script =
      "import torch\n"
      "torch.ops.load_library('" + std::string(library) + "')\n"
      "y = torch.jit.load('" + path("module.pt") + "')(torch.ones(4, 6))\n"
      "assert y.shape == (4, 3) and abs(y[0, 0].item() - " + std::to_string(expected) + ") < 1e-4, y\n";
  const Ended ended = run_python(script);
  EXPECT_EQ(ended.status, 0) << ended.output;
}

/// Script modules on lazy tensors are captured like any code.
TEST_F(Scripts, AScriptModuleRunsOnTheLazyDevice) {
  torch::jit::Module module("Net");
  module.register_parameter("weight", torch::randn({6, 6}), /*is_buffer=*/false);
  module.define(
      "def forward(self, x):\n"
      "  for k in range(3):\n"
      "    x = torch.tanh(torch.mm(x, self.weight)) + float(k)\n"
      "  return x\n");
  const auto x = torch::randn({4, 6});
  const auto expected = module.forward({x}).toTensor().detach();
  module.to(torch::kLazy);
  torch::NoGradGuard no_grad;
  const Statistics before = statistics();
  for (int repeat = 0; repeat < 6; ++repeat) {
    expect_close(module.forward({x.to(torch::kLazy)}).toTensor(), expected, 10);
    mark_step();
    wait_for_compiles();
  }
  EXPECT_GT(since(before).segments_replayed, 0u) << explain();
  EXPECT_LE(since(before).segments_recorded, 3u) << explain();
}

}  // namespace
}  // namespace reprise::test
