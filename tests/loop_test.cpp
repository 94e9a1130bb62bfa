// Loops that the program unrolls, whose number of iterations changes from step to step: few
// programs for all of them, and eager's values at each.
#include <functional>
#include <memory>
#include <vector>

#include "cpp_models/lstm_lm.h"
#include "reprise/reprise.h"
#include "tests/sized_steps.h"

namespace reprise::test {
namespace {

namespace F = torch::nn::functional;

class Loops : public LazySizes {};

/// A step whose loop runs `times`.
using LoopedStep = std::function<Tensors(int64_t times)>;
using LoopedProgram = std::function<LoopedStep(torch::Device device)>;

struct Lengths {
  std::vector<int64_t> first;   ///< run again and again
  std::vector<int64_t> others;  ///< run once, when all is settled
  uint64_t programs = 6;        ///< compiled, at most
  int rounds = 10;
  bool cuts = true;  ///< there are more segments than steps
};

/// Each length as a step, against eager; when all is settled, no length, not even one that
/// was never there, is recorded or compiled any more.
void expect_few_programs(const LoopedProgram& program, const Lengths& lengths) {
  torch::manual_seed(3);
  const LoopedStep eager = program(eager_device());
  torch::manual_seed(3);
  const LoopedStep lazy = program(torch::kLazy);
  mark_step();
  const auto run = [&](int64_t times) {
    SCOPED_TRACE(c10::str("length ", times));
    const Tensors wanted = eager(times), got = lazy(times);
    mark_step();
    expect_all_close(got, wanted, 4);
    wait_for_compiles();
  };
  const Statistics before = statistics();
  for (int round = 0; round < lengths.rounds; ++round) {
    SCOPED_TRACE(c10::str("round ", round));
    for (const int64_t times : lengths.first) run(times);
    if (::testing::Test::HasFailure()) return;
  }
  const Statistics settled = statistics();
  for (const int64_t times : lengths.first) run(times);
  EXPECT_EQ(since(settled).ops_recorded, 0u) << explain();
  EXPECT_GT(since(settled).segments_replayed, since(settled).segments_interpreted) << explain();
  for (const int64_t times : lengths.others) run(times);
  const Statistics did = since(before);
  EXPECT_LE(did.programs_compiled + did.programs_loaded, lengths.programs) << explain();
  EXPECT_EQ(did.compile_failures, 0u) << explain();
  EXPECT_EQ(did.program_failures, 0u) << explain();
  const uint64_t segments = since(settled).segments_replayed + since(settled).segments_interpreted;
  const size_t steps = lengths.first.size() + lengths.others.size();
  if (lengths.cuts) {
    EXPECT_GT(segments, steps) << "nothing was cut";
  } else {
    EXPECT_EQ(segments, steps) << explain();
  }
}

/// Text of `times` tokens for a model whose cells are written out.
LoopedProgram language_model(bool trains, int64_t layers) {
  return [=](torch::Device device) -> LoopedStep {
    cpp_models::LstmLm model(
        cpp_models::LstmLmOptions{.vocabulary = 24, .embedding = 8, .hidden = 8, .layers = layers});
    model->to(device);
    auto sgd = std::make_shared<torch::optim::SGD>(model->parameters(), 0.1);
    return [=](int64_t times) mutable -> Tensors {
      torch::AutoGradMode grad(trains);
      const auto text = torch::arange(3 * times).reshape({3, times}).remainder(24).to(device);
      const auto loss = F::cross_entropy(model->forward(text).flatten(0, -2), text.flatten());
      if (!trains) return {loss};
      sgd->zero_grad();
      loss.backward();
      sgd->step();
      return joined({loss.detach()}, state_of(*model));
    };
  };
}

TEST_F(Loops, TrainingOfARecurrentNet) {
  expect_few_programs(language_model(true, 1),
                      {.first = {6, 9, 5, 12, 7, 10, 8}, .others = {11, 15}, .programs = 4});
}

/// A step of a sampler: a small net, and a number that depends on the iteration.
torch::Tensor denoised(const torch::Tensor& x, const torch::Tensor& w, double alpha) {
  const auto y = torch::tanh(x.mm(w) + 0.5);
  return x * alpha + torch::sigmoid(y * x).mm(w) * (1 - alpha) + torch::relu(y - 0.1).sin();
}

/// The cell of a recurrent net of one layer, by its weights.
Tensors recurrent_cell(const torch::Tensor& x, const Tensors& state, const torch::Tensor& w) {
  const auto gates = (x.mm(w) + state[0].mm(w)).tanh();
  const auto cell = torch::sigmoid(gates) * state[1] + torch::relu(gates);
  return {torch::tanh(cell) * gates, cell};
}

/// Its first iteration takes one tensor where others take two. `counts`: there is a number that
/// depends on the iteration; it is the same in every first one.
LoopedProgram with_one_tensor_in_two_roles(bool counts) {
  return [=](torch::Device device) -> LoopedStep {
    const auto w = random(device, {8, 8}) * 0.3, x = random(device, {4, 24, 8});
    return [=](int64_t times) -> Tensors {
      const auto zeros = torch::zeros({4, 8}, x.options());
      Tensors state{zeros, zeros};
      for (int64_t k = 0; k < times; ++k) {
        state = recurrent_cell(x.select(1, k), state, w);
        if (counts) {
          state[0] = state[0] * (1 - 0.8 * static_cast<double>(k) / static_cast<double>(times));
        }
      }
      return {state[0], state[1].sum()};
    };
  };
}

TEST_F(Loops, ThatBeginWithOneTensorInTwoRoles) {
  expect_few_programs(with_one_tensor_in_two_roles(/*counts=*/false),
                      {.first = {5, 8, 6, 10}, .others = {7, 20}, .programs = 2});
}

TEST_F(Loops, ThatBeginWithOneTensorInTwoRolesAndCount) {
  expect_few_programs(with_one_tensor_in_two_roles(/*counts=*/true),
                      {.first = {5, 8, 6, 10}, .others = {7, 20}, .programs = 3});
}

TEST_F(Loops, ThatBeginWithOneTensorWhichIsWritten) {
  // Eager's first iteration sees its own writes through the other name.
  expect_few_programs(
      [](torch::Device device) -> LoopedStep {
        const auto w = random(device, {8, 8}) * 0.3, x = random(device, {4, 24, 8});
        return [=](int64_t times) -> Tensors {
          auto h = torch::ones({4, 8}, x.options()), c = h;
          for (int64_t k = 0; k < times; ++k) {
            const Tensors next = recurrent_cell(x.select(1, k), {h, c}, w);
            h.add_(next[0]).mul_(0.5);
            c = (c * 0.5 + next[1]).clone();
          }
          return {h, c.sum()};
        };
      },
      {.first = {5, 8, 6, 10}, .others = {7, 20}});
}

TEST_F(Loops, OverARunOfViewsInTheirSegment) {
  // What is unbound before the loop has its length, and is no reason for a cut by itself.
  expect_few_programs(
      [](torch::Device device) -> LoopedStep {
        const auto w = random(device, {8, 8}) * 0.3, x = random(device, {24, 4, 8});
        return [=](int64_t times) -> Tensors {
          const auto all = torch::tanh(x.slice(0, 0, times)) * 2;
          Tensors each;
          for (int64_t k = 0; k < times; ++k) each.push_back(all.select(0, k));
          const auto last = torch::relu(each.back() - each.front()).mm(w);
          return {last.sum(), last.sin() + each[1]};
        };
      },
      {.first = {5, 8, 6, 10}, .others = {7, 20}, .programs = 1, .cuts = false});
}

TEST_F(Loops, BehindARunOfViewsOfTheirLength) {
  expect_few_programs(
      [](torch::Device device) -> LoopedStep {
        const auto w = random(device, {8, 8}) * 0.3, x = random(device, {24, 4, 8});
        return [=](int64_t times) -> Tensors {
          Tensors state{torch::zeros({4, 8}, x.options()), torch::ones({4, 8}, x.options())};
          const auto all = torch::tanh(x.slice(0, 0, times)) * 2;
          Tensors each;
          for (int64_t k = 0; k < times; ++k) each.push_back(all.select(0, k));
          for (const torch::Tensor& one : each) state = recurrent_cell(one, state, w);
          return {state[0].sum(), state[1]};
        };
      },
      {.first = {5, 8, 6, 10}, .others = {7, 20}});
}

TEST_F(Loops, BehindTwoRunsOfViewsAndAList) {
  expect_few_programs(
      [](torch::Device device) -> LoopedStep {
        const auto w = random(device, {8, 8}) * 0.3, x = random(device, {24, 4, 8});
        return [=](int64_t times) -> Tensors {
          const auto all = torch::tanh(x.slice(0, 0, times)) * 2, masks = all.gt(0.5).to(w.dtype());
          Tensors each, mask, states;
          for (int64_t k = 0; k < times; ++k) each.push_back(all.select(0, k));
          for (int64_t k = 0; k < times; ++k) mask.push_back(masks.select(0, k));
          auto state = x[0] * 2;
          for (size_t k = 0; k < each.size(); ++k) {
            state = denoised(each[k] * mask[k] + state, w, 0.75);
            states.push_back(state);
          }
          return {torch::stack(states).sin(), torch::stack(each) + 1};
        };
      },
      {.first = {5, 8, 6, 10}, .others = {7, 20}, .rounds = 12});
}

TEST_F(Loops, WhoseIterationsAreAllOfOneSize) {
  // The first takes one tensor where others take two, and there are no positions among them.
  expect_few_programs(
      [](torch::Device device) -> LoopedStep {
        const auto w = random(device, {8, 8}) * 0.3, x = random(device, {4, 8});
        return [=](int64_t times) -> Tensors {
          const auto zeros = torch::zeros({4, 8}, x.options());
          Tensors state{zeros, zeros};
          for (int64_t k = 0; k < times; ++k) state = recurrent_cell(x, state, w);
          return {state[0], state[1].sum()};
        };
      },
      {.first = {5, 8, 6, 10}, .others = {7, 20}, .programs = 3});
}

TEST_F(Loops, OfSeveralLayers) {
  expect_few_programs(language_model(false, 2), {.first = {6, 9, 5, 12, 7}, .others = {11, 15}});
}

TEST_F(Loops, WithNumbersThatChange) {
  expect_few_programs(
      [](torch::Device device) -> LoopedStep {
        const auto w = random(device, {8, 8}) * 0.3, start = random(device, {4, 8});
        return [=](int64_t times) -> Tensors {
          auto x = start * 2;
          for (int64_t k = 0; k < times; ++k) {
            x = denoised(x, w, 0.9 - 0.8 * static_cast<double>(k) / static_cast<double>(times));
          }
          return {x, x.sum()};
        };
      },
      {.first = {5, 8, 6, 10}, .others = {7, 20}});
}

TEST_F(Loops, ThatEndWithTheStep) {
  expect_few_programs(
      [](torch::Device device) -> LoopedStep {
        const auto w = random(device, {8, 8}) * 0.3, start = random(device, {4, 8});
        return [=](int64_t times) -> Tensors {
          auto x = start;
          for (int64_t k = 0; k < times; ++k) x = denoised(x, w, 0.75);
          return {x};
        };
      },
      {.first = {5, 8, 6, 10}, .others = {7, 20}});
}

TEST_F(Loops, OverLayersThatAreSkipped) {
  // Bit k of the number says whether layer k runs.
  expect_few_programs(
      [](torch::Device device) -> LoopedStep {
        Tensors weights;
        for (int k = 0; k < 6; ++k) weights.push_back(random(device, {8, 8}) * 0.3);
        const auto start = random(device, {4, 8});
        return [=](int64_t layers) -> Tensors {
          auto x = start + 1;
          for (size_t k = 0; k < weights.size(); ++k) {
            if ((layers >> k) & 1) x = denoised(x, weights[k], 0.75);
          }
          return {x, x.mean()};
        };
      },
      {.first = {0b111111, 0b011110, 0b101101, 0b110111, 0b111000}, .others = {0b010101, 0b111011}});
}

TEST_F(Loops, WrittenInPlaceAndIntoAList) {
  expect_few_programs(
      [](torch::Device device) -> LoopedStep {
        const auto w = random(device, {8, 8}) * 0.3, start = random(device, {4, 8});
        return [=](int64_t times) -> Tensors {
          auto x = start.clone(), count = torch::zeros({4}, x.options());
          auto table = torch::zeros({24, 4, 8}, x.options());
          Tensors all;
          for (int64_t k = 0; k < times; ++k) {
            x.add_(denoised(x, w, 0.75)).mul_(0.5);
            count += 1;
            table[k].copy_(x);
            all.push_back(x * count.sum());
          }
          const auto stacked = torch::stack(all);
          return {x, count, table, stacked, torch::softmax(stacked, 0).flatten()};
        };
      },
      {.first = {5, 8, 6, 10, 7}, .others = {9, 20}});
}

TEST_F(Loops, OfOneLengthStayInTheirStep) {
  const LoopedStep step = language_model(true, 1)(torch::kLazy);
  for (int round = 0; round < 4; ++round) {
    step(6);
    mark_step();
  }
  const Statistics before = statistics();
  for (int round = 0; round < 3; ++round) {
    step(6);
    mark_step();
  }
  const Statistics did = since(before);
  EXPECT_EQ(did.segments_recorded, 0u);
  EXPECT_EQ(did.segments_interpreted + did.segments_replayed, 3u) << explain();
}

TEST_F(Loops, AreSaidInTheReport) {
  const LoopedStep step = language_model(false, 1)(torch::kLazy);
  for (const int64_t times : {6, 9, 6, 9}) {
    step(times);
    mark_step();
  }
  EXPECT_NE(explain().find("a loop whose length changes"), std::string::npos) << explain();
}

}  // namespace
}  // namespace reprise::test
