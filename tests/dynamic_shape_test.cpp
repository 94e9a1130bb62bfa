// Sizes that change from step to step: one program over symbols for many of them, and
// eager's values at each.
#include "cpp_models/gpt.h"
#include "cpp_models/lstm_lm.h"
#include "cpp_models/mlp.h"
#include "cpp_models/resnet.h"
#include "reprise/reprise.h"
#include "reprise/testing.h"
#include "tests/sized_steps.h"

namespace reprise::test {
namespace {

namespace F = torch::nn::functional;

class DynamicShapes : public LazySizes {};

/// A step for a size of its input.
using SizedStep = std::function<Tensors(torch::IntArrayRef size)>;
using SizedProgram = std::function<SizedStep(torch::Device device)>;
using Sizes = std::vector<std::vector<int64_t>>;

struct Expected {
  uint64_t compiled = 2;  ///< at most: the first size's own program, and one for all
  double tolerance = 1;
  /// At most: recorded, interpreted and asked for, checked, perhaps with disturbed runs,
  /// replayed twice.
  int rounds = 9;
};

/// Runs the sizes in turns, each as one marked step, against eager, until every size was
/// replayed in two rounds.
void expect_few_programs(const SizedProgram& program, const Sizes& sizes,
                         const Expected& expected = {}) {
  torch::manual_seed(3);
  const SizedStep eager = program(eager_device());
  torch::manual_seed(3);
  const SizedStep lazy = program(torch::kLazy);
  mark_step();
  const Statistics before = statistics();
  int replayed = 0;
  for (int round = 0; round < expected.rounds && replayed < 2; ++round) {
    const Statistics at_round = statistics();
    for (const auto& size : sizes) {
      SCOPED_TRACE(c10::str("round ", round, ", size ", torch::IntArrayRef(size)));
      const auto seed = static_cast<uint64_t>(100 * round + size[0]);
      torch::manual_seed(seed);
      const Tensors wanted = eager(size);
      torch::manual_seed(seed);
      const Tensors got = lazy(size);
      mark_step();
      expect_all_close(got, wanted, expected.tolerance);
      if (::testing::Test::HasFatalFailure()) return;
      wait_for_compiles();
    }
    const Statistics did = since(at_round);
    const bool all = did.ops_recorded == 0 && did.segments_interpreted == 0 &&
                     did.segments_replayed >= sizes.size();
    replayed = all ? replayed + 1 : 0;
  }
  EXPECT_EQ(replayed, 2) << explain();
  const Statistics did = since(before);
  EXPECT_LE(did.programs_compiled + did.programs_loaded, expected.compiled) << explain();
  EXPECT_GE(did.programs_shared, sizes.size() - expected.compiled) << explain();
  EXPECT_EQ(did.compile_failures, 0u) << explain();
  EXPECT_EQ(did.program_failures, 0u) << explain();
}

TEST_F(DynamicShapes, Elementwise) {
  expect_few_programs(
      [](torch::Device device) -> SizedStep {
        const auto w = random(device, {8});
        return [=](torch::IntArrayRef size) -> Tensors {
          const auto x = torch::rand({size[0], 8}).to(device);
          return {torch::tanh(x * w) + 1, (x + w).sum(0), x.t().contiguous(), x.flatten() * 2};
        };
      },
      {{4}, {6}, {5}, {33}, {2}});
}

TEST_F(DynamicShapes, TwoSizesThatChangeApart) {
  expect_few_programs(
      [](torch::Device device) -> SizedStep {
        return [=](torch::IntArrayRef size) -> Tensors {
          const auto x = torch::rand({size[0], size[1]}).to(device);
          const auto mask = torch::ones({size[1], size[1]}, x.options()).tril();
          return {x.matmul(mask), x.softmax(1), torch::cat({x, x}, 1),
                  x.slice(1, 0, size[1] - 1).clone(), x.mean(0)};
        };
      },
      {{4, 7}, {6, 9}, {5, 9}, {4, 12}, {3, 3}});
}

TEST_F(DynamicShapes, FloatsThatChangeStayInputs) {
  expect_few_programs(
      [](torch::Device device) -> SizedStep {
        auto step = std::make_shared<int>(0);
        return [=](torch::IntArrayRef size) -> Tensors {
          const double rate = 0.25 * (++*step % 7) - 0.5;
          const auto x = torch::rand({size[0], 8}).to(device);
          return {x * rate, (1.5 - x).clamp(-1, rate)};
        };
      },
      {{4}, {6}, {5}, {9}});
}

TEST_F(DynamicShapes, AFloatThatFollowsFromTheSizeIsAnInputAtEverySize) {
  // At each size it is a constant of the record; the program of all sizes takes it.
  expect_few_programs(
      [](torch::Device device) -> SizedStep {
        const auto w = random(device, {8});
        return [=](torch::IntArrayRef size) -> Tensors {
          const auto x = torch::rand({size[0], 8}).to(device);
          const auto mean = x.sin().mul(1.0 / static_cast<double>(size[0])).sum(0);
          return {torch::tanh(mean * w), (x - mean) * 0.5};
        };
      },
      {{4}, {6}, {5}, {33}, {9}}, {.compiled = 1});
}

TEST_F(DynamicShapes, ASizeAtWhichTwoViewsAreOneIsNotMistaken) {
  const auto first_and_last = [](torch::Device device, int64_t times) {
    const auto all = torch::tanh(torch::arange(1, times + 1).to(torch::kFloat).to(device));
    Tensors each;
    for (int64_t k = 0; k < times; ++k) each.push_back(all.slice(0, k, k + 1));
    return each.back() * each.front() + 1;
  };
  for (int round = 0; round < 5; ++round) {
    for (const int64_t times : {5, 8, 6, 10, 1, 2, 1}) {
      SCOPED_TRACE(times);
      const auto got = first_and_last(torch::kLazy, times);
      mark_step();
      expect_close(got, first_and_last(eager_device(), times), 1);
      wait_for_compiles();
    }
  }
}

TEST_F(DynamicShapes, ASizeThatRunsOftenGetsAProgramOfItsOwn) {
  options().demote_slow_programs = true;
  const auto program = [](torch::Device device) -> SizedStep {
    const auto w = random(device, {8});
    return [=](torch::IntArrayRef size) -> Tensors {
      const auto x = given(device, {size[0], 8}, 5);
      return {torch::tanh(x * w) + 1, (x + w).sum(0), x.sigmoid() * x, x.flatten() * 2};
    };
  };
  torch::manual_seed(3);
  const SizedStep eager = program(eager_device());
  torch::manual_seed(3);
  const SizedStep lazy = program(torch::kLazy);
  const auto run = [&](int64_t size, int times) {
    const Tensors expected = eager({size});
    for (int k = 0; k < times; ++k) {
      const Tensors actual = lazy({size});
      mark_step();
      expect_all_close(actual, expected, 1);
      if (k % 16 == 0) wait_for_compiles();
    }
  };
  for (int round = 0; round < 9; ++round) {
    for (const int64_t size : {4, 6, 5}) run(size, 1);
  }
  const Statistics before = statistics();
  run(6, 700);
  const Statistics did = since(before);
  EXPECT_EQ(did.programs_compiled + did.programs_loaded, 1u) << explain();
  EXPECT_EQ(did.ops_recorded, 0u);
  EXPECT_GE(did.segments_replayed, 600u);
  EXPECT_NE(explain().find("a program for this size alone"), std::string::npos) << explain();

  // Many sizes that run as often do not.
  const Statistics again = statistics();
  for (int k = 0; k < 300; ++k) {
    for (const int64_t size : {4, 5, 9, 12, 15, 21}) run(size, 1);
  }
  EXPECT_EQ(since(again).programs_compiled + since(again).programs_loaded, 0u) << explain();
}

TEST_F(DynamicShapes, OfSizesThatShareNoProgramSomeAreCompiled) {
  options().dynamic_shapes = true;
  options().sizes_before_dynamic = 1000;
  options().most_size_programs = 2;
  const auto w = random(torch::kLazy, {8});
  for (int round = 0; round < 12; ++round) {
    for (const int64_t size : {4, 5, 9, 12}) {
      const auto y = torch::tanh(given(torch::kLazy, {size, 8}, 5) * w).sum(0) * 2;
      mark_step();
    }
    wait_for_compiles();
  }
  const std::string report = explain();
  size_t programs = 0, refused = 0;
  for (size_t at = 0; (at = report.find("    program: ", at)) != std::string::npos; ++at) ++programs;
  for (size_t at = 0; (at = report.find("not compiled: so many", at)) != std::string::npos; ++at) {
    ++refused;
  }
  EXPECT_EQ(programs, 2u) << report;
  EXPECT_EQ(refused, 2u) << report;
}

TEST_F(DynamicShapes, SizesOfOneHaveTheirOwnProgram) {
  expect_few_programs(
      [](torch::Device device) -> SizedStep {
        const auto w = random(device, {8, 8});
        return [=](torch::IntArrayRef size) -> Tensors {
          return {torch::relu(torch::rand({size[0], 8}).to(device).mm(w))};
        };
      },
      {{4}, {1}, {6}, {9}}, {.compiled = 3});
}

template <class Model>
SizedProgram training(const std::function<Model()>& make,
                      const std::function<Tensors(torch::IntArrayRef)>& batch) {
  return [=](torch::Device device) -> SizedStep {
    Model model = make();
    model->to(device);
    auto optimizer = std::make_shared<torch::optim::SGD>(
        model->parameters(), torch::optim::SGDOptions(1e-4).momentum(0.9));
    return [=](torch::IntArrayRef size) mutable -> Tensors {
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

TEST_F(DynamicShapes, TrainingAnMlp) {
  expect_few_programs(training<cpp_models::Mlp>(
                          [] {
                            return cpp_models::Mlp(cpp_models::MlpOptions{
                                .inputs = 12, .hidden = {16, 16}, .outputs = 4});
                          },
                          [](torch::IntArrayRef size) -> Tensors {
                            return {torch::randn({size[0], 12}),
                                    torch::randint(4, {size[0]}, torch::kLong)};
                          }),
                      {{8}, {5}, {12}, {3}}, {.tolerance = 100, .rounds = 10});
}

TEST_F(DynamicShapes, TrainingAGpt) {
  expect_few_programs(
      training<cpp_models::Gpt>(
          [] {
            return cpp_models::Gpt(cpp_models::GptOptions{
                .vocabulary = 11, .context = 32, .width = 16, .heads = 2, .layers = 2,
                .attention = cpp_models::Attention::kMatmul});
          },
          [](torch::IntArrayRef size) -> Tensors {
            return {torch::randint(11, {size[0], size[1]}, torch::kLong),
                    torch::randint(11, {size[0] * size[1]}, torch::kLong)};
          }),
      {{2, 8}, {3, 6}, {4, 11}, {2, 16}}, {.tolerance = 100, .rounds = 10});
}

TEST_F(DynamicShapes, InferenceOfAResNetOverImageSizes) {
  expect_few_programs(
      [](torch::Device device) -> SizedStep {
        cpp_models::ResNet model(
            cpp_models::ResNetOptions{.channels = 3, .classes = 4, .depth = 8, .width = 4});
        model->to(device);
        model->eval();
        return [=](torch::IntArrayRef size) mutable -> Tensors {
          torch::NoGradGuard no_grad;
          return {model->forward(torch::rand({2, 3, size[0], size[0]}).to(device))};
        };
      },
      {{16}, {24}, {20}, {32}}, {.tolerance = 100});
}

// No size of an input changes, only where the cache is written and how far it is read.
TEST_F(DynamicShapes, PositionsInACache) {
  expect_few_programs(
      [](torch::Device device) -> SizedStep {
        const auto cache = torch::zeros({2, 12, 4}).to(device);
        return [=](torch::IntArrayRef size) -> Tensors {
          const int64_t position = size[0];
          const auto x = torch::rand({2, 1, 4}).to(device);
          cache.slice(1, position, position + 1).copy_(x);
          const auto seen = cache.slice(1, 0, position + 1);
          return {torch::softmax(x.matmul(seen.transpose(1, 2)), -1).matmul(seen), cache.clone()};
        };
      },
      {{4}, {6}, {5}, {9}}, {.compiled = 3});
}

TEST_F(DynamicShapes, AreSaidInExplain) {
  const auto x = random(torch::kLazy, {8});
  for (int round = 0; round < 3; ++round) {
    for (const int64_t size : {4, 6}) {
      const auto y = (torch::rand({size, 8}).to(torch::kLazy) + x).relu();
      mark_step();
      wait_for_compiles();
    }
  }
  EXPECT_NE(explain().find("6 was 4"), std::string::npos) << explain();
  EXPECT_NE(explain().find("over symbols: s0 = 6"), std::string::npos) << explain();
}

// However many sizes it serves, it is one program.
TEST_F(DynamicShapes, DoNotFillTheTreeWithPrograms) {
  options().most_programs = 3;
  const auto x = random(torch::kLazy, {8});
  const Statistics before = statistics();
  for (int64_t round = 0; round < 12; ++round) {
    for (int64_t size = 2; size < 20; ++size) {
      const auto y = (torch::rand({size, 8}).to(torch::kLazy) + x).relu();
      mark_step();
      if (round < 2) wait_for_compiles();
    }
  }
  options().most_programs = Options().most_programs;
  EXPECT_EQ(since(before).segments_forgotten, 0u) << explain();
  EXPECT_GE(since(before).segments_replayed, 100u) << explain();
}

TEST_F(DynamicShapes, ADefaultDtypeHasProgramsOfItsOwn) {
  const auto step = [](torch::Device device, int64_t size) {
    const double number = 0.1;  // which a float does not hold
    auto y = torch::full({size}, number, torch::kDouble).to(device);
    for (int k = 0; k < 12; ++k) y = y * 1.0;
    y = y - torch::full({size}, number, torch::TensorOptions(device));
    return y;
  };
  const auto round = [&] {
    for (int time = 0; time < 4; ++time) {
      for (const int64_t size : {4, 6, 9, 5}) {
        const auto y = step(torch::kLazy, size);
        mark_step();
        expect_close(y, step(eager_device(), size), 1);
        wait_for_compiles();
      }
    }
  };
  round();
  const auto stock = torch::get_default_dtype();
  torch::set_default_dtype(c10::scalarTypeToTypeMeta(torch::kDouble));
  round();
  round();
  torch::set_default_dtype(stock);
  round();
}

TEST_F(DynamicShapes, CanBeSwitchedOff) {
  options().dynamic_shapes = false;
  const auto x = random(torch::kLazy, {8});
  const Statistics before = statistics();
  for (int round = 0; round < 4; ++round) {
    for (const int64_t size : {4, 6, 7}) {
      const auto y = (torch::rand({size, 8}).to(torch::kLazy) * x).relu();
      mark_step();
      wait_for_compiles();
    }
  }
  EXPECT_EQ(since(before).programs_compiled + since(before).programs_loaded, 3u) << explain();
  EXPECT_EQ(since(before).programs_shared, 0u);
}

}  // namespace
}  // namespace reprise::test
