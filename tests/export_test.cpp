// Packages for programs that have neither Python nor Reprise.
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/torch.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <filesystem>

#include "cpp_models/gpt.h"
#include "tests/child_process.h"
#include "tests/expect_error.h"
#include "tests/sized_steps.h"

namespace reprise::test {
namespace {

class Exports : public LazySizes {
 protected:
  void SetUp() override {
    LazySizes::SetUp();
    folder_ = std::filesystem::temp_directory_path() / ("reprise-exports-" + std::to_string(::getpid()));
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  bool empty() const { return std::filesystem::is_empty(folder_); }

  std::filesystem::path folder_;
};

Tensors on_device(Tensors tensors, torch::Device device) {
  for (torch::Tensor& tensor : tensors) tensor = tensor.to(device);
  return tensors;
}

Tensors run(const std::string& path, const Tensors& inputs) {
  torch::inductor::AOTIModelPackageLoader loader(path);
  return loader.run(on_device(inputs, eager_device()));
}

torch::Tensor lazy(torch::IntArrayRef sizes) { return torch::randn(sizes).to(torch::kLazy); }

TEST_F(Exports, AModuleWithItsWeights) {
  torch::nn::Sequential net(torch::nn::Linear(6, 16), torch::nn::BatchNorm1d(16), torch::nn::GELU(),
                            torch::nn::Linear(16, 3));
  net->eval();
  const auto x = torch::randn({5, 6});
  torch::NoGradGuard no_grad;
  const auto expected = net->forward(x);
  net->to(torch::kLazy);
  export_package(net, std::tuple(x.to(torch::kLazy)), path("net.pt2"));
  net->to(torch::kCPU);
  for (auto& parameter : net->parameters()) parameter.zero_();  // the package has its own
  expect_close(run(path("net.pt2"), {x}).at(0), expected, 50);
  const auto y = torch::randn({5, 6});
  EXPECT_FALSE(torch::allclose(run(path("net.pt2"), {y}).at(0).cpu(), expected));
}

TEST_F(Exports, MarkedSizesMayBeOthers) {
  torch::manual_seed(0);
  cpp_models::Gpt model(cpp_models::GptOptions{.vocabulary = 11, .context = 32, .width = 16, .heads = 2,
                                               .layers = 2, .attention = cpp_models::Attention::kMatmul});
  model->eval();
  torch::NoGradGuard no_grad;
  std::vector<std::pair<torch::Tensor, torch::Tensor>> samples;
  for (const auto& [batch, length] : {std::pair(2, 8), std::pair(3, 11), std::pair(5, 32), std::pair(4, 6)}) {
    const auto tokens = torch::randint(11, {batch, length}, torch::kLong);
    samples.emplace_back(tokens, model->forward(tokens));
  }
  model->to(torch::kLazy);
  auto example = samples[0].first.to(torch::kLazy);
  mark_dynamic(example, 0, {.name = "batch"});
  mark_dynamic(example, 1, {.name = "length", .most = 32});
  export_package(model, std::tuple(example), path("gpt.pt2"), {.input_names = {"tokens"}});
  torch::inductor::AOTIModelPackageLoader loader(path("gpt.pt2"));
  for (const auto& [tokens, logits] : samples) {
    SCOPED_TRACE(c10::str(tokens.sizes()));
    expect_close(loader.run({tokens.to(eager_device())}).at(0), logits, 100);
  }
  EXPECT_EQ(loader.get_metadata().at("inputs"), "tokens");
  EXPECT_NE(loader.get_metadata().at("symbols").find("length (0 to 32)"), std::string::npos);
}

TEST_F(Exports, AFunctionOfSeveralTensors) {
  const auto function = [](const std::vector<torch::Tensor>& in, const torch::Tensor& z, double factor) {
    const auto sum = in[0] + in[1] * factor;
    return std::tuple(sum.matmul(z), std::map<std::string, torch::Tensor>{{"turned", sum.t()}});
  };
  const Tensors in{torch::randn({3, 4}), torch::randn({3, 4}), torch::randn({4, 2})};
  export_package(function,
                 std::tuple(Tensors{in[0].to(torch::kLazy), in[1].to(torch::kLazy)}, in[2].to(torch::kLazy), 0.5),
                 path("function.pt2"));
  const auto [product, named] = function({in[0], in[1]}, in[2], 0.5);
  const Tensors outputs = run(path("function.pt2"), in);
  expect_close(outputs.at(0), product, 10);
  expect_close(outputs.at(1), named.at("turned"), 10);
}

TEST_F(Exports, RunInStockPython) {
  if (std::getenv("REPRISE_TEST_PYTHON") == nullptr) GTEST_SKIP() << "REPRISE_TEST_PYTHON names no Python";
  if (!eager_device().is_cpu()) GTEST_SKIP() << "the script's tensors are on the CPU";
  const auto weight = torch::full({3}, 4).to(torch::kFloat).to(torch::kLazy);
  auto x = lazy({2, 3});
  mark_dynamic(x, 0, {.name = "rows"});
  export_package([=](const torch::Tensor& t) { return t * weight + 1; }, std::tuple(x), path("p.pt2"));
  const std::string script =
      "import torch\n"
      "package = torch._inductor.aoti_load_package('" + path("p.pt2") + "')\n"
      "for rows in (2, 7):\n"
      "    (y,) = package(torch.ones(rows, 3))\n"
      "    assert torch.equal(y, torch.full((rows, 3), 5.0)), y\n";
  const Ended ended = run_python(script);
  EXPECT_EQ(ended.status, 0) << ended.output;
}

TEST_F(Exports, AProgramOfTorchExportTrainsAnywhere) {
  torch::manual_seed(1);
  torch::nn::Sequential net(torch::nn::Linear(6, 16), torch::nn::LayerNorm(torch::nn::LayerNormOptions({16})),
                            torch::nn::GELU(), torch::nn::Linear(16, 3));
  const auto x = torch::randn({5, 6}), y = torch::randn({5, 3});
  const auto train = [&](auto& module, torch::Device device) {
    torch::optim::SGD optimizer(module.parameters(), 0.1);
    std::vector<torch::Tensor> losses;
    for (int step = 0; step < 5; ++step) {
      optimizer.zero_grad();
      const auto loss = torch::mse_loss(module.forward(x.to(device)), y.to(device));
      loss.backward();
      optimizer.step();
      losses.push_back(loss.detach().cpu());
    }
    return losses;
  };
  net->to(torch::kLazy);
  auto example = x.to(torch::kLazy);
  mark_dynamic(example, 0, {.name = "rows", .most = 64});
  export_program(net, std::tuple(example), path("program.pt2"), {"the input"});
  const auto losses = train(*net, torch::kLazy);
  for (const torch::Device device : {eager_device(), torch::Device(torch::kLazy)}) {
    SCOPED_TRACE(device);
    const auto program = load_package(path("program.pt2"));
    EXPECT_EQ(program->parameters().size(), net->parameters().size());
    EXPECT_TRUE(program->named_parameters().contains("1.weight"));
    program->to(device);
    EXPECT_EQ(program->forward(torch::randn({9, 6}).to(device)).sizes(), torch::IntArrayRef({9, 3}));
    expect_error<c10::ValueError>([&] { program->forward(torch::randn({65, 6}).to(device)); }, "dimension 0");
    const auto own = train(*program, device);
    for (size_t k = 0; k < losses.size(); ++k) expect_close(own[k], losses[k], 100);
  }
  const auto written = [&](auto function) { export_program(function, std::tuple(x.to(torch::kLazy)), path("cut.pt2")); };
  expect_error([&] { written([&](const torch::Tensor& t) { return net->forward(t) - net->forward(t).detach(); }); },
               "cuts a gradient");
  expect_error(
      [&] {
        written([&](const torch::Tensor& t) {
          torch::Tensor hidden;
          {
            torch::NoGradGuard no_grad;
            hidden = t * 2;
          }
          return net->forward(hidden);
        });
      },
      "cuts a gradient");
  EXPECT_FALSE(std::filesystem::exists(path("cut.pt2")));
  const char* python = std::getenv("REPRISE_TEST_PYTHON");
  if (python == nullptr || !eager_device().is_cpu()) return;
  const std::string script =
      "import torch\n"
      "program = torch.export.load('" + path("program.pt2") + "')\n"
      "assert dict(program.named_parameters()).keys() >= {'0.weight', '1.bias'}\n"
      "assert program.graph_signature.user_inputs == ('the_input',), program.graph_signature.user_inputs\n"
      "assert program.module()(torch.ones(7, 6))[0].shape == (7, 3)\n";
  const Ended ended = run_python(script);
  EXPECT_EQ(ended.status, 0) << ended.output;
}

TEST_F(Exports, ForAGpuThatIsNotThere) {
  if (!c10::impl::hasDeviceGuardImpl(c10::kCUDA)) GTEST_SKIP() << "torch was built without CUDA, and brings no Triton";
  torch::manual_seed(0);
  cpp_models::Gpt model(cpp_models::GptOptions{.vocabulary = 11, .context = 32, .width = 16, .heads = 2,
                                               .layers = 1, .attention = cpp_models::Attention::kFused});
  model->eval();
  torch::NoGradGuard no_grad;
  model->to(torch::kLazy);
  auto example = torch::randint(11, {2, 8}, torch::kLong).to(torch::kLazy);
  mark_dynamic(example, 1, {.name = "length", .most = 32});
  export_package(model, std::tuple(example), path("gpt.pt2"),
                 {.target = CompileTarget{.architecture = "sm_90"}});
  const auto metadata = torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(path("gpt.pt2"), "model");
  EXPECT_EQ(metadata.at("AOTI_DEVICE_KEY"), "cuda");
  EXPECT_EQ(metadata.at("AOTI_COMPUTE_CAPABILITY"), "90");
  EXPECT_EQ(model->forward(example).sizes(), torch::IntArrayRef({2, 8, 11}));  // the program goes on

  const auto none = [&](CompileTarget target) {
    export_package(model, std::tuple(example), path("none.pt2"), {.target = target});
  };
  expect_error([&] { none({.architecture = "sm_12"}); }, "'sm_12'; known are sm_80, A100");
  expect_error([&] { none({.device = "xpu"}); }, "another device than cuda, and 'xpu' was named");
  EXPECT_FALSE(std::filesystem::exists(path("none.pt2")));
}

TEST_F(Exports, WhatCannotBeExportedIsSaid) {
  const auto x = lazy({4, 3});
  const std::string file = path("bad.pt2");
  expect_error([&] { export_package([](const torch::Tensor& t) { return t + 1; }, std::tuple(torch::ones({2})), file); },
               "is no lazy tensor; move it");
  expect_error([&] { export_package([](const torch::Tensor& t) { return t + 1; }, std::tuple(x), path("bad.zip")); },
               "a package's name ends in .pt2");
  expect_error([&] { export_package([](const torch::Tensor& t) { return t * t.sum().item<double>(); }, std::tuple(x), file); },
               "what is exported cannot be replayed as one program");
  expect_error([&] { export_package([](const torch::Tensor& t) { return torch::dropout(t, 0.5, true); }, std::tuple(x), file); },
               "draws random numbers");
  expect_error([&] { export_package([](const torch::Tensor& t) { return std::vector{t + 1, t}; }, std::tuple(x), file); },
               "is a tensor that the function has not made");
  expect_error([&] { export_package([](const torch::Tensor& t, const torch::Tensor&) { return t + 1; }, std::tuple(x, lazy({2})), file); },
               "argument 1 is not used");
  torch::nn::BatchNorm1d norm(3);
  norm->to(torch::kLazy);
  expect_error([&] { export_package(norm, std::tuple(x), file); }, "put the module into eval mode");
  const auto rows = lazy({4, 3});
  expect_error(
      [&] {
        auto marked = lazy({4, 3});
        mark_dynamic(marked, 0, {.name = "rows of a package"});
        export_package([&](const torch::Tensor& t) { return t * rows; }, std::tuple(marked), file);
      },
      "rows of a package cannot be another size: The size of tensor a");
  EXPECT_TRUE(empty());
  EXPECT_EQ((x + 1).sizes(), x.sizes());  // the program goes on
}

}  // namespace
}  // namespace reprise::test
