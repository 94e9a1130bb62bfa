// Packages whose weights are elsewhere, or are written: training steps.
#include <torch/torch.h>

#include <cstdlib>
#include <filesystem>

#include "reprise/reprise.h"
#include "tests/child_process.h"
#include "tests/expect_error.h"
#include "tests/sized_steps.h"

namespace reprise::test {
namespace {

class PackagedWeights : public LazySizes, public ::testing::WithParamInterface<Weights> {
 protected:
  void SetUp() override {
    LazySizes::SetUp();
    torch::manual_seed(3);
    folder_ = make_folder("packaged-weights");
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::string path(const std::string& name) const { return folder_ + "/" + name; }

 private:
  std::string folder_;
};

TEST_P(PackagedWeights, ATrainingStepGoesOnInThePackage) {
  torch::nn::Sequential net(torch::nn::Linear(6, 16), torch::nn::BatchNorm1d(16), torch::nn::Tanh(),
                            torch::nn::Linear(torch::nn::LinearOptions(16, 1).bias(false)));
  net->to(torch::kLazy);
  torch::optim::SGD optimizer(net->parameters(), torch::optim::SGDOptions(0.01).momentum(0.9).weight_decay(1e-3));
  const auto step = [&](const torch::Tensor& x, const torch::Tensor& y) {
    optimizer.zero_grad();
    const auto loss = torch::mse_loss(net->forward(x), y);
    loss.backward();
    optimizer.step();
    return loss.detach();
  };
  const auto x = torch::randn({8, 6}), y = torch::randn({8, 1});
  const auto lazy_x = x.to(torch::kLazy), lazy_y = y.to(torch::kLazy);
  const std::string file = path("step.pt2"), stored = path("stored.pt2");
  const auto write = [&](const std::string& to, Weights weights) {
    export_package(step, std::tuple(lazy_x, lazy_y), to,
                   {.input_names = {"x", "y"}, .weights = weights, .weight_names = named_tensors(*net),
                    .training_step = true});
  };
  write(file, GetParam());
  if (GetParam() == Weights::kNotStored) {
    expect_error<c10::ValueError>([&] { load_package(file); }, "the file has no values for 0.bias, 0.weight, 1.bias");
    expect_error<c10::ValueError>([&] { load_package(file, {.weights_of = net.ptr()}); },
                                  "the module of LoadOptions::weights_of has not either");  // momenta
    write(stored, Weights::kInFile);
  }

  for (const bool moved : {false, true}) {
    SCOPED_TRACE(moved);
    LoadOptions options;
    if (GetParam() == Weights::kNotStored) options.weights_of = load_package(stored);
    const auto loaded = load_package(file, options);
    EXPECT_EQ(loaded->parameters().size(), 5u);
    EXPECT_EQ(loaded->named_buffers().contains("1.running_mean"), true);
    if (moved) loaded->to(torch::kLazy);
    const auto device = moved ? torch::Device(torch::kLazy) : eager_device();
    std::vector<torch::Tensor> losses;
    for (int k = 0; k < 4; ++k) losses.push_back(loaded->run({x.to(device), y.to(device)}).at(0).cpu());
    EXPECT_LT(losses[3].item<float>(), losses[0].item<float>());
    if (!moved) {
      for (int k = 0; k < 4; ++k) expect_close(step(lazy_x, lazy_y), losses[k], 100);
      for (const auto& each : net->named_parameters()) {
        expect_close(loaded->named_parameters()[each.key()], each.value(), 100);
      }
      EXPECT_EQ(loaded->named_buffers()["1.num_batches_tracked"].item<int64_t>(),
                net->named_buffers()["1.num_batches_tracked"].item<int64_t>());
    } else {
      for (const auto& each : loaded->named_parameters()) {
        expect_close(each.value(), net->named_parameters()[each.key()], 100);
      }
    }
  }
}

TEST_P(PackagedWeights, OptimizersCountTheirStepsInThePackage) {
  namespace optim = torch::optim;
  torch::nn::Sequential net(torch::nn::Linear(6, 16), torch::nn::Tanh(), torch::nn::Linear(16, 8),
                            torch::nn::Tanh(), torch::nn::Linear(8, 1));
  net->to(torch::kLazy);
  const auto parameters = net->parameters();
  auto slow = std::make_unique<optim::AdamOptions>(1e-3);
  slow->betas({0.5, 0.9}).amsgrad(true);
  std::vector<optim::OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<torch::Tensor>{parameters[0]});
  groups.emplace_back(std::vector<torch::Tensor>{parameters[1]}, std::move(slow));
  optim::Adam adam(groups, optim::AdamOptions(0.01));
  optim::Adagrad adagrad({parameters[2], parameters[3]}, optim::AdagradOptions(0.02).lr_decay(0.3));
  optim::AdamW adamw({parameters[4]}, optim::AdamWOptions(0.01).weight_decay(0.1));
  optim::RMSprop rmsprop({parameters[5]}, optim::RMSpropOptions(0.01).momentum(0.9).centered(true));
  const std::vector<optim::Optimizer*> optimizers = {&adam, &adagrad, &adamw, &rmsprop};
  const auto step = [&](const torch::Tensor& x, const torch::Tensor& y) {
    for (auto* each : optimizers) each->zero_grad();
    const auto loss = torch::mse_loss(net->forward(x), y);
    loss.backward();
    adam.step();
    adagrad.step();
    adamw.step();
    rmsprop.step();
    return loss.detach();
  };
  const auto x = torch::randn({8, 6}), y = torch::randn({8, 1});
  const auto lazy_x = x.to(torch::kLazy), lazy_y = y.to(torch::kLazy);
  // Counters are far apart, and do not begin at zero.
  for (int k = 0; k < 3; ++k) {
    torch::mse_loss(net->forward(lazy_x), lazy_y).backward();
    adam.step();
  }
  const auto write = [&](const std::string& to, Weights weights) {
    export_package(step, std::tuple(lazy_x, lazy_y), to,
                   {.weights = weights, .weight_names = named_tensors(*net), .training_step = true,
                    .optimizers = optimizers});
  };
  const std::string file = path("step.pt2"), stored = path("stored.pt2");
  write(file, GetParam());
  LoadOptions options;
  if (GetParam() == Weights::kNotStored) {
    write(stored, Weights::kInFile);
    options.weights_of = load_package(stored);
  }
  const auto loaded = load_package(file, options);
  const auto& state = static_cast<optim::AdamParamState&>(*adam.state().at(parameters[0].unsafeGetTensorImpl()));
  EXPECT_GT(state.step(), 4);
  EXPECT_EQ(loaded->named_buffers()["optimizer_step_0"].item<double>(), static_cast<double>(state.step()));
  constexpr int kSteps = 8;
  for (int k = 0; k < kSteps; ++k) {
    const auto loss = loaded->run({x.to(eager_device()), y.to(eager_device())}).at(0);
    expect_close(step(lazy_x, lazy_y), loss, 100);
  }
  EXPECT_EQ(loaded->named_buffers()["optimizer_step_0"].item<double>(), static_cast<double>(state.step()));
  EXPECT_EQ(loaded->named_buffers()["optimizer_step_3"].item<double>() + 3, static_cast<double>(state.step()));
  expect_close(loaded->named_buffers()["0.weight_exp_avg"], state.exp_avg(), 100);
  for (const char* name : {"0.bias_max_exp_avg_sq", "2.weight_sum", "4.weight_exp_avg_sq", "4.bias_grad_avg"}) {
    EXPECT_TRUE(loaded->named_buffers().contains(name)) << name;
  }
  for (const auto& each : net->named_parameters()) {
    expect_close(loaded->named_parameters()[each.key()], each.value(), 100);
  }
}

TEST_F(LazySizes, AStepOfAdamIsExportedWithASizeThatChanges) {
  const std::string folder = make_folder("adam-step"), file = folder + "/step.pt2";
  torch::nn::Linear net(5, 3);
  net->to(torch::kLazy);
  torch::optim::Adam adam(net->parameters(), torch::optim::AdamOptions(0.01));
  const auto step = [&](const torch::Tensor& x) {
    adam.zero_grad();
    const auto loss = net->forward(x).square().sum();
    loss.backward();
    adam.step();
    return loss.detach();
  };
  auto x = torch::randn({6, 5}).to(torch::kLazy);
  mark_dynamic(x, 0, {.name = "batch", .most = 64});
  export_package(step, std::tuple(x), file,
                 {.weight_names = named_tensors(*net), .training_step = true, .optimizers = {&adam}});
  const auto loaded = load_package(file);
  for (const int64_t batch : {9, 2, 6, 17}) {
    const auto other = torch::randn({batch, 5});
    const auto loss = loaded->run({other.to(eager_device())}).at(0);
    expect_close(step(other.to(torch::kLazy)), loss, 100);
  }
  expect_close(loaded->named_parameters()["weight"], net->weight, 100);
  std::filesystem::remove_all(folder);
}

TEST_P(PackagedWeights, TwoProgramsOfOneModelShareThem) {
  torch::nn::Linear net(64, 64);
  const auto x = torch::randn({3, 64}), row = torch::randn({1, 64});
  net->to(torch::kLazy);
  const auto file = path("shared.pt2");
  const auto size = [&] { return std::filesystem::file_size(file); };
  const auto write = [&](const torch::Tensor& example, const std::string& entry) {
    const auto function = [&](const torch::Tensor& t) { return torch::relu(net->forward(t)); };
    export_package(function, std::tuple(example.to(torch::kLazy)), file,
                   {.entry = entry, .add_to_file = true, .weights = GetParam(), .weight_names = named_tensors(*net)});
  };
  write(x, "prefill");
  const auto before = size();
  write(row, "decode");
  const auto grown = size() - before;
  constexpr size_t kBytes = 64 * 64 * sizeof(float);
  if (GetParam() == Weights::kInFile) {
    EXPECT_LT(grown + kBytes, before);
  }

  const auto prefill = load_package(file, {.entry = "prefill", .weights_of = net.ptr()});
  const auto decode = load_package(file, {.entry = "decode", .weights_of = prefill});
  torch::NoGradGuard no_grad;
  const auto expect_same = [&] {
    expect_close(prefill->forward(x.to(torch::kLazy)), torch::relu(net->forward(x.to(torch::kLazy))), 10);
    expect_close(decode->forward(row.to(torch::kLazy)), torch::relu(net->forward(row.to(torch::kLazy))), 10);
  };
  expect_same();
  net->weight.mul_(0.5);  // one tensor of three modules
  expect_same();

  write(row, "prefill");  // in its place
  write(row, "decode");
  EXPECT_LT(size(), before + grown + 4096);
  net->to(eager_device());
  if (GetParam() != Weights::kInFile || !eager_device().is_cpu()) return;
  const double expected = torch::relu(net->forward(torch::ones({1, 64})))[0].sum().item<double>();
  const std::string script =
      "import torch\n"
      "from torch.export.pt2_archive._package import load_pt2\n"
      "y = load_pt2('" + file + "', load_weights_from_disk=True).aoti_runners['decode'](torch.ones(1, 64))\n"
      "y = y[0] if isinstance(y, (list, tuple)) else y\n"
      "assert abs(y.sum().item() - " + std::to_string(expected) + ") < 1e-3, y\n";
  const Ended ended = run_python(script);
  EXPECT_EQ(ended.status, 0) << ended.output;
}

TEST_P(PackagedWeights, ThoseWithoutNamesAreTheProgramsOwn) {
  torch::NoGradGuard no_grad;
  const auto a = torch::randn({4}).to(torch::kLazy), b = torch::randn({1, 4}).to(torch::kLazy).expand({3, 4});
  const auto x = torch::randn({3, 4}), y = torch::randn({3, 4});
  const auto one = [&](const torch::Tensor& t) { return (t - a) * b; };
  const auto two = [&](const torch::Tensor& t, const torch::Tensor& u) { return (t * u - a) * b; };
  const auto lazy_x = x.to(torch::kLazy), lazy_y = y.to(torch::kLazy);
  export_package(one, std::tuple(lazy_x), path("own.pt2"), {.entry = "one", .weights = GetParam()});
  export_package(two, std::tuple(lazy_x, lazy_y), path("own.pt2"),
                 {.entry = "two", .add_to_file = true, .weights = GetParam()});
  if (GetParam() == Weights::kNotStored) return;
  const auto first = load_package(path("own.pt2"), {.entry = "one"});
  const auto second = load_package(path("own.pt2"), {.entry = "two", .weights_of = first});
  expect_close(first->run({x.to(eager_device())}).at(0), one(lazy_x), 10);
  expect_close(second->run({x.to(eager_device()), y.to(eager_device())}).at(0), two(lazy_x, lazy_y), 10);
}

INSTANTIATE_TEST_SUITE_P(Each, PackagedWeights,
                         ::testing::Values(Weights::kInProgram, Weights::kInFile, Weights::kNotStored),
                         [](const auto& place) {
                           return place.param == Weights::kInProgram ? "InTheProgram"
                                  : place.param == Weights::kInFile  ? "InTheFile"
                                                                     : "Nowhere";
                         });

TEST_P(PackagedWeights, WhatATrainingStepMayNotDo) {
  torch::nn::Linear net(4, 2);
  net->to(torch::kLazy);
  const auto x = torch::randn({3, 4}).to(torch::kLazy);
  torch::optim::Adam adam(net->parameters(), torch::optim::AdamOptions(1e-3));
  const auto step = [&](const torch::Tensor& t) {
    adam.zero_grad();
    const auto loss = net->forward(t).square().mean();
    loss.backward();
    adam.step();
    return loss.detach();
  };
  expect_error([&] { export_package(step, std::tuple(x), path("adam.pt2"), {.weights = GetParam(), .training_step = true}); },
               "does not do the same in each call");
  const auto decays = [&](const torch::Tensor& t) {
    for (auto& group : adam.param_groups()) group.options().set_lr(group.options().get_lr() * 0.9);
    return step(t);
  };
  expect_error([&] { export_package(decays, std::tuple(x), path("adam.pt2"), {.training_step = true, .optimizers = {&adam}}); },
               "it changes an optimizer's options");
  const auto named_twice = [&](const torch::Tensor& t) { return net->forward(t); };
  const NamedTensors names{{"w", net->weight}, {"w", net->bias}};
  expect_error<c10::ValueError>(
      [&] { export_package(named_twice, std::tuple(x), path("names.pt2"), {.weight_names = names}); },
      "two weights are called 'w'");
  auto state = torch::zeros({2}).to(torch::kLazy);
  const auto rebinds = [&](const torch::Tensor& t) {
    state = state * 0.9 + net->forward(t).detach().sum(0);
    return state * 2;
  };
  expect_error([&] { export_package(rebinds, std::tuple(x), path("rebinds.pt2"), {.weights = GetParam(), .training_step = true}); },
               "a tensor that is another in each call");
  EXPECT_FALSE(std::filesystem::exists(path("adam.pt2")) || std::filesystem::exists(path("rebinds.pt2")));
}

}  // namespace
}  // namespace reprise::test
