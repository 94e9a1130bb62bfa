// Explicit compile: functions that are replayed by one call.
#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include <functional>
#include <map>
#include <thread>

#include "tests/expect_error.h"
#include "tests/sized_steps.h"

namespace reprise::test {
namespace {

using Functions = LazySizes;

/// Times that a function's body has been run.
struct Count {
  std::shared_ptr<int> runs = std::make_shared<int>(0);
  void operator()() const { ++*runs; }
};

/// Calls `function` with what `arguments(seed)` gives, compares each result with eager's, and
/// returns how often it was replayed.
template <class Function, class Eager, class Arguments>
uint64_t expect_replays(const Function& function, const Eager& eager, const Arguments& arguments,
                        int calls = 12, double tolerance = 10) {
  const Statistics before = statistics();
  for (int call = 0; call < calls; ++call) {
    SCOPED_TRACE(c10::str("call ", call));
    const Tensors expected = eager(arguments(eager_device(), call));
    const Tensors actual = function(arguments(torch::kLazy, call));
    expect_all_close(actual, expected, tolerance);
    mark_step();
    wait_for_compiles();
  }
  return since(before).segments_replayed;
}

TEST_F(Functions, AreReplayedWithoutBeingRun) {
  const Count count;
  const auto function = [=](const Tensors& in) -> Tensors {
    count();
    auto x = in[0];
    for (int k = 0; k < 20; ++k) x = (x * 1.5 + in[1]).tanh();
    return {x, x.sum(0)};
  };
  const auto compiled = compile(function, {.name = "chain"});
  expect_replays(compiled, function, [](torch::Device device, int call) -> Tensors {
    return {given(device, {6, 5}, call), given(device, {5}, 100 + call)};
  });
  const int traced = *count.runs - 12;  // eager runs it too
  EXPECT_GE(traced, 2);
  EXPECT_LE(traced, 7) << explain();
  EXPECT_NE(explain().find("chain: 1 keys, run "), std::string::npos) << explain();
}

TEST_F(Functions, TakeAndReturnNestedValues) {
  using Map = std::map<std::string, torch::Tensor>;
  const auto function = [](const torch::Tensor& x, const std::optional<torch::Tensor>& bias,
                           const Map& named, double factor, bool flip, const std::string& mode) {
    auto y = x * factor;
    if (bias) y = y + *bias;
    for (int k = 0; k < 12; ++k) y = (y + named.at("shift")).sin();
    if (flip) y = y.flip(0);
    if (mode == "sum") y = y.sum(0);
    return std::tuple(y, std::vector<torch::Tensor>{y + 1, y + 2},
                      Map{{"a", y * 3}, {"b", named.at("shift")}}, std::optional<torch::Tensor>());
  };
  const auto compiled = compile(function);
  const auto run = [&](const auto& call, torch::Device device, int seed, double factor, bool flip,
                       const std::string& mode) -> Tensors {
    const auto x = given(device, {4, 3}, seed), shift = given(device, {3}, seed + 50);
    const auto bias = flip ? std::optional(given(device, {3}, seed + 70)) : std::nullopt;
    const auto [y, list, map, none] = call(x, bias, Map{{"shift", shift}}, factor, flip, mode);
    EXPECT_FALSE(none.has_value());
    return {y, list.at(0), list.at(1), map.at("a"), map.at("b")};
  };
  const Statistics before = statistics();
  for (int call = 0; call < 36; ++call) {
    SCOPED_TRACE(call);
    const double factor = call % 2 == 0 ? 0.5 : 2;
    const bool flip = call % 3 == 0;
    const std::string mode = call % 4 < 2 ? "sum" : "keep";
    const Tensors expected = run(function, eager_device(), call, factor, flip, mode);
    expect_all_close(run(compiled, torch::kLazy, call, factor, flip, mode), expected, 10);
    mark_step();
    wait_for_compiles();
  }
  EXPECT_GE(since(before).segments_replayed, 1u) << explain();
}

TEST_F(Functions, ModulesFollowTheirModeAndTheirParameters) {
  const auto make = [](torch::Device device) {
    torch::manual_seed(0);
    torch::nn::Sequential net(torch::nn::Linear(5, 16), torch::nn::BatchNorm1d(16), torch::nn::ReLU(),
                              torch::nn::Linear(16, 16), torch::nn::Tanh(), torch::nn::Linear(16, 2));
    net->to(device);
    return net;
  };
  auto eager = make(eager_device());
  auto lazy = make(torch::kLazy);
  torch::NoGradGuard no_grad;
  const auto compiled = compile(lazy, {.name = "net"});
  const Statistics before = statistics();
  for (int call = 0; call < 40; ++call) {
    SCOPED_TRACE(call);
    const bool training = (call / 10) % 2 == 0;
    eager->train(training);
    lazy->train(training);
    if (call == 15) {  // in place: seen
      for (auto* net : {&eager, &lazy}) {
        for (auto& parameter : (*net)->parameters()) parameter.mul_(1.25);
      }
    }
    if (call == 18) {  // other storages: noticed
      for (auto* net : {&eager, &lazy}) {
        for (auto& parameter : (*net)->parameters()) parameter.set_data(parameter * 0.5);
      }
    }
    expect_close(compiled(given(torch::kLazy, {8, 5}, call)),
                 eager->forward(given(eager_device(), {8, 5}, call)), 20);
    expect_all_close(state_of(*lazy), state_of(*eager), 20);
    mark_step();
    wait_for_compiles();
  }
  EXPECT_GE(since(before).segments_replayed, 10u) << explain();
  EXPECT_NE(explain().find("net: 2 keys, run "), std::string::npos) << explain();
}

TEST_F(Functions, AnyModulesAndSharedPointersToo) {
  torch::NoGradGuard no_grad;
  torch::nn::Linear net(3, 2);
  net->to(torch::kLazy);
  const torch::nn::AnyModule any(net);
  const auto of_any = compile(any);
  const auto of_pointer = compile(net.ptr());
  const auto x = given(torch::kLazy, {4, 3}, 1);
  const auto expected = net->forward(x).cpu();
  for (int call = 0; call < 6; ++call) {
    expect_close(of_any(x), expected, 10);
    expect_close(of_pointer(x), expected, 10);
    wait_for_compiles();
  }
}

TEST_F(Functions, WholeTrainingStepsLeaveGradientsAndUpdates) {
  const auto make = [](torch::Device device) {
    torch::manual_seed(0);
    torch::nn::Sequential net(torch::nn::Linear(5, 16), torch::nn::ReLU(), torch::nn::Linear(16, 2));
    net->to(device);
    auto optimizer = std::make_shared<torch::optim::SGD>(
        net->parameters(), torch::optim::SGDOptions(0.05).momentum(0.9));
    const auto step = [=](const torch::Tensor& x, const torch::Tensor& y) mutable {
      optimizer->zero_grad();
      const auto loss = torch::mse_loss(net->forward(x), y);
      loss.backward();
      optimizer->step();
      return loss.detach();
    };
    return std::pair(net, step);
  };
  auto [eager_net, eager] = make(eager_device());
  auto [lazy_net, body] = make(torch::kLazy);
  const auto compiled = compile(body, {.name = "training"});
  const Statistics before = statistics();
  torch::Tensor kept, kept_eager;
  for (int call = 0; call < 24; ++call) {
    SCOPED_TRACE(call);
    const auto expected = eager(given(eager_device(), {8, 5}, call), given(eager_device(), {8, 2}, 99 - call));
    const auto actual = compiled(given(torch::kLazy, {8, 5}, call), given(torch::kLazy, {8, 2}, 99 - call));
    expect_close(actual, expected, 50);
    expect_all_close(state_of(*lazy_net), state_of(*eager_net), 50);
    expect_all_close(gradients_of(*lazy_net), gradients_of(*eager_net), 50);
    if (call == 18) {  // a gradient that somebody keeps stays what it is
      kept = lazy_net->parameters()[0].grad();
      kept_eager = eager_net->parameters()[0].grad().clone();
    }
    mark_step();
    wait_for_compiles();
  }
  expect_close(kept, kept_eager, 50);
  EXPECT_GE(since(before).segments_replayed, 10u) << explain();
  EXPECT_EQ(explain().find("not replayed"), std::string::npos) << explain();
}

using OptimizerPtr = std::shared_ptr<torch::optim::Optimizer>;
using MakeOptimizer = std::function<OptimizerPtr(std::vector<torch::Tensor>)>;

/// A small network, its optimizer, and a training step of both.
struct Training {
  torch::nn::Sequential net;
  OptimizerPtr optimizer;

  Training(torch::Device device, const MakeOptimizer& make) {
    torch::manual_seed(0);
    net = torch::nn::Sequential(torch::nn::Linear(5, 16), torch::nn::Tanh(), torch::nn::Linear(16, 2));
    net->to(device);
    optimizer = make(net->parameters());
  }

  auto step() const {
    return [net = net, optimizer = optimizer](const torch::Tensor& x, const torch::Tensor& y) mutable {
      optimizer->zero_grad();
      const auto loss = torch::mse_loss(net->forward(x), y);
      loss.backward();
      optimizer->step();
      return loss.detach();
    };
  }
  void set_rate(double rate) const {
    for (auto& group : optimizer->param_groups()) group.options().set_lr(rate);
  }
};

/// Trains on eager and, compiled, on lazy, and compares; `between` is called before each call
/// with both. Returns how many calls were replayed.
uint64_t expect_trains(const MakeOptimizer& make, const std::function<void(int, Training&)>& between,
                       int calls = 24) {
  Training eager(eager_device(), make), lazy(torch::kLazy, make);
  auto eager_step = eager.step();
  const auto compiled = compile(lazy.step(), {.optimizers = {lazy.optimizer.get()}});
  const Statistics before = statistics();
  for (int call = 0; call < calls; ++call) {
    SCOPED_TRACE(call);
    between(call, eager);
    between(call, lazy);
    const auto expected =
        eager_step(given(eager_device(), {8, 5}, call), given(eager_device(), {8, 2}, 99 - call));
    const auto actual =
        compiled(given(torch::kLazy, {8, 5}, call), given(torch::kLazy, {8, 2}, 99 - call));
    expect_close(actual, expected, 100);
    expect_all_close(state_of(*lazy.net), state_of(*eager.net), 100);
    expect_all_close(gradients_of(*lazy.net), gradients_of(*eager.net), 100);
    mark_step();
    wait_for_compiles();
  }
  return since(before).segments_replayed;
}

template <class Optimizer, class Options>
MakeOptimizer with(const Options& options) {
  return [=](std::vector<torch::Tensor> parameters) {
    return std::make_shared<Optimizer>(std::move(parameters), options);
  };
}

namespace optim = torch::optim;

std::vector<std::pair<const char*, MakeOptimizer>> optimizers() {
  return {
      {"SGD", with<optim::SGD>(optim::SGDOptions(0.05).momentum(0.9).nesterov(true).weight_decay(0.01))},
      {"Adam", with<optim::Adam>(optim::AdamOptions(0.01).weight_decay(0.02))},
      {"AdamW", with<optim::AdamW>(optim::AdamWOptions(0.01).amsgrad(true))},
      {"Adagrad", with<optim::Adagrad>(optim::AdagradOptions(0.05).lr_decay(0.1))},
      {"RMSprop", with<optim::RMSprop>(optim::RMSpropOptions(0.01).momentum(0.5).centered(true))},
  };
}

TEST_F(Functions, WholeTrainingStepsWithAnyOptimizerOfTheLibrary) {
  for (const auto& [name, make] : optimizers()) {
    SCOPED_TRACE(name);
    EXPECT_GE(expect_trains(make, [](int, Training&) {}), 12u) << explain();
    EXPECT_EQ(explain().find("not replayed"), std::string::npos) << explain();
  }
}

TEST_F(Functions, LearningRatesThatAreSetBetweenCallsAreSeen) {
  for (const auto& [name, make] : optimizers()) {
    SCOPED_TRACE(name);
    const auto each_call = [](int call, Training& training) { training.set_rate(0.02 / (1 + call)); };
    EXPECT_GE(expect_trains(make, each_call), 12u) << explain();
    // A rate for some calls: after the first change, another takes no run of the function.
    const auto now_and_then = [](int call, Training& training) {
      if (call % 12 == 0) training.set_rate(0.02 / (1 + call));
    };
    EXPECT_GE(expect_trains(make, now_and_then, 60), 40u) << explain();
    EXPECT_EQ(explain().find("not replayed"), std::string::npos) << explain();
  }
}

TEST_F(Functions, GroupsHaveNumbersOfTheirOwn) {
  const auto make = [](const std::vector<torch::Tensor>& parameters) -> OptimizerPtr {
    std::vector<optim::OptimizerParamGroup> groups;
    groups.emplace_back(std::vector{parameters[0], parameters[1]},
                        std::make_unique<optim::AdamWOptions>(0.01));
    groups.emplace_back(std::vector{parameters[2], parameters[3]},
                        std::make_unique<optim::AdamWOptions>(optim::AdamWOptions(0.01).betas({0.8, 0.9})));
    return std::make_shared<optim::AdamW>(groups, optim::AdamWOptions());
  };
  const auto second_alone = [](int call, Training& training) {
    if (call > 5) training.optimizer->param_groups()[1].options().set_lr(0.03 / call);
  };
  EXPECT_GE(expect_trains(make, second_alone), 8u) << explain();
}

TEST_F(Functions, OptimizersGoOnCounting) {
  Training training(torch::kLazy, with<optim::Adam>(optim::AdamOptions(0.01)));
  const auto compiled = compile(training.step(), {.optimizers = {training.optimizer.get()}});
  for (int call = 0; call < 16; ++call) {
    compiled(given(torch::kLazy, {8, 5}, call), given(torch::kLazy, {8, 2}, call));
    mark_step();
    wait_for_compiles();
  }
  for (const auto& parameter : training.net->parameters()) {
    auto& state = *training.optimizer->state().at(parameter.unsafeGetTensorImpl());
    EXPECT_EQ(static_cast<optim::AdamParamState&>(state).step(), 16);
  }
}

TEST_F(Functions, WhatIsDoneToAnOptimizerBetweenCallsIsSeen) {
  const auto make = with<optim::AdamW>(optim::AdamWOptions(0.01));
  const auto between = [&](int call, Training& training) {
    auto& optimizer = *training.optimizer;
    auto& options = static_cast<optim::AdamWOptions&>(optimizer.param_groups()[0].options());
    if (call == 14) options.weight_decay(0.3);
    if (call == 24) options.betas({0.7, 0.99});
    if (call == 34) {  // as a checkpoint is loaded
      for (const auto& parameter : training.net->parameters()) {
        auto& state = optimizer.state().at(parameter.unsafeGetTensorImpl());
        const auto& now = static_cast<optim::AdamWParamState&>(*state);
        auto loaded = std::make_unique<optim::AdamWParamState>();
        loaded->step(4);
        loaded->exp_avg(now.exp_avg() * 0.5);
        loaded->exp_avg_sq(now.exp_avg_sq() + 0.25);
        state = std::move(loaded);
      }
    }
    if (call == 44) optimizer.state().clear();
  };
  EXPECT_GE(expect_trains(make, between, 60), 20u) << explain();
}

TEST_F(Functions, WhatAnOptimizerDoesOtherwiseKeepsItRunning) {
  struct Own : optim::SGD {
    using SGD::SGD;
  };
  const auto reason_of = [&](const MakeOptimizer& make, const auto& also) {
    Training training(torch::kLazy, make);
    const auto body = [step = training.step(), also, training](const torch::Tensor& x,
                                                               const torch::Tensor& y) mutable {
      const auto loss = step(x, y);
      also(training);
      return loss;
    };
    const auto compiled = compile(body, {.optimizers = {training.optimizer.get()}});
    for (int call = 0; call < 8; ++call) {
      compiled(given(torch::kLazy, {8, 5}, call), given(torch::kLazy, {8, 2}, call));
      mark_step();
      wait_for_compiles();
    }
    return explain();
  };
  const auto sgd = with<optim::SGD>(optim::SGDOptions(0.1)), adam = with<optim::Adam>(optim::AdamOptions(0.1));
  const auto nothing = [](Training&) {};
  EXPECT_NE(reason_of(with<Own>(optim::SGDOptions(0.1)), nothing).find("is of no class whose numbers"),
            std::string::npos)
      << explain();
  EXPECT_NE(reason_of(sgd, [](Training& t) { t.set_rate(0.2 + t.optimizer->param_groups()[0].options().get_lr()); })
                .find("it changes an optimizer's options"),
            std::string::npos)
      << explain();
  EXPECT_NE(reason_of(adam, [](Training& t) { t.optimizer->step(); }).find("takes several steps"),
            std::string::npos)
      << explain();
}

TEST_F(Functions, GiveViewsAndArgumentsAgain) {
  const auto function = [](const Tensors& in) -> Tensors {
    auto y = in[0] * 2;
    for (int k = 0; k < 20; ++k) y = y.sin();
    in[1].add_(y);  // an argument is written
    return {y.t(), y, in[1], in[0].narrow(0, 1, 2), torch::Tensor()};
  };
  const auto compiled = compile(function);
  const Statistics before = statistics();
  for (int call = 0; call < 12; ++call) {
    SCOPED_TRACE(call);
    Tensors in{given(torch::kLazy, {4, 3}, call), given(torch::kLazy, {4, 3}, call + 50)};
    const Tensors eager_in{in[0].cpu().clone(), in[1].cpu().clone()};
    const auto version = in[1]._version();
    const Tensors expected = function(eager_in);
    const Tensors actual = compiled(in);
    ASSERT_FALSE(actual[4].defined());
    EXPECT_GT(in[1]._version(), version);
    for (size_t k = 0; k < 4; ++k) expect_close(actual[k], expected[k], 10);
    expect_close(in[1], eager_in[1], 10);
    EXPECT_TRUE(actual[0].is_alias_of(actual[1]));
    EXPECT_TRUE(actual[2].is_alias_of(in[1]));
    EXPECT_TRUE(actual[3].is_alias_of(in[0]));
    wait_for_compiles();
  }
  EXPECT_GE(since(before).segments_replayed, 5u) << explain();
}

TEST_F(Functions, DrawEagersRandomNumbers) {
  const auto function = [](const Tensors& in) -> Tensors {
    auto y = in[0] + torch::randn_like(in[0]);
    for (int k = 0; k < 20; ++k) y = y.tanh();
    return {torch::dropout(y, 0.5, true), torch::rand({3}, in[0].options())};
  };
  EXPECT_GE(expect_replays(compile(function), function,
                           [](torch::Device device, int call) -> Tensors {
                             return {given(device, {4, 3}, call)};
                           }),
            5u)
      << explain();
}

TEST_F(Functions, AnotherKeyIsTracedAnew) {
  const auto function = [](const Tensors& in) -> Tensors {
    auto y = in[0] + in[1];
    for (int k = 0; k < 20; ++k) y = y.tanh();
    return {y};
  };
  const auto compiled = compile(function, {.name = "keys"});
  const auto arguments = [](torch::Device device, int call) -> Tensors {
    const auto x = given(device, {call % 3 + 2, 3}, call).to(call % 4 == 0 ? torch::kDouble : torch::kFloat);
    return {x, call % 2 == 0 ? x : x + 1};  // the same tensor twice is another key
  };
  EXPECT_GE(expect_replays(compiled, function, arguments, 96), 24u) << explain();
}

TEST_F(Functions, AReadInTheMiddleIsSaid) {
  const auto function = [](const Tensors& in) -> Tensors {
    auto y = in[0] * 2;
    if (y.sum().item<double>() > 0) y = y + 1;
    for (int k = 0; k < 20; ++k) y = y.tanh();
    return {y};
  };
  const auto compiled = compile(function, {.name = "reader"});
  expect_replays(compiled, function, [](torch::Device device, int call) -> Tensors {
    return {given(device, {4, 3}, call)};
  });
  EXPECT_NE(explain().find("not replayed: not one program: "), std::string::npos) << explain();

  const auto strict = compile(function, {.name = "strict", .fullgraph = true});
  for (int call = 0; call < 2; ++call) {
    try {
      strict(Tensors{given(torch::kLazy, {4, 3}, call)});
      ADD_FAILURE() << "nothing was thrown";
    } catch (const c10::Error& error) {
      EXPECT_NE(std::string(error.what()).find("strict cannot be replayed as one program"),
                std::string::npos)
          << error.what();
    }
    // The program goes on.
    expect_same_bits(given(torch::kLazy, {2}, call) + 1, given(eager_device(), {2}, call) + 1);
  }
}

TEST_F(Functions, AChangingNumberIsSaid) {
  auto factor = std::make_shared<double>(1);
  const auto function = [=](const Tensors& in) -> Tensors {
    auto y = in[0] * *factor;
    for (int k = 0; k < 20; ++k) y = y.tanh();
    return {y};
  };
  const auto compiled = compile(function);
  expect_replays(compiled, function, [=](torch::Device device, int call) -> Tensors {
    *factor = 1 + call * 0.25;
    return {given(device, {4, 3}, call)};
  });
  EXPECT_NE(explain().find("a number in it changes from call to call"), std::string::npos) << explain();
}

TEST_F(Functions, WhatItKeepsIsSaid) {
  auto kept = std::make_shared<torch::Tensor>();
  const auto function = [=](const Tensors& in) -> Tensors {
    auto y = in[0] * 2;
    for (int k = 0; k < 20; ++k) y = y.tanh();
    if (y.is_lazy()) *kept = y + 1;
    return {y};
  };
  const auto compiled = compile(function);
  expect_replays(compiled, function, [=](torch::Device device, int call) -> Tensors {
    return {given(device, {4, 3}, call)};
  });
  expect_close(*kept, function(Tensors{given(eager_device(), {4, 3}, 11)})[0] + 1, 10);
  EXPECT_NE(explain().find("it keeps a tensor that it has made"), std::string::npos) << explain();
}

TEST_F(Functions, FreshTensorsOfTheHostAreSaid) {
  auto call_number = std::make_shared<int>(0);
  const auto function = [=](const Tensors& in) -> Tensors {
    auto y = in[0] * torch::full({3}, *call_number).to(in[0].device());
    for (int k = 0; k < 20; ++k) y = y.tanh();
    return {y};
  };
  const auto compiled = compile(function);
  expect_replays(compiled, function, [=](torch::Device device, int call) -> Tensors {
    *call_number = call;
    return {given(device, {4, 3}, call)};
  });
  EXPECT_NE(explain().find("another in each call and no argument"), std::string::npos) << explain();
}

/// Losses of steps whose forward pass is compiled; the loss and the optimizer are not.
template <class Forward>
Tensors train(torch::nn::Sequential net, const Forward& forward, torch::Device device, int steps) {
  torch::optim::SGD optimizer(net->parameters(), torch::optim::SGDOptions(0.05).momentum(0.9));
  Tensors losses;
  for (int step = 0; step < steps; ++step) {
    const auto x = given(device, {8, 6}, step), y = given(device, {8, 3}, 50 + step);
    const auto loss = (forward(x) - y).square().mean();
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    losses.push_back(loss.detach());
    if (!device.is_lazy()) continue;
    mark_step();
    wait_for_compiles();
  }
  return joined(losses, state_of(*net));
}

torch::nn::Sequential normed_net(torch::Device device) {
  torch::manual_seed(3);
  torch::nn::Sequential net(torch::nn::Linear(6, 16), torch::nn::BatchNorm1d(16), torch::nn::GELU(),
                            torch::nn::Linear(16, 16), torch::nn::Tanh(), torch::nn::Linear(16, 3));
  net->to(device);
  return net;
}

TEST_F(Functions, BothPassesOfADifferentiableFunctionAreReplayed) {
  auto eager = normed_net(eager_device()), lazy = normed_net(torch::kLazy);
  const auto expected = train(
      eager, [&](const torch::Tensor& x) { return eager->forward(x); }, eager_device(), 20);
  const Count count;
  const auto forward = compile(
      [=](const torch::Tensor& x) mutable {
        count();
        return lazy->forward(x);
      },
      {.name = "forward"});
  expect_all_close(train(lazy, forward, torch::kLazy, 20), expected, 200);
  EXPECT_LE(*count.runs, 9) << explain();
  EXPECT_EQ(explain().find("not replayed"), std::string::npos) << explain();
}

TEST_F(Functions, ArgumentsGetGradientsThroughReplayedPasses) {
  const Count count;
  const auto function = [=](const torch::Tensor& x, const torch::Tensor& w) -> Tensors {
    count();
    auto y = x;
    for (int k = 0; k < 12; ++k) y = torch::tanh(y.matmul(w)) + x;
    return {y, y.sum(0), (y > 0).to(torch::kLong), x};
  };
  const auto compiled = compile(function);
  for (int call = 0; call < 14; ++call) {
    SCOPED_TRACE(call);
    const auto run = [&](const auto& f, torch::Device device) -> Tensors {
      auto base = given(device, {5, 4}, call).requires_grad_();
      auto w = given(device, {4, 4}, 30).requires_grad_();
      const auto x = base * 2;  // no leaf
      const Tensors made = f(x, w);
      // Gradients of several layouts, some of none.
      auto loss = made[0].sum() + made[3].select(1, 0).sum();
      if (call % 3 == 1) loss = loss + (made[1] * given(device, {4}, 60)).sum();
      if (call % 3 == 2) loss = made[0].t().matmul(given(device, {5, 2}, 70)).sum();
      loss.backward();
      return {made[0], made[1], made[2], base.grad(), w.grad()};
    };
    const Tensors expected = run(function, eager_device());
    const int before = *count.runs;
    expect_all_close(run(compiled, torch::kLazy), expected, 100);
    EXPECT_TRUE(call < 10 || *count.runs == before) << explain();
    mark_step();
    wait_for_compiles();
  }
}

TEST_F(Functions, BackwardPassesAreRepeatedAndRefusedAsEagers) {
  const auto function = [](const torch::Tensor& x) {
    auto y = x;
    for (int k = 0; k < 12; ++k) y = y.sin() * 1.5;
    return y;
  };
  const auto compiled = compile(function, {.name = "waves"});
  const auto x = given(torch::kLazy, {6}, 1).requires_grad_();
  for (int call = 0; call < 12; ++call) {
    compiled(x).sum().backward();
    mark_step();
    wait_for_compiles();
  }
  const Statistics before = statistics();
  auto y = compiled(x);
  EXPECT_EQ(since(before).segments_replayed, 1u) << explain();
  const auto once = torch::autograd::grad({y.sum()}, {x}, {}, /*retain_graph=*/true)[0];
  const auto twice = torch::autograd::grad({y.sum()}, {x})[0];
  expect_close(twice, once, 1);
  EXPECT_THROW(torch::autograd::grad({y.sum()}, {x}), c10::Error);
  // What was saved must not have changed.
  const auto z = compiled(x);
  {
    torch::NoGradGuard no_grad;
    x.mul_(2);
  }
  expect_error([&] { z.sum().backward(); }, "modified by an inplace operation: tensor 0 among the arguments of waves");
}

TEST_F(Functions, AResultThatIsSavedMustNotChange) {
  const auto function = [](const torch::Tensor& x) {
    auto y = x;
    for (int k = 0; k < 12; ++k) y = torch::tanh(y * 1.5);  // whose gradient is made of its result
    return y;
  };
  const auto compiled = compile(function, {.name = "waves"});
  const auto x = given(torch::kLazy, {6}, 1).requires_grad_();
  for (int call = 0; call < 12; ++call) {
    const auto y = compiled(x);
    y.sum().backward();
    const auto changed = compiled(x);
    {
      torch::NoGradGuard no_grad;
      changed.mul_(2);
    }
    expect_error([&] { changed.sum().backward(); }, "modified by an inplace operation");
    mark_step();
    wait_for_compiles();
  }
  EXPECT_EQ(explain().find("not replayed"), std::string::npos) << explain();
}

/// A dozen ops.
torch::Tensor waves(torch::Tensor x) {
  for (int k = 0; k < 6; ++k) x = x.sin() * 1.5;
  return x;
}

/// Runs `make(device)` on both devices, then what it returns `calls` times on each, and compares.
template <class Make>
void expect_as_eager(const Make& make, int calls = 16) {
  auto eager = make(eager_device());
  auto lazy = make(torch::Device(torch::kLazy));
  for (int call = 0; call < calls; ++call) {
    SCOPED_TRACE(call);
    const Tensors expected = eager(call), actual = lazy(call);
    ASSERT_EQ(actual.size(), expected.size());
    for (size_t k = 0; k < actual.size(); ++k) {
      ASSERT_EQ(actual[k].defined(), expected[k].defined()) << "tensor " << k;
      if (actual[k].defined()) expect_close(actual[k], expected[k], 100);
    }
    mark_step();
    wait_for_compiles();
  }
}

/// `function` compiled on the lazy device, as it is on another.
template <class F>
std::function<std::invoke_result_t<F&, const torch::Tensor&>(const torch::Tensor&)> compiled_on(
    torch::Device device, F function) {
  if (!device.is_lazy()) return function;
  return compile(std::move(function));
}

TEST_F(Functions, WhatIsFrozenAndUnfrozenIsSeen) {
  expect_as_eager([](torch::Device device) {
    const auto a = given(device, {4}, 1).requires_grad_(), b = given(device, {4}, 2).requires_grad_();
    const auto f = compiled_on(device, [=](const torch::Tensor& x) { return waves(x * a) + waves(x * b); });
    return [=](int call) mutable -> Tensors {
      b.set_requires_grad(call / 8 % 2 == 1);
      if (call >= 24) a.set_requires_grad(false);
      a.mutable_grad() = b.mutable_grad() = torch::Tensor();
      const auto y = f(given(device, {3, 4}, call));
      if (y.requires_grad()) y.sum().backward();
      return {y.detach(), a.grad(), b.grad()};
    };
  }, 40);
}

TEST_F(Functions, GradientsAccumulateAsEagersDo) {
  const auto clearing = [](const std::function<bool(int call)>& clears) {
    return [clears](torch::Device device) {
      const auto w = given(device, {4}, 1).requires_grad_();
      const auto f = compiled_on(device, [=](const torch::Tensor& x) {
        const auto loss = waves(x * w).sum();
        loss.backward();
        return loss.detach();
      });
      return [=](int call) mutable -> Tensors {
        if (clears(call)) w.mutable_grad() = torch::Tensor();
        const auto loss = f(given(device, {3, 4}, call));
        return {loss, w.grad().clone()};
      };
    };
  };
  expect_as_eager(clearing([](int call) { return call < 10; }), 14);
  expect_as_eager(clearing([](int call) { return call % 3 == 0; }), 36);
  expect_as_eager(clearing([](int call) { return call != 12 && call != 20; }), 24);
}

TEST_F(Functions, NumbersAmongTheArgumentsAreSeen) {
  const auto function = [](const torch::Tensor& x, const torch::Tensor& by) { return waves(x * by); };
  const auto compiled = compile(function);
  for (int call = 0; call < 24; ++call) {
    SCOPED_TRACE(call);
    const auto by = torch::tensor(call < 12 ? 0.5F : 2.0F + static_cast<float>(call % 2));
    expect_close(compiled(given(torch::kLazy, {4}, call), by), function(given(eager_device(), {4}, call), by), 100);
    mark_step();
    wait_for_compiles();
  }
  const auto reads = compile([](const torch::Tensor& x, const torch::Tensor& host) {
    return waves(x) * host[1].item<double>();
  }, {.name = "reads"});
  for (int call = 0; call < 12; ++call) {
    const auto host = torch::tensor({1.0, 2.0 + call});
    expect_close(reads(given(torch::kLazy, {4}, 1), host), waves(given(eager_device(), {4}, 1)) * (2.0 + call), 100);
    mark_step();
    wait_for_compiles();
  }
  EXPECT_NE(explain().find("an argument is a tensor of another device"), std::string::npos) << explain();
}

TEST_F(Functions, AnArgumentThatWasACapturedTensorIsNotMistakenForIt) {
  expect_as_eager([](torch::Device device) {
    const auto w = given(device, {4}, 1), other = given(device, {4}, 2);
    const auto f = compiled_on(device, [=](const torch::Tensor& x) { return waves(x + w * 2); });
    return [=](int call) -> Tensors { return {f(call < 10 ? w : call % 2 == 0 ? other : w)}; };
  }, 20);
  expect_as_eager([](torch::Device device) {  // and one that is written
    const auto w = given(device, {4}, 1);
    const auto f = compiled_on(device, [=](const torch::Tensor& x) mutable {
      w.mul_(0.5);
      return waves(x + w);
    });
    return [=](int call) -> Tensors { return {f(call < 10 ? given(device, {4}, call) : w), w.clone()}; };
  }, 20);
}

TEST_F(Functions, AutocastIsPartOfTheKey) {
  torch::NoGradGuard no_grad;
  const auto type = eager_device().type();
  const auto cast = at::autocast::is_autocast_enabled(type);
  expect_as_eager([&](torch::Device device) {
    torch::manual_seed(0);
    torch::nn::Sequential net(torch::nn::Linear(4, 8), torch::nn::Tanh(), torch::nn::Linear(8, 3));
    net->to(device);
    const auto f = compiled_on(device, [=](const torch::Tensor& x) mutable { return net->forward(x); });
    return [=](int call) -> Tensors {
      at::autocast::set_autocast_enabled(type, call >= 8);
      auto y = f(given(device, {5, 4}, call));
      at::autocast::set_autocast_enabled(type, cast);
      at::autocast::clear_cache();
      if (call == 13) {
        for (auto& parameter : net->parameters()) parameter.mul_(0.5);
      }
      return {y, torch::full({1}, y.scalar_type() == torch::kBFloat16 ? 1.0 : 0.0)};
    };
  }, 20);
}

TEST_F(Functions, ResultsThatGetNoGradientGiveNone) {
  expect_as_eager([](torch::Device device) {
    const auto a = given(device, {4}, 1).requires_grad_(), b = given(device, {4}, 2).requires_grad_();
    const auto f = compiled_on(device, [=](const torch::Tensor& x) {
      return std::pair(waves(x * a), waves(x * b));
    });
    return [=](int call) mutable -> Tensors {
      a.mutable_grad() = b.mutable_grad() = torch::Tensor();
      const auto [first, second] = f(given(device, {3, 4}, call));
      if (call % 3 == 0) (first + second).sum().backward();
      if (call % 3 == 1) first.sum().backward();
      if (call % 3 == 2) second.sum().backward();
      return {first.detach(), a.grad(), b.grad()};
    };
  }, 24);
}

TEST_F(Functions, HooksOfTensorsRunOnce) {
  expect_as_eager([](torch::Device device) {
    const auto w = given(device, {4}, 1).requires_grad_();
    w.register_hook([](const torch::Tensor& gradient) { return gradient * 0.5; });
    const auto f = compiled_on(device, [=](const torch::Tensor& x) { return waves(x * w); });
    return [=](int call) mutable -> Tensors {
      w.mutable_grad() = torch::Tensor();
      const auto y = f(given(device, {3, 4}, call));
      y.sum().backward();
      return {y.detach(), w.grad()};
    };
  });
}

TEST_F(Functions, GradientsOfTwoLeavesAreTwo) {
  expect_as_eager([](torch::Device device) {
    const auto a = given(device, {4}, 1).requires_grad_(), b = given(device, {4}, 2).requires_grad_();
    const auto f = compiled_on(device, [=](const torch::Tensor& x) { return waves(x * (a + b)); });
    const auto sum = compiled_on(device, [=](const torch::Tensor& x) { return a + b + x; });
    return [=](int call) mutable -> Tensors {
      if (call % 4 == 0) a.mutable_grad() = b.mutable_grad() = torch::Tensor();
      f(given(device, {3, 4}, call)).sum().backward();
      if (call % 4 == 3) torch::nn::utils::clip_grad_norm_({a, b}, 0.1);
      const Tensors before{a.grad().clone(), b.grad().clone()};
      a.mutable_grad() = b.mutable_grad() = torch::Tensor();
      const auto gradient = given(device, {4}, call + 50);
      sum(given(device, {4}, call)).backward(gradient);
      sum(given(device, {4}, call)).backward(gradient);
      return joined(before, {a.grad().clone(), b.grad().clone(), gradient});
    };
  });
}

TEST_F(Functions, ViewsOfFreshRandomNumbersAreReturned) {
  const auto f = compile([](const torch::Tensor& x) {
    const auto numbers = torch::rand({6}, x.options());
    return Tensors{waves(x), numbers.view({2, 3}), numbers};
  });
  for (int call = 0; call < 10; ++call) {
    const Tensors made = f(given(torch::kLazy, {4}, call));
    EXPECT_EQ(made[1].sizes(), torch::IntArrayRef({2, 3}));
    EXPECT_TRUE(made[1].is_alias_of(made[2]));
    expect_close(made[1].flatten(), made[2], 1);
    mark_step();
    wait_for_compiles();
  }
}

TEST_F(Functions, AfterAReasonThatPassesTensorsAreWatched) {
  expect_as_eager([](torch::Device device) {
    auto w = given(device, {4}, 1);
    const auto by = std::make_shared<double>(1);
    const auto f = compiled_on(device, [=](const torch::Tensor& x) { return waves(x * w * *by); });
    return [=](int call) mutable -> Tensors {
      if (call < 10) *by = 1 + call;
      if (call == 24) w.set_data(w * 0);
      return {f(given(device, {4}, call))};
    };
  }, 28);
}

TEST_F(Functions, WhatChangesEverySecondCallIsSeen) {
  expect_as_eager([](torch::Device device) {
    const auto a = given(device, {4}, 1), b = given(device, {4}, 2);
    const auto number = std::make_shared<int>(0);
    const auto f = compiled_on(device, [=](const torch::Tensor& x) {
      const bool odd = *number % 2 == 1;
      return waves(x + (odd ? a : b)) * (odd ? 0.5 : 2.0);
    });
    return [=](int call) -> Tensors {
      *number = call;
      return {f(given(device, {4}, call))};
    };
  }, 40);
}

TEST_F(Functions, BackwardPassesMayBeRunTwiceInEachCall) {
  expect_as_eager([](torch::Device device) {
    const auto w = given(device, {4}, 1).requires_grad_();
    const auto f = compiled_on(device, [=](const torch::Tensor& x) { return waves(x + w).sum(); });
    return [=](int call) mutable -> Tensors {
      w.mutable_grad() = torch::Tensor();
      const auto y = f(given(device, {3, 4}, call));
      y.backward({}, /*retain_graph=*/true);
      y.backward();
      return {y.detach(), w.grad()};
    };
  }, 30);
}

TEST_F(Functions, EachBatchMayBeUsedTwice) {
  const auto f = compile([](const torch::Tensor& x) { return waves(x); });
  const Statistics before = statistics();
  torch::Tensor batch;
  for (int call = 0; call < 30; ++call) {
    if (call % 2 == 0) batch = given(torch::kLazy, {4}, call);
    expect_close(f(batch), waves(batch.cpu()), 100);
    mark_step();
    wait_for_compiles();
  }
  EXPECT_GE(since(before).segments_replayed, 20u) << explain();
  EXPECT_NE(explain().find("1 keys, run "), std::string::npos);
}

TEST_F(Functions, StepsThatFreezeEachOthersWeightsAreReplayed) {
  const Count count;
  expect_as_eager([=](torch::Device device) {
    const auto g = given(device, {4}, 1).requires_grad_(), d = given(device, {4}, 2).requires_grad_();
    const auto step = [=](bool generates) {
      return compiled_on(device, [=](const torch::Tensor& x) mutable {
        if (device.is_lazy()) count();
        d.set_requires_grad(!generates);
        auto& trained = generates ? g : d;
        trained.mutable_grad() = torch::Tensor();
        const auto loss = waves(generates ? x * g * d : x * d).sum();
        loss.backward();
        torch::NoGradGuard no_grad;
        trained.sub_(trained.grad(), 0.01);
        return loss.detach();
      });
    };
    return [=, generate = step(true), judge = step(false)](int call) mutable -> Tensors {
      const auto x = given(device, {3, 4}, call);
      const auto judged = judge(x);
      const bool trains_d = d.requires_grad();
      const auto generated = generate(x);
      return {judged, generated, g.detach(), d.detach(),
              torch::full({1}, (trains_d ? 2.0 : 0.0) + (d.requires_grad() ? 1.0 : 0.0))};
    };
  }, 24);
  EXPECT_LE(*count.runs, 16) << explain();
}

/// Two heads over one trunk, whose passes take all gradients away first: a head that has no part
/// in a pass has none after it, and the optimizer leaves it alone.
TEST_F(Functions, GradientsThatAreTakenAwayAreGone) {
  struct Heads {
    explicit Heads(torch::Device device) : trunk(4, 8), first(8, 2), second(8, 3) {
      torch::manual_seed(0);
      for (torch::nn::Linear* each : {&trunk, &first, &second}) {
        for (torch::Tensor& parameter : (*each)->parameters()) torch::nn::init::normal_(parameter.requires_grad_(false), 0.0, 0.5).requires_grad_();
        (*each)->to(device);
      }
      optimizer = std::make_unique<torch::optim::SGD>(parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
    }
    Tensors parameters() const {
      return joined(joined(trunk->parameters(), first->parameters()), second->parameters());
    }
    torch::Tensor pass(torch::nn::Linear& head, const torch::Tensor& x) {
      optimizer->zero_grad();
      const auto loss = head->forward(torch::tanh(trunk->forward(x))).square().mean();
      loss.backward();
      return loss.detach();
    }
    torch::nn::Linear trunk, first, second;
    std::unique_ptr<torch::optim::SGD> optimizer;
  };
  for (const bool alternate : {true, false}) {
    SCOPED_TRACE(alternate);
    Heads eager(eager_device()), lazy(torch::kLazy);
    const auto of_first = compile([&](const torch::Tensor& x) { return lazy.pass(lazy.first, x); });
    const auto of_second = compile([&](const torch::Tensor& x) { return lazy.pass(lazy.second, x); });
    const Statistics before = statistics();
    for (int call = 0; call < 60; ++call) {
      SCOPED_TRACE(call);
      // In turns, or the other one after the first has long been replayed.
      const bool second = alternate ? call % 2 == 1 : call % 20 == 19;
      const auto x = given(eager_device(), {5, 4}, call), lazy_x = given(torch::kLazy, {5, 4}, call);
      const auto expected = eager.pass(second ? eager.second : eager.first, x);
      expect_close(second ? of_second(lazy_x) : of_first(lazy_x), expected, 100);
      for (size_t k = 0; k < eager.parameters().size(); ++k) {
        EXPECT_EQ(lazy.parameters()[k].grad().defined(), eager.parameters()[k].grad().defined()) << k;
      }
      eager.optimizer->step();
      lazy.optimizer->step();
      expect_all_close(lazy.parameters(), eager.parameters(), 100);
      mark_step();
      wait_for_compiles();
    }
    EXPECT_GE(since(before).segments_replayed, 60u) << explain();
    EXPECT_EQ(explain().find("not replayed"), std::string::npos) << explain();
  }
}

/// What one thread does with gradients is not learned of what another one does meanwhile.
TEST_F(Functions, OfTwoThreadsLeaveEachOthersGradientsAlone) {
  // Drawn before: the generator is the threads' common one.
  const torch::Tensor weights[] = {given(torch::kCPU, {3, 4}, 100), given(torch::kCPU, {3, 4}, 101)};
  Tensors inputs;
  for (int call = 0; call < 60; ++call) inputs.push_back(given(torch::kCPU, {5, 4}, call));
  const auto train = [&](torch::Device device, int thread, bool compiles) {
    torch::nn::Linear layer(4, 3);
    {
      torch::NoGradGuard no_grad;
      layer->weight.copy_(weights[thread]);
      layer->bias.zero_();
    }
    layer->to(device);
    torch::optim::SGD optimizer(layer->parameters(), torch::optim::SGDOptions(0.05).momentum(0.9));
    const auto pass = [&](const torch::Tensor& x) {
      optimizer.zero_grad();
      const auto loss = torch::tanh(layer->forward(x)).square().mean();
      loss.backward();
      return loss.detach();
    };
    const auto compiled = compile(pass);
    for (int call = 0; call < 60; ++call) {
      const auto x = inputs[static_cast<size_t>(call)].to(device);
      compiles ? compiled(x) : pass(x);
      optimizer.step();
      mark_step();
      if (call < 30) wait_for_compiles();
    }
    return Tensors{layer->weight.detach().cpu(), layer->bias.detach().cpu()};
  };
  Tensors results[2];
  std::vector<std::thread> threads;
  for (int k = 0; k < 2; ++k) threads.emplace_back([&, k] { results[k] = train(torch::kLazy, k, true); });
  for (std::thread& thread : threads) thread.join();
  for (int k = 0; k < 2; ++k) expect_all_close(results[k], train(eager_device(), k, false), 100);
}

TEST_F(Functions, NumbersThatFollowALearningRateAreNotForgotten) {
  const auto trained = [](torch::Device device) {
    const auto w = given(device, {4}, 1).requires_grad_();
    const auto sgd = std::make_shared<optim::SGD>(std::vector{w}, optim::SGDOptions(0.1));
    auto step = [=](const torch::Tensor& x) mutable {
      sgd->zero_grad();
      const auto loss = waves(x * w).sum();
      loss.backward();
      {
        torch::NoGradGuard no_grad;
        w.mul_(1 - sgd->param_groups()[0].options().get_lr() * 0.1);
      }
      sgd->step();
      return loss.detach();
    };
    std::function<torch::Tensor(const torch::Tensor&)> run = step;
    if (device.is_lazy()) run = compile(step, {.optimizers = {sgd.get()}});
    return [=](int call) -> Tensors {
      if (call % 8 == 0) sgd->param_groups()[0].options().set_lr(0.1 / (1 + call));
      const auto loss = run(given(device, {3, 4}, call));
      return {loss, w.detach().clone()};
    };
  };
  expect_as_eager(trained, 64);
}

TEST_F(Functions, AGroupThatTakesNoStepsHasNoNumbers) {
  const auto trained = [](torch::Device device) {
    const auto w = given(device, {4}, 1).requires_grad_(), idle = given(device, {4}, 2).requires_grad_();
    std::vector<optim::OptimizerParamGroup> groups;
    groups.emplace_back(std::vector{idle}, std::make_unique<optim::AdamOptions>(0.01));
    groups.emplace_back(std::vector{w}, std::make_unique<optim::AdamOptions>(0.01));
    const auto adam = std::make_shared<optim::Adam>(groups, optim::AdamOptions());
    const auto noise = std::make_shared<double>(0.5);
    auto step = [=](const torch::Tensor& x) mutable {
      adam->zero_grad();
      const auto loss = waves((x + x.cos() * *noise) * w).sum();
      loss.backward();
      adam->step();
      return loss.detach();
    };
    std::function<torch::Tensor(const torch::Tensor&)> run = step;
    if (device.is_lazy()) run = compile(step, {.optimizers = {adam.get()}});
    return [=](int call) -> Tensors {
      *noise = call < 5 ? 0.5 / (1 + call) : 0;
      const auto loss = run(given(device, {3, 4}, call));
      return {loss, w.detach().clone()};
    };
  };
  expect_as_eager(trained, 24);
}

TEST_F(Functions, GradientsOfGradientsAreRightAndSaid) {
  const auto function = [](const torch::Tensor& x) {
    auto y = x;
    for (int k = 0; k < 12; ++k) y = y.sin() * 1.5;
    return y;
  };
  const auto compiled = compile(function, {.name = "curved"});
  const auto second = [](const auto& f, const torch::Tensor& x) {
    const auto first = torch::autograd::grad({f(x).sum()}, {x}, {}, /*retain_graph=*/true, /*create_graph=*/true)[0];
    return torch::autograd::grad({first.square().sum()}, {x})[0];
  };
  for (int call = 0; call < 8; ++call) {
    const auto x = given(torch::kLazy, {6}, call).requires_grad_();
    expect_close(second(compiled, x), second(function, given(eager_device(), {6}, call).requires_grad_()), 100);
    mark_step();
    wait_for_compiles();
  }
  EXPECT_NE(explain().find("its gradients are differentiated"), std::string::npos) << explain();
}

TEST_F(Functions, AnOuterGraphThatIsNoArgumentIsSaid) {
  const auto weight = given(torch::kLazy, {4}, 1).requires_grad_();
  torch::Tensor scaled;
  const auto compiled = compile([&](const torch::Tensor& x) { return (x * scaled).exp().sin().cos().tanh(); });
  for (int call = 0; call < 6; ++call) {
    scaled = weight * 2;
    weight.mutable_grad() = torch::Tensor();
    compiled(given(torch::kLazy, {4}, call)).sum().backward();
    const auto w = given(eager_device(), {4}, 1).requires_grad_();
    (given(eager_device(), {4}, call) * (w * 2)).exp().sin().cos().tanh().sum().backward();
    expect_close(weight.grad(), w.grad(), 20);
    mark_step();
    wait_for_compiles();
  }
  EXPECT_NE(explain().find("and is no argument"), std::string::npos) << explain();
}

TEST_F(Functions, ErrorsComeOutAndTheProgramGoesOn) {
  auto broken = std::make_shared<bool>(false);
  const auto function = [=](const Tensors& in) -> Tensors {
    auto y = in[0] * 2;
    if (*broken) throw std::runtime_error("the user's own");
    for (int k = 0; k < 20; ++k) y = y.tanh();
    return {y};
  };
  const auto compiled = compile(function);
  const auto arguments = [](torch::Device device, int call) -> Tensors { return {given(device, {4, 3}, call)}; };
  expect_replays(compiled, function, arguments, 2);
  *broken = true;
  EXPECT_THROW(compiled(arguments(torch::kLazy, 0)), std::runtime_error);
  *broken = false;
  EXPECT_GE(expect_replays(compiled, function, arguments), 5u) << explain();
}

TEST_F(Functions, WithinAnotherAreAPartOfIt) {
  const auto inner = compile([](const torch::Tensor& x) {
    auto y = x;
    for (int k = 0; k < 10; ++k) y = y.sin();
    return y;
  });
  const auto function = [=](const Tensors& in) -> Tensors { return {inner(in[0] * 2) + inner(in[0])}; };
  const auto plain = [](const Tensors& in) -> Tensors {
    const auto chain = [](torch::Tensor y) {
      for (int k = 0; k < 10; ++k) y = y.sin();
      return y;
    };
    return {chain(in[0] * 2) + chain(in[0])};
  };
  EXPECT_GE(expect_replays(compile(function), plain,
                           [](torch::Device device, int call) -> Tensors { return {given(device, {4, 3}, call)}; }),
            5u)
      << explain();
}

TEST_F(Functions, SeeWhatIsPending) {
  const auto weight = given(torch::kLazy, {3}, 7);
  const auto eager_weight = given(eager_device(), {3}, 7);
  const auto compiled = compile([=](const torch::Tensor& x) {
    auto y = x * weight;
    for (int k = 0; k < 20; ++k) y = y.tanh();
    return y;
  });
  for (int call = 0; call < 14; ++call) {
    SCOPED_TRACE(call);
    auto x = given(torch::kLazy, {4, 3}, call) * 3 + 1;  // verified, and not run when it is taken
    weight.mul_(1.01);
    const auto y = compiled(x) - 1;
    auto expected = given(eager_device(), {4, 3}, call) * 3 + 1;
    eager_weight.mul_(1.01);
    expected = expected * eager_weight;
    for (int k = 0; k < 20; ++k) expected = expected.tanh();
    expect_close(y, expected - 1, 20);
    wait_for_compiles();
  }
}

TEST_F(Functions, ServeManyThreads) {
  const auto weight = given(torch::kLazy, {3}, 7);
  const auto function = [](const torch::Tensor& x, const torch::Tensor& w) {
    auto y = x * w;
    for (int k = 0; k < 20; ++k) y = (y + 0.1).tanh();
    return y;
  };
  const auto compiled = compile([=](const torch::Tensor& x) { return function(x, weight); });
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  const auto eager_weight = weight.cpu();
  for (int thread = 0; thread < 8; ++thread) {
    threads.emplace_back([&, thread] {
      torch::NoGradGuard no_grad;
      for (int call = 0; call < 40; ++call) {
        const auto x = torch::full({4, 3}, 0.01 * (thread * 40 + call));
        const auto y = compiled(x.to(torch::kLazy)).cpu();
        if (!torch::allclose(y, function(x, eager_weight), 1e-5, 1e-6)) ++wrong;
        if (call == 10) wait_for_compiles();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace reprise::test
