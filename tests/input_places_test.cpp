// Which inputs of a program lie still: decides what a CUDA graph reads in place.
#include "lazy_backend/input_places.h"

#include <gtest/gtest.h>

namespace reprise {
namespace {

constexpr size_t kMost = 4;

/// Runs of a program, each with the addresses of its inputs.
class Runs {
 public:
  /// The user that the run belonged to.
  size_t run(std::vector<int> addresses) {
    std::vector<const void*> pointers;
    for (const int address : addresses) pointers.push_back(reinterpret_cast<const void*>(static_cast<intptr_t>(address)));
    const size_t k = user_at(users_, pointers, kMost, [](const InputPlaces& each) -> const InputPlaces& { return each; });
    if (k == users_.size()) users_.emplace_back();
    users_[k].see(pointers);
    return k;
  }
  size_t count() const { return users_.size(); }
  const InputPlaces& operator[](size_t k) const { return users_[k]; }

 private:
  std::vector<InputPlaces> users_;
};

TEST(InputPlaces, WhatNeverMovesIsSettledAfterSomeRuns) {
  Runs runs;
  for (int k = 0; k < InputPlaces::kRuns; ++k) {
    runs.run({10, 20});
    EXPECT_FALSE(runs[0].settled());
  }
  runs.run({10, 20});
  EXPECT_TRUE(runs[0].settled());
  EXPECT_FALSE(runs[0].moves(0) || runs[0].moves(1));
}

TEST(InputPlaces, AnActivationMovesBetweenParametersThatDoNot) {
  Runs runs;
  for (int k = 0; k < 8; ++k) EXPECT_EQ(runs.run({10, 20, 100 + k % 3}), 0u);
  EXPECT_TRUE(runs[0].settled());
  EXPECT_TRUE(runs[0].moves(2));
  EXPECT_EQ(runs[0].still(), 2u);
}

TEST(InputPlaces, ModelsThatShareAProgramAreApart) {
  Runs runs;
  for (int k = 0; k < 8; ++k) {
    EXPECT_EQ(runs.run({10, 20, 30, 100 + k}), 0u);
    EXPECT_EQ(runs.run({11, 21, 31, 100 + k}), 1u);
  }
  EXPECT_TRUE(runs[0].settled() && runs[1].settled());
  EXPECT_EQ(runs[0].still(), 3u);
  EXPECT_EQ(runs[1].still(), 3u);
  // One model goes, another one comes, and the first one has lost nothing.
  for (int k = 0; k < 8; ++k) runs.run({12, 22, 32, 200 + k});
  EXPECT_EQ(runs.run({10, 20, 30, 300}), 0u);
  EXPECT_TRUE(runs[0].settled());
}

TEST(InputPlaces, WhereAllMovesThatIsFoundToo) {
  Runs runs;
  for (int k = 0; k < 40; ++k) runs.run({100 + k, 200 + k});
  EXPECT_LE(runs.count(), kMost);
  const size_t last = runs.run({1, 2});
  EXPECT_TRUE(runs[last].settled());
  EXPECT_EQ(runs[last].still(), 0u);
}

TEST(InputPlaces, OneThatMovesLaterIsLookedAtAgain) {
  Runs runs;
  for (int k = 0; k < 6; ++k) runs.run({10, 20, 30});
  EXPECT_EQ(runs.run({10, 20, 31}), 0u);
  EXPECT_FALSE(runs[0].settled());
  for (int k = 0; k < InputPlaces::kRuns; ++k) runs.run({10, 20, 32 + k});
  EXPECT_TRUE(runs[0].settled());
}

}  // namespace
}  // namespace reprise
