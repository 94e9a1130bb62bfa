// The step finder on small programs written by hand, and on the streams that
// tests/step_streams/record.py makes of real ones. The latter need
// REPRISE_STEP_STREAMS, the folder with the streams, and are skipped without.
#include "lazy_backend/step_finder.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <ostream>
#include <string>
#include <vector>

#include "tests/step_streams/replay.h"
#include "tests/step_streams/tape.h"

namespace reprise::step_streams {
namespace {

using Weights = std::vector<uint64_t>;

Weights parameters(Tape& tape, size_t count) {
  Weights weights;
  while (weights.size() < count) weights.push_back(tape.parameter());
  return weights;
}

struct Activations {
  std::vector<uint64_t> inputs;
  uint64_t out = 0;
};

Activations forward(Tape& tape, uint64_t x, const Weights& weights) {
  Activations activations{{}, x};
  for (const uint64_t w : weights) {
    activations.inputs.push_back(activations.out);
    activations.out = tape.op("relu", {tape.op("mm", {activations.out, w})});
  }
  return activations;
}

/// Gradients of the weights; that of the input is last.
std::vector<uint64_t> backward(Tape& tape, const Activations& activations, const Weights& weights,
                               uint64_t gradient) {
  std::vector<uint64_t> gradients;
  for (size_t i = weights.size(); i-- > 0;) {
    gradient = tape.op("relu_backward", {gradient});
    gradients.insert(gradients.begin(), tape.op("mm_weight", {activations.inputs[i], gradient}));
    gradient = tape.op("mm_input", {gradient, weights[i]});
  }
  gradients.push_back(gradient);
  return gradients;
}

void update(Tape& tape, const Weights& weights, const std::vector<uint64_t>& gradients) {
  tape.grad_mode = false;
  for (size_t i = 0; i < weights.size(); ++i) tape.write("add_", weights[i], {gradients[i]});
  tape.grad_mode = true;
}

/// Returns the loss, which lives on as in a program that prints it now and then.
uint64_t train(Tape& tape, const Weights& weights) {
  tape.iteration();
  const uint64_t x = tape.from_host();
  const Activations activations = forward(tape, x, weights);
  const uint64_t loss = tape.op("mean", {activations.out});
  update(tape, weights, backward(tape, activations, weights, tape.op("ones_like", {loss})));
  tape.drop_made();
  tape.drop_from_host();
  return loss;
}

bool only_between_iterations(const Stream& stream, const Result& result) {
  return std::all_of(result.cuts.begin(), result.cuts.end(), [&](size_t cut) {
    return std::binary_search(stream.iterations.begin(), stream.iterations.end(), cut);
  });
}

TEST(StepFinder, TrainingLoopBecomesOneProgram) {
  Tape tape;
  const Weights weights = parameters(tape, 3);
  for (int i = 0; i < 50; ++i) train(tape, weights);
  const Result result = Replay(tape.stream).run();
  EXPECT_EQ(result.programs, 1u);
  EXPECT_GE(result.verified, 0.94);  // of 50 iterations, 2 and a bit are recorded
  EXPECT_EQ(result.cuts.size(), 49u);
  EXPECT_TRUE(only_between_iterations(tape.stream, result));
}

TEST(StepFinder, AReadEveryFiftyIterationsDoesNotHideTheStep) {
  Tape tape;
  const Weights weights = parameters(tape, 3);
  for (int i = 0; i < 200; ++i) {
    const uint64_t loss = train(tape, weights);
    if (i % 50 == 49) tape.read(loss);
  }
  const Result result = Replay(tape.stream).run();
  EXPECT_EQ(result.programs, 1u);
  EXPECT_GE(result.verified, 0.98);
}

TEST(StepFinder, AReadInTheMiddleCostsTheTwoHalvesOfAStep) {
  Tape tape;
  const Weights weights = parameters(tape, 3);
  for (int i = 0; i < 200; ++i) {
    train(tape, weights);
    if (i % 50 != 49) continue;
    // The loss is read where it is made, before the backward pass.
    const Stream::Op& first = tape.stream.ops[tape.stream.iterations.back() + 6];
    ASSERT_EQ(first.created.size(), 1u);
    tape.stream.reads.push_back({tape.stream.iterations.back() + 7, first.created[0]});
  }
  const Result result = Replay(tape.stream).run();
  EXPECT_LE(result.programs, 3u);
  EXPECT_GE(result.verified, 0.97);
}

TEST(StepFinder, AGanWithTwoOptimizersBecomesFewPrograms) {
  Tape tape;
  const Weights generator = parameters(tape, 2), critic = parameters(tape, 2);
  for (int i = 0; i < 60; ++i) {
    tape.iteration();
    const Activations real = forward(tape, tape.from_host(), critic);
    const Activations fake = forward(tape, tape.op("randn", {}), generator);
    const Activations judged = forward(tape, tape.op("detach", {fake.out}), critic);
    const uint64_t loss = tape.op("sub", {real.out, judged.out});
    update(tape, critic, backward(tape, judged, critic, loss));
    const Activations again = forward(tape, fake.out, critic);
    const uint64_t gradient = backward(tape, again, critic, tape.op("mean", {again.out})).back();
    update(tape, generator, backward(tape, fake, generator, gradient));
    tape.drop_made();
    tape.drop_from_host();
  }
  const Result result = Replay(tape.stream).run();
  EXPECT_LE(result.programs, 4u);
  EXPECT_GE(result.verified, 0.93);
}

TEST(StepFinder, AnUnrolledLstmIsCutBetweenIterationsOnly) {
  Tape tape;
  const Weights weights = parameters(tape, 2);
  for (int i = 0; i < 30; ++i) {
    tape.iteration();
    const uint64_t x = tape.from_host();
    uint64_t state = tape.op("zeros", {});
    std::vector<Activations> steps;
    for (int t = 0; t < 20; ++t) {
      steps.push_back(forward(tape, tape.op("add", {tape.op("select", {x}), state}), weights));
      state = steps.back().out;
    }
    std::vector<uint64_t> gradients;
    uint64_t gradient = tape.op("mean", {state});
    for (size_t t = steps.size(); t-- > 0;) {
      gradients = backward(tape, steps[t], weights, gradient);
      gradient = gradients.back();
    }
    update(tape, weights, gradients);
    tape.drop_made();
    tape.drop_from_host();
  }
  const Result result = Replay(tape.stream).run();
  EXPECT_EQ(result.programs, 1u);
  EXPECT_GE(result.verified, 0.9);
  EXPECT_TRUE(only_between_iterations(tape.stream, result));
}

void infer(Tape& tape, const Weights& weights, int iterations) {
  tape.grad_mode = false;
  for (int i = 0; i < iterations; ++i) {
    tape.iteration();
    forward(tape, tape.from_host(), weights);
    tape.drop_made(1);  // the results are kept in a list
    tape.drop_from_host();
  }
}

TEST(StepFinder, AnInferenceLoopBecomesOneProgram) {
  Tape tape;
  infer(tape, parameters(tape, 14), 50);
  const Result result = Replay(tape.stream).run();
  EXPECT_EQ(result.programs, 1u);
  EXPECT_GE(result.verified, 0.93);
  EXPECT_TRUE(only_between_iterations(tape.stream, result));
}

TEST(StepFinder, FrozenWeightsAreToldFromBatches) {
  Tape tape;
  Weights weights;
  for (int i = 0; i < 14; ++i) weights.push_back(tape.from_host());
  infer(tape, weights, 60);
  const Result result = Replay(tape.stream).run();
  EXPECT_EQ(result.programs, 1u);
  EXPECT_GE(result.verified, 0.75);
  EXPECT_EQ(result.cuts.size(), 59u);  // the iterations before it knew, too
  EXPECT_TRUE(only_between_iterations(tape.stream, result));
}

TEST(StepFinder, MakingAModelOnTheDeviceIsNoPartOfTheStep) {
  Tape tape;
  Weights weights;
  for (int i = 0; i < 3; ++i) {
    weights.push_back(tape.op("empty", {}));
    tape.require_grad(weights.back());
    tape.write("uniform_", weights.back());
  }
  tape.drop_made(3);
  for (int i = 0; i < 50; ++i) train(tape, weights);
  const Result result = Replay(tape.stream).run();
  EXPECT_EQ(result.programs, 2u);
  EXPECT_EQ(result.cuts.front(), 6u);
  EXPECT_TRUE(only_between_iterations(tape.stream, result));
}

/// What the finder does when no op ever finds a path in the tree.
struct Fed {
  std::vector<size_t> cuts;
  size_t feeds = 0;
};

Fed feed_all(StepFinder& finder, const Stream& stream) {
  Fed fed;
  Feeder feeder(stream);
  size_t start = 0;
  for (size_t p = 0; p < stream.ops.size();) {
    ++fed.feeds;
    if (const auto cut = feeder.feed(finder, start, p++)) {
      p = start += *cut;
      fed.cuts.push_back(start);
    }
  }
  return fed;
}

TEST(StepFinder, AComputedLeafIsNoParameter) {
  Tape tape;
  const Weights weights = parameters(tape, 3);
  for (int i = 0; i < 50; ++i) {
    tape.iteration();
    const uint64_t x = tape.op("mul", {tape.from_host()});
    tape.require_grad(x);  // its gradient is wanted, as by an adversary
    const Activations activations = forward(tape, x, weights);
    const uint64_t gradient = tape.op("mean", {activations.out});
    update(tape, weights, backward(tape, activations, weights, gradient));
    tape.drop_made();
    tape.drop_from_host();
  }
  StepFinder finder;
  // As a parameter with a new identity each time it would hide the head.
  EXPECT_EQ(feed_all(finder, tape.stream).cuts.size(), 49u);
}

TEST(StepFinder, AProgramThatNeverRepeatsIsCutAtTheLimitAndFedAtMostTwice) {
  for (const bool grows : {false, true}) {
    Tape tape;
    const uint64_t w = tape.parameter();
    uint64_t x = tape.op("zeros", {});
    for (int i = 0; i < 100'000; ++i) {
      x = tape.op("op" + std::to_string(i), {x, w});
      tape.drop_made(grows ? 1 : 0);
    }
    StepFinder finder;
    const Fed fed = feed_all(finder, tape.stream);
    ASSERT_FALSE(fed.cuts.empty());
    EXPECT_LE(fed.feeds, 2 * tape.stream.ops.size());
    size_t start = 0;
    for (const size_t cut : fed.cuts) {
      EXPECT_LE(cut - start, StepFinder::kLongestSegment);
      start = cut;
    }
  }
}

// Where nothing repeats, an op may come again by chance as the header of a loop would. What
// is learned of it must not take the rest of the program to pieces.
TEST(StepFinder, ARecurrenceByChanceLeavesNoShortSteps) {
  Tape tape;
  const uint64_t factor = tape.parameter();
  uint64_t x = tape.from_host();
  const auto op = [&](const char* name, bool reads_factor) {
    x = reads_factor ? tape.op(name, {x, factor}) : tape.op(name, {x});
    tape.drop_made();
  };
  const auto stretch = [&](int others) {
    op("abs", false);
    op("mul", true);
    for (int k = 0; k < others; ++k) op("exp", false);
  };
  for (const int others : {10, 30, 40}) stretch(others);
  for (int k = 0; k < 1'000; ++k) stretch(1 + k % 5);
  StepFinder finder;
  const Fed fed = feed_all(finder, tape.stream);
  ASSERT_GE(fed.cuts.size(), 2u);
  for (size_t k = 1; k < fed.cuts.size(); ++k) EXPECT_GE(fed.cuts[k] - fed.cuts[k - 1], 24u);
}

TEST(StepFinder, NewModelsAreLearnedAfterMoreHeadsThanItKeeps) {
  Tape tape;
  constexpr size_t kModels = StepFinder::kMostHeads + 100, kIterations = 4;
  for (size_t m = 0; m < kModels; ++m) {
    const Weights weights = parameters(tape, 2);
    for (size_t i = 0; i < kIterations; ++i) train(tape, weights);
  }
  StepFinder finder;
  const Fed fed = feed_all(finder, tape.stream);
  EXPECT_GE(fed.cuts.size(), kModels * (kIterations - 1));
}

TEST(StepFinder, MarkedStepsAreLeftAlone) {
  Tape tape;
  const Weights weights = parameters(tape, 3);
  for (int i = 0; i < 20; ++i) train(tape, weights);
  StepFinder finder;
  Feeder feeder(tape.stream);
  size_t start = 0;
  for (size_t p = 0, mark = 0; p < tape.stream.ops.size(); ++p) {
    if (mark < tape.stream.iterations.size() && tape.stream.iterations[mark] == p) {
      finder.restart();
      start = p;
      ++mark;
    }
    EXPECT_FALSE(feeder.feed(finder, start, p));
  }
}

/// A recorded program: what was measured when the rules were tuned.
struct Recorded {
  const char* name;
  size_t programs;
  double verified;
};

std::ostream& operator<<(std::ostream& out, const Recorded& recorded) {
  return out << recorded.programs << " programs, " << recorded.verified << " verified";
}

class StepStreams : public testing::TestWithParam<Recorded> {};

TEST_P(StepStreams, AreCutIntoFewProgramsNearTheTrueSteps) {
  const char* folder = std::getenv("REPRISE_STEP_STREAMS");
  if (folder == nullptr) GTEST_SKIP() << "REPRISE_STEP_STREAMS is not set";
  const Recorded& expected = GetParam();
  const auto stream = Stream::load(std::string(folder) + "/" + expected.name + ".ops");
  ASSERT_TRUE(stream) << expected.name << " is not in " << folder;

  const Result aligned = Replay(*stream).run_aligned();
  const Result result = Replay(*stream).run();
  std::cout << expected.name << ": " << stream->ops.size() << " ops, cut at the true steps "
            << aligned.programs << " programs, " << 100 * aligned.verified << " % of ops; found "
            << result.programs << " programs, " << 100 * result.verified << " %\n";
  EXPECT_LE(result.programs, expected.programs + 1);
  EXPECT_GE(result.verified, expected.verified - 0.01);
  EXPECT_GE(result.verified, aligned.verified - 0.08);
}

INSTANTIATE_TEST_SUITE_P(
    Recorded, StepStreams,
    testing::Values(Recorded{"accum", 4, 0.992}, Recorded{"albert", 2, 0.932},
                    Recorded{"albert12_inf", 1, 0.967}, Recorded{"albert_inf", 1, 0.970},
                    Recorded{"albert_inf_frozen", 1, 0.977}, Recorded{"ckpt", 2, 0.935},
                    Recorded{"cnn_eval", 4, 0.982}, Recorded{"cnn_inf", 1, 0.985},
                    Recorded{"cnn_inf_frozen", 1, 0.945}, Recorded{"decode", 42, 0.750},
                    Recorded{"decode_static", 5, 0.981}, Recorded{"diff", 2, 0.992},
                    Recorded{"diff_int", 22, 0.984}, Recorded{"ema_clip", 5, 0.964},
                    Recorded{"gan", 5, 0.979}, Recorded{"gpt_zero", 2, 0.930},
                    Recorded{"lstm", 1, 0.933}, Recorded{"lstm40", 1, 0.857},
                    Recorded{"lstm_inf", 1, 0.975}, Recorded{"lstm_var", 4, 0.900},
                    Recorded{"mlp_built_on_device", 3, 0.989}, Recorded{"mlp_prefetch", 2, 0.989},
                    Recorded{"mlp_read", 4, 0.986}, Recorded{"mlp_sgd", 2, 0.990},
                    Recorded{"phases", 5, 0.986}, Recorded{"ppo", 8, 0.979},
                    Recorded{"rl", 63, 0.255}, Recorded{"rnn64_inf", 1, 0.967},
                    Recorded{"seq2seq", 5, 0.917}, Recorded{"wgan", 2, 0.990}),
    [](const auto& stream) { return std::string(stream.param.name); });

}  // namespace
}  // namespace reprise::step_streams
