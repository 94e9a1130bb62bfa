// Who wins a contest between a program and the interpreter, and what it costs.
#include "lazy_backend/contest.h"

#include <gtest/gtest.h>

#include <functional>
#include <random>

namespace reprise {
namespace {

struct Outcome {
  Contest contest;
  int program_runs = 0;
  int interpreter_runs = 0;
};

/// Runs a segment until the contest is decided, `most` times at most.
Outcome run(int most, const std::function<double()>& program,
            const std::function<double()>& interpreter) {
  Outcome outcome;
  auto& contest = outcome.contest;
  while (!contest.decided() && outcome.program_runs + outcome.interpreter_runs < most) {
    if (contest.next() == Contest::Runner::kProgram) {
      ++outcome.program_runs;
      contest.program_took(program());
    } else {
      ++outcome.interpreter_runs;
      contest.interpreter_took(interpreter());
    }
  }
  return outcome;
}

std::function<double()> always(double seconds) {
  return [=] { return seconds; };
}

/// Times spread by a fifth around a mean.
std::function<double()> noisy(double mean, std::mt19937& random) {
  return [mean, &random] { return std::normal_distribution(mean, 0.2 * mean)(random); };
}

TEST(Contest, AFasterProgramStaysAfterFewTurns) {
  const auto outcome = run(1000, always(1.0), always(2.0));
  EXPECT_TRUE(outcome.contest.decided());
  EXPECT_FALSE(outcome.contest.program_lost());
  EXPECT_LE(outcome.interpreter_runs, 8);
}

TEST(Contest, ASlowerProgramLosesAfterFewTurns) {
  const auto outcome = run(1000, always(2.0), always(1.0));
  EXPECT_TRUE(outcome.contest.program_lost());
  EXPECT_LE(outcome.program_runs, 10);
  EXPECT_EQ(outcome.contest.pairs_lost(), outcome.contest.pairs());
}

TEST(Contest, AProgramsFirstRunsDoNotCount) {
  int runs = 0;
  const auto slow_at_first = [&] { return ++runs <= 2 ? 100.0 : 1.0; };
  EXPECT_FALSE(run(1000, slow_at_first, always(1.5)).contest.program_lost());
}

TEST(Contest, NoiseDoesNotDecide) {
  std::mt19937 random(1);
  int wrong = 0;
  for (int contest = 0; contest < 1000; ++contest) {
    const auto outcome = run(100000, noisy(1.0, random), noisy(1.3, random));
    ASSERT_TRUE(outcome.contest.decided());
    wrong += outcome.contest.program_lost();
  }
  EXPECT_LE(wrong, 3);
}

TEST(Contest, AnOpenOneAsksTheInterpreterRarely) {
  int turn = 0;
  const auto alternately = [&] { return ++turn % 2 ? 0.9 : 1.1; };
  const auto outcome = run(4000, always(1.0), alternately);
  EXPECT_FALSE(outcome.contest.decided());
  EXPECT_LE(outcome.interpreter_runs, 4000 / 15);
  EXPECT_GE(outcome.interpreter_runs, 4000 / 20);
}

// As when a program does not cover the tensors that are alive: the interpreter runs
// though it was not its turn.
TEST(Contest, TurnsThatNobodyAskedForAreNoPairs) {
  Contest contest;
  for (int k = 0; k < 20; ++k) contest.interpreter_took(1.0);
  EXPECT_EQ(contest.pairs(), 0);
  EXPECT_EQ(contest.next(), Contest::Runner::kProgram);
}

}  // namespace
}  // namespace reprise
