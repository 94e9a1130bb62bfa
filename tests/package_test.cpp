// Programs from files: what Python exported or compiled runs here, and trains, without Python.
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "reprise/reprise.h"
#include "tests/child_process.h"
#include "tests/expect_error.h"
#include "tests/sized_steps.h"

namespace reprise::test {
namespace {

namespace F = torch::nn::functional;

/// The files of tests/python/exported_models.py, made once.
class Packages : public LazySizes {
 protected:
  static void SetUpTestSuite() {
    const char* const python = std::getenv("REPRISE_TEST_PYTHON");
    if (python == nullptr) return;
    folder() = make_folder("packages-of-python");
    const Ended made = run_child({python, "-B", REPRISE_TEST_SOURCES "/python/exported_models.py", folder()},
                                 {{"OMP_NUM_THREADS", "1"}, {"CUDA_VISIBLE_DEVICES", ""}});
    ASSERT_EQ(made.status, 0) << made.output;
  }
  static void TearDownTestSuite() {
    if (!folder().empty()) std::filesystem::remove_all(folder());
  }
  void SetUp() override {
    if (folder().empty()) GTEST_SKIP() << "REPRISE_TEST_PYTHON names no Python";
    LazySizes::SetUp();
  }
  static std::string& folder() {
    static std::string path;
    return path;
  }
  static std::string path(const std::string& name) { return folder() + "/" + name; }

  /// What Python got.
  static std::map<std::string, Tensors> numbers_of(const std::string& name) {
    std::ifstream file(path(name + ".numbers"), std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
    std::map<std::string, Tensors> numbers;
    for (const auto& entry : torch::jit::pickle_load(bytes).toGenericDict()) {
      Tensors& list = numbers[entry.key().toStringRef()];
      for (const auto& item : entry.value().toListRef()) list.push_back(item.toTensor());
    }
    return numbers;
  }
};

/// Losses of training steps like those of the script.
template <class Optimizer, class Options>
Tensors train(LoadedModule& net, const Options& options, std::map<std::string, Tensors>& numbers,
              torch::Device device) {
  Optimizer optimizer(net.parameters(), options);
  Tensors losses;
  for (size_t step = 0; step < numbers["losses"].size(); ++step) {
    const size_t batch = step % numbers["inputs"].size();
    const auto x = numbers["inputs"][batch].to(device), y = numbers["targets"][batch].to(device);
    const auto loss = F::cross_entropy(net.forward(x).flatten(0, -2), y);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    losses.push_back(loss.detach());
    if (device.is_lazy()) {
      mark_step();
      wait_for_compiles();
    }
  }
  return losses;
}

void expect_losses(const Tensors& actual, const Tensors& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t k = 0; k < expected.size(); ++k) {
    SCOPED_TRACE(c10::str("step ", k));
    expect_close(actual[k], expected[k], 100);
  }
}

TEST_F(Packages, AResNetOfTorchExportIsTrainedOnEveryDevice) {
  auto numbers = numbers_of("resnet");
  const auto options = torch::optim::SGDOptions(0.05).momentum(0.9);
  for (const torch::Device device : {torch::Device(torch::kCPU), eager_device(), torch::Device(torch::kLazy)}) {
    SCOPED_TRACE(device.str());
    const Statistics before = statistics();
    const auto net = load_package(path("resnet.pt2"));
    net->to(device);
    expect_losses(train<torch::optim::SGD>(*net, options, numbers, device), numbers["losses"]);
    expect_close(net->named_buffers()["blocks.1.bn2.running_var"], numbers["buffers"][0], 100);
    if (device.is_lazy()) {
      EXPECT_GT(since(before).segments_replayed, 0u) << explain();
    }
  }
}

TEST_F(Packages, AGptOfTorchExportIsTrainedOnEveryDevice) {
  auto numbers = numbers_of("gpt");
  for (const torch::Device device : {torch::Device(torch::kCPU), eager_device(), torch::Device(torch::kLazy)}) {
    SCOPED_TRACE(device.str());
    const auto net = load_package(path("gpt.pt2"));
    net->to(device);
    expect_losses(train<torch::optim::AdamW>(*net, torch::optim::AdamWOptions(1e-3), numbers, device),
                  numbers["losses"]);
  }
}

TEST_F(Packages, ParametersHaveTheirNamesAndAreSharedAsInPython) {
  const auto net = load_package(path("gpt.pt2"));
  const auto named = net->named_parameters();
  EXPECT_EQ(named.size(), 2u + 2u * 12u + 2u);  // the head's weight is that of the tokens
  EXPECT_TRUE(named.contains("layers.1.mlp.2.bias"));
  EXPECT_TRUE(named["tokens.weight"].requires_grad() || named["head.weight"].requires_grad());
  EXPECT_EQ(net->input_names(), std::vector<std::string>{"text"});
}

/// All that a graph can have beside ops on tensors, and the same once it is functional.
TEST_F(Packages, WhatPythonExportsDoesTheSame) {
  auto numbers = numbers_of("features");
  for (const std::string name : {"features", "decomposed"}) {
    for (const torch::Device device : {torch::Device(torch::kCPU), torch::Device(torch::kLazy)}) {
      if (device.is_lazy() && !eager_device().is_cpu()) continue;  // its autocast is that of the CPU
      SCOPED_TRACE(c10::str(name, " on ", device));
      const auto net = load_package(path(name + ".pt2"));
      net->to(device);
      const Tensors expected = numbers["outputs"];
      const size_t each = expected.size() / 2;
      for (int repeat = 0; repeat < 3; ++repeat) {
        for (size_t k = 0; k < 2; ++k) {
          const Tensors outputs =
              net->run({numbers["inputs"][k].to(device), numbers["signs"][k].to(device)});
          ASSERT_EQ(outputs.size(), each);
          for (size_t output = 0; output < each; ++output) {
            SCOPED_TRACE(c10::str("output ", output));
            const torch::Tensor& wanted = expected[k * each + output];
            const bool count = wanted.dim() == 0 && wanted.equal(torch::tensor(static_cast<int64_t>(k + 1)));
            if (!outputs[output].defined()) {
              EXPECT_EQ(wanted.numel(), 0);
            } else if (count) {
              EXPECT_EQ(outputs[output].item<int64_t>(), static_cast<int64_t>(repeat * 2 + k + 1));
            } else {
              expect_close(outputs[output].cpu(), wanted, 10);
            }
          }
        }
        if (device.is_lazy()) {
          mark_step();
          wait_for_compiles();
        }
      }
    }
  }
}

TEST_F(Packages, TrainAndEvalAreForwardedToTheOps) {
  auto numbers = numbers_of("features");
  const auto net = load_package(path("features.pt2"));
  const auto mean = net->named_buffers()["norm.running_mean"];
  net->run({numbers["inputs"][1], numbers["signs"][1]});
  EXPECT_TRUE(mean.equal(torch::zeros(6)));  // as it was exported
  net->train();
  const Tensors outputs = net->run({numbers["inputs"][1], numbers["signs"][1]});
  expect_close(mean, numbers["mean"][0], 10);
  net->eval();
  net->run({numbers["inputs"][1], numbers["signs"][1]});
  expect_close(mean, numbers["mean"][0], 10);
}

TEST_F(Packages, WrongInputsAreNamed) {
  const auto net = load_package(path("features.pt2"));
  const auto sign = torch::ones(2);
  expect_error<c10::ValueError>([&] { net->run({torch::ones({4, 6})}); }, "takes 2 tensors, and 1 came");
  expect_error<c10::ValueError>([&] { net->run({torch::ones({40, 6}), sign}); },
                                "input 0 (x) dimension 0: 2 to 32 expected, and 40 came");
  expect_error<c10::ValueError>([&] { net->run({torch::ones({4, 5}), sign}); },
                                "input 0 (x) dimension 1: 6 expected, and 5 came");
  expect_error<c10::ValueError>([&] { net->run({torch::ones({24}), sign}); }, "2 dimensions expected, and 1 came");
  expect_error<c10::TypeError>([&] { net->run({torch::ones({4, 6}, torch::kDouble), sign}); },
                               "Float expected, and Double came");
  EXPECT_EQ(net->run({torch::ones({4, 6}), sign}).size(), 11u);
}

TEST_F(Packages, APackageOfPythonsInductor) {
  auto numbers = numbers_of("compiled");
  const auto net = load_package(path("compiled.pt2"));
  expect_close(net->forward(numbers["inputs"][0]), numbers["outputs"][0], 10);
  expect_close(net->forward(numbers["inputs"][1]), numbers["outputs"][1], 10);
  // Its weights are those of the module, also when they get other memory.
  auto weight = net->named_parameters()["2.weight"];
  {
    torch::NoGradGuard no_grad;
    weight.mul_(2);
  }
  expect_close(net->forward(numbers["inputs"][0]), numbers["outputs"][2], 10);
  weight.set_data(weight.detach() * 0.5);
  expect_close(net->forward(numbers["inputs"][0]), numbers["outputs"][0], 10);
  expect_error<c10::ValueError>([&] { net->run({}); }, "takes 1 tensors, and 0 came");
}

TEST_F(Packages, ACompiledPackageIsALinkOfALazyChain) {
  if (!eager_device().is_cpu()) GTEST_SKIP() << "the package was compiled for the CPU";
  auto numbers = numbers_of("compiled");
  for (const bool moved : {false, true}) {
    SCOPED_TRACE(moved);
    const auto package = load_package(path("compiled.pt2"));
    torch::nn::Sequential chain(torch::nn::Linear(6, 6), torch::nn::Tanh(), package, torch::nn::Linear(3, 2));
    torch::NoGradGuard no_grad;
    const auto x = numbers["inputs"][0];
    const auto expected = chain->forward(x);
    if (moved) {
      chain->to(torch::kLazy);
    } else {
      for (const int k : {0, 3}) chain[k]->to(torch::kLazy);
    }
    for (int repeat = 0; repeat < 4; ++repeat) {
      expect_close(chain->forward(x.to(torch::kLazy)), expected, 10);
      mark_step();
      wait_for_compiles();
    }
    package->named_parameters()["0.bias"].add_(1);
    EXPECT_FALSE(torch::allclose(chain->forward(x.to(torch::kLazy)).cpu(), expected));
  }
}

TEST_F(Packages, ACallIsOneStepAmongOthers) {
  if (!eager_device().is_cpu()) GTEST_SKIP() << "the package was compiled for the CPU";
  expect_eager_three_ways(
      [&](torch::Device device) -> Step {
        const auto package = load_package(path("compiled.pt2"), {.functional = true});
        torch::nn::Sequential chain(torch::nn::Linear(6, 6), torch::nn::Tanh(), package, torch::nn::Linear(3, 2));
        {
          torch::NoGradGuard no_grad;  // the same weights each time
          for (auto& p : chain[0]->parameters()) p.copy_(torch::arange(p.numel()).view(p.sizes()).div(40.0).cos());
          for (auto& p : chain[3]->parameters()) p.copy_(torch::arange(p.numel()).view(p.sizes()).sin());
        }
        chain->to(device);
        return [=](int) mutable {
          torch::NoGradGuard no_grad;
          // What is written is read by the package that comes after it.
          package->named_parameters()["0.bias"].mul_(0.9);
          const auto x = torch::arange(30).view({5, 6}).mul(0.1).to(device);
          return Tensors{chain->forward(x.flip(0)), chain->forward(x).relu()};
        };
      },
      {.tolerance = 10});
}

TEST_F(Packages, AStepMayReturnNoneAmongOthers) {
  if (!eager_device().is_cpu()) GTEST_SKIP() << "the package was compiled for the CPU";
  const auto before = statistics();
  expect_eager_three_ways(
      [&](torch::Device device) -> Step {
        const auto package = load_package(path("gap.pt2"), {.functional = true});
        package->to(device);
        return [=](int) {
          torch::NoGradGuard no_grad;
          const auto results = package->run({torch::arange(24).view({4, 6}).mul(0.1).to(device) + 1});
          EXPECT_EQ(results.size(), 3u);
          EXPECT_FALSE(results[1].defined());
          return Tensors{results[0] + 1, results[2] * 2};
        };
      },
      {.tolerance = 10});
  EXPECT_EQ(since(before).compile_failures, 0u);
  EXPECT_GT(since(before).segments_replayed, 0u);
}

TEST_F(Packages, AChainWithAPackageIsOneProgram) {
  if (!eager_device().is_cpu()) GTEST_SKIP() << "the package was compiled for the CPU";
  const auto package = load_package(path("compiled.pt2"), {.functional = true});
  torch::nn::Sequential chain(torch::nn::Linear(6, 6), torch::nn::Tanh(), package, torch::nn::Linear(3, 2));
  torch::NoGradGuard no_grad;
  std::map<int64_t, torch::Tensor> expected;
  const auto input = [](int64_t rows) { return given(torch::kCPU, {rows, 6}, 3); };
  for (int64_t rows = 4; rows < 12; ++rows) expected[rows] = chain->forward(input(rows));
  chain->to(torch::kLazy);
  const auto run = [&](int64_t rows) {
    const auto x = input(rows).to(torch::kLazy);
    mark_step();
    const Statistics before = statistics();
    const auto result = chain->forward(x).cpu();
    expect_close(result, expected[rows], 10);
    return since(before);
  };
  for (int repeat = 0; repeat < 4; ++repeat) {
    run(5);
    wait_for_compiles();
  }
  const Statistics once = run(5);
  EXPECT_EQ(once.segments_replayed, 1u);
  EXPECT_EQ(once.segments_recorded + once.segments_interpreted, 0u);
  // Sizes share a program, but what a package returns for another one is not known before.
  const Statistics before = statistics();
  for (int64_t rows = 4; rows < 12; ++rows) {
    for (int repeat = 0; repeat < 2; ++repeat) run(rows);
    wait_for_compiles();
  }
  EXPECT_LE(since(before).programs_compiled + since(before).programs_loaded, 2u);
  const Statistics again = run(11);
  EXPECT_EQ(again.segments_replayed, 1u);
  EXPECT_EQ(since(before).program_failures, 0u);

  // Two modules of one file have their own weights.
  const auto other = load_package(path("compiled.pt2"), {.functional = true}), there = load_package(path("compiled.pt2"));
  other->to(torch::kLazy);
  for (const auto& module : {other, there}) {
    for (auto& weight : module->parameters()) weight.mul_(-2);
  }
  for (int repeat = 0; repeat < 2; ++repeat) {
    run(5);
    expect_close(other->forward(input(5).to(torch::kLazy)), there->forward(input(5)), 10);
  }
  expect_error([&] { export_package(chain, std::tuple(input(5).to(torch::kLazy)), path("nested.pt2")); },
               "calls a package that was loaded");
}

TEST_F(Packages, OursSayWhetherACallIsFunctional) {
  torch::NoGradGuard no_grad;
  torch::nn::Sequential net(torch::nn::Linear(4, 8), torch::nn::ReLU(), torch::nn::Linear(8, 4));
  net->eval();
  net->to(torch::kLazy);
  const auto x = given(torch::kCPU, {3, 4}, 1), total = given(torch::kCPU, {3, 4}, 2);
  const auto lazy = [](const torch::Tensor& tensor) { return tensor.clone().to(torch::kLazy); };
  export_package(net, std::tuple(lazy(x)), path("net.pt2"));
  export_package(
      [](const torch::Tensor& added, const torch::Tensor& sum) {
        sum.add_(added);
        return sum * 2;
      },
      std::tuple(lazy(x), lazy(total)), path("sum.pt2"));  // tried on what it was given, not on what it wrote
  export_package(
      [](const torch::Tensor& whole) {
        const auto twice = whole * 2;
        return std::tuple(twice.slice(0, 1), twice.t());
      },
      std::tuple(lazy(x)), path("parts.pt2"));
  const auto run = [&](torch::Device device) {
    const auto inner = load_package(path("net.pt2")), sum = load_package(path("sum.pt2")),
               parts = load_package(path("parts.pt2"));
    inner->to(device);
    Tensors all;
    for (int repeat = 0; repeat < 5; ++repeat) {
      const auto y = x.clone().to(device), accumulated = total.clone().to(device);
      mark_step();
      Statistics before = statistics();
      all.push_back(inner->forward(y.sin()).cos().cpu());
      if (device.is_lazy() && repeat == 4) {
        EXPECT_EQ(since(before).segments_replayed, 1u);
        EXPECT_EQ(since(before).segments_interpreted + since(before).segments_recorded, 0u);
      }
      sum->run({y * 3, accumulated});
      all.push_back(accumulated.clone());
      for (const auto& result : sum->run({y, accumulated})) all.push_back(result + 1);
      const auto views = parts->run({y + 1});
      views[0].mul_(2);  // seen by the other one
      all.insert(all.end(), {views[0], views[1].exp(), accumulated});
      wait_for_compiles();
    }
    return all;
  };
  const Statistics before = statistics();
  const Tensors actual = run(torch::kLazy), expected = run(eager_device());
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t k = 0; k < actual.size(); ++k) {
    SCOPED_TRACE(k);
    expect_close(actual[k], expected[k], 10);
  }
  EXPECT_EQ(since(before).compile_failures, 0u);
}

TEST_F(Packages, ArgumentsOfAnExampleMayOverlap) {
  torch::NoGradGuard no_grad;
  const auto x = given(torch::kCPU, {3, 4}, 1).to(torch::kLazy);
  const auto row = given(torch::kCPU, {1, 5}, 2).to(torch::kLazy).slice(1, 1).expand({3, 4});
  export_package([](const torch::Tensor& a, const torch::Tensor& b) { return a * b; }, std::tuple(x, row), path("rows.pt2"));
  const auto loaded = load_package(path("rows.pt2"));
  expect_close(loaded->run({x, row})[0], x.cpu() * row.cpu());
}

TEST_F(Packages, WhatIsReturnedIsNoArgument) {
  torch::NoGradGuard no_grad;
  const auto x = given(torch::kCPU, {3, 4}, 1).to(torch::kLazy);
  // The compiler takes such ops out.
  export_package([](const torch::Tensor& a) { return std::tuple(a + torch::zeros_like(a), a * torch::ones_like(a)); },
                 std::tuple(x), path("nothing.pt2"));
  const auto y = given(eager_device(), {3, 4}, 2), before = y.clone();
  const Tensors results = load_package(path("nothing.pt2"))->run({y});
  results[0].zero_();
  expect_same_bits(results[1], before);
  expect_same_bits(y, before);
}

TEST_F(Packages, WeightsAreThoseOfTheCall) {
  if (!eager_device().is_cpu()) GTEST_SKIP() << "the package was compiled for the CPU";
  torch::NoGradGuard no_grad;
  const auto net = load_package(path("compiled.pt2"), {.functional = true}), there = load_package(path("compiled.pt2"));
  const auto widen = [](const torch::Tensor& y) { return torch::cat({y, y}, 1); };
  const auto x = given(torch::kCPU, {5, 6}, 4);
  for (int repeat = 0; repeat < 3; ++repeat) {
    SCOPED_TRACE(repeat);
    net->to(torch::kLazy);
    mark_step();
    const auto once = net->forward(x.to(torch::kLazy));  // pending, with these weights
    net->to(torch::kCPU);
    const auto before = there->forward(x);
    for (const auto& module : {net, there}) module->named_parameters()["0.weight"].mul_(1.5);
    expect_close(net->forward(widen(once)), there->forward(widen(before)), 10);
    expect_close(once, before, 10);
  }
}

TEST_F(Packages, AFunctionThatCallsWhatIsNoStepIsNotReplayed) {
  if (!eager_device().is_cpu()) GTEST_SKIP() << "the package was compiled for the CPU";
  torch::NoGradGuard no_grad;
  const auto package = load_package(path("compiled.pt2"));
  const auto body = [package](const torch::Tensor& x) { return package->forward(x) * 2; };
  const auto x = given(torch::kCPU, {5, 6}, 5);
  const auto whole = compile(body, {.fullgraph = true});
  expect_error([&] { whole(x.to(torch::kLazy)); }, "a package that is not known to be functional was called here");
  const auto loose = compile(body);
  for (int repeat = 0; repeat < 4; ++repeat) {
    package->named_parameters()["0.weight"].mul_(1.5);
    expect_close(loose(x.to(torch::kLazy)), body(x), 10);
  }
  expect_error([&] { export_package(body, std::tuple(x.to(torch::kLazy)), path("nested.pt2")); },
               "a package that is not known to be functional was called here");
}

TEST_F(Packages, AnUnloadedPackageHasDoneItsWork) {
  if (!eager_device().is_cpu()) GTEST_SKIP() << "the package was compiled for the CPU";
  torch::NoGradGuard no_grad;
  const auto x = torch::randn({5, 6}).to(torch::kLazy);
  auto package = load_package(path("compiled.pt2"), {.functional = true});
  package->to(torch::kLazy);
  Tensors results;
  for (int repeat = 0; repeat < 2; ++repeat) {  // recorded, and pending
    mark_step();
    results.push_back(package->forward(x * 2));
  }
  package = nullptr;
  EXPECT_TRUE(results[0].equal(results[1]));
}

TEST_F(Packages, WhatACallDoesBesideIsDoneInItsPlace) {
  if (!eager_device().is_cpu()) GTEST_SKIP() << "the packages were compiled for the CPU";
  torch::NoGradGuard no_grad;
  const auto noisy = load_package(path("noisy.pt2")), positive = load_package(path("positive.pt2")),
             halves = load_package(path("halves.pt2"));
  const auto run = [&](torch::Device device, double sign) {
    torch::manual_seed(11);
    const auto x = torch::arange(-12, 12).view({4, 6}).to(torch::kFloat).mul_(sign).to(device);
    Tensors all{torch::rand({3}, device), noisy->forward(x * 2), torch::rand({3}, device)};
    all.push_back(positive->forward(x + sign));
    for (auto& half : halves->run({x + 1})) all.push_back(half);
    all[4].add_(1);  // a part of the tensor that is also the next one's
    all[6].mul_(3);
    return all;
  };
  for (int repeat = 0; repeat < 4; ++repeat) {
    for (const double sign : {1.0, -0.5}) {
      SCOPED_TRACE(c10::str(repeat, " ", sign));
      const Tensors actual = run(torch::kLazy, sign), expected = run(torch::kCPU, sign);
      ASSERT_EQ(actual.size(), expected.size());
      for (size_t k = 0; k < actual.size(); ++k) {
        ASSERT_EQ(actual[k].defined(), k != 7) << k;
        ASSERT_EQ(expected[k].defined(), k != 7) << k;
        if (k != 7) expect_close(actual[k], expected[k]);
      }
    }
    mark_step();
    wait_for_compiles();
  }
}

TEST_F(Packages, GradientsStopAtACompiledPackage) {
  const auto net = load_package(path("compiled.pt2"));
  const auto x = torch::randn({5, 6}).requires_grad_();
  expect_error([&] { net->forward(x).sum().backward(); }, "derivative for reprise::run_package is not implemented");
}

TEST_F(Packages, FilesThatAreNone) {
  expect_error([&] { load_package(path("missing.pt2")); }, "missing.pt2' is no file");
  std::filesystem::copy_file(path("gpt.pt2"), path("short.pt2"));
  std::filesystem::resize_file(path("short.pt2"), std::filesystem::file_size(path("short.pt2")) / 2);
  expect_error([&] { load_package(path("short.pt2")); }, "short.pt2' is no whole .pt2 archive");
  expect_error([&] { load_package(path("gpt.numbers")); }, "neither a program of torch.export nor one of AOTInductor");
  expect_error<c10::ValueError>([&] { load_package(path("gpt.pt2"), {.entry = "decode"}); },
                                "has no program 'decode', but model");
}

TEST_F(Packages, WhatIsExportedHereIsLoadedHere) {
  torch::nn::Sequential net(torch::nn::Linear(4, 8), torch::nn::ReLU(), torch::nn::Linear(8, 2));
  net->eval();
  net->to(torch::kLazy);
  auto x = torch::randn({3, 4}).to(torch::kLazy);
  mark_dynamic(x, 0, {.name = "rows", .least = 2, .most = 16});
  export_package(net, std::tuple(x), path("own.pt2"), {.input_names = {"features"}});
  const auto loaded = load_package(path("own.pt2"));
  EXPECT_EQ(loaded->input_names(), std::vector<std::string>{"features"});
  torch::NoGradGuard no_grad;
  net->to(eager_device());
  for (const int64_t rows : {3, 7}) {
    const auto y = torch::randn({rows, 4}).to(eager_device());
    expect_close(loaded->forward(y), net->forward(y), 10);
  }
  EXPECT_TRUE(loaded->named_parameters().contains("0.weight"));
  expect_error<c10::ValueError>([&] { loaded->forward(torch::randn({17, 4}).to(eager_device())); },
                                "input 0 (features) dimension 0: rows, 2 to 16 expected, and 17 came");
  expect_error<c10::ValueError>([&] { loaded->forward(torch::randn({3, 5}).to(eager_device())); },
                                "input 0 (features) dimension 1: 4 expected, and 5 came");
}

TEST_F(Packages, SeveralProgramsInOneFile) {
  torch::nn::Linear embed(4, 8), head(8, 2);
  embed->to(torch::kLazy);
  head->to(torch::kLazy);
  const auto x = torch::randn({3, 4}), h = torch::randn({3, 8});
  const auto file = path("two.pt2");
  export_package(embed, std::tuple(x.to(torch::kLazy)), file, {.entry = "embed"});
  export_package(head, std::tuple(h.to(torch::kLazy)), file, {.entry = "head", .add_to_file = true});
  expect_error<c10::ValueError>([&] { load_package(file); }, "has several programs (embed, head)");
  const auto first = load_package(file, {.entry = "embed"}), second = load_package(file, {.entry = "head"});
  torch::NoGradGuard no_grad;
  embed->to(eager_device());
  head->to(eager_device());
  const auto y = torch::randn({3, 4}).to(eager_device());
  expect_close(second->forward(first->forward(y)), head->forward(embed->forward(y)), 20);
  if (!eager_device().is_cpu()) return;
  const double expected = embed->forward(torch::ones({3, 4}))[0][0].item<double>();
  const std::string script =
      "import torch\n"
      "from torch._inductor.package import load_package\n"
      "y = load_package('" + file + "', 'embed')(torch.ones(3, 4))\n"
      "y = y[0] if isinstance(y, (list, tuple)) else y\n"
      "assert abs(y[0, 0].item() - " + std::to_string(expected) + ") < 1e-4, y\n";
  const Ended ended = run_python(script);
  EXPECT_EQ(ended.status, 0) << ended.output;
}

}  // namespace
}  // namespace reprise::test
