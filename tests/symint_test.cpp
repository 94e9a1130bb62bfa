// Integer expressions, and traces made general: no libtorch.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "symint/expression.h"
#include "symint/general_trace.h"

namespace reprise {
namespace {

using Kind = Expression::Kind;
using Values = std::vector<int64_t>;

TEST(Expressions, AreReadAndWrittenInPrefixForm) {
  for (const char* text :
       {"s0", "-12", "(* 4 s0)", "(// (+ s0 1) 2)", "(and (>= s0 2) (!= s1 (% s0 8)))",
        "(max (- s0 s1) 0)", "(not (== s0 1))", "(* s0 s0 s1)"}) {
    EXPECT_EQ(Expression::parse(text).text(), text);
  }
}

TEST(Expressions, RefuseWhatIsNone) {
  for (const char* text : {"", "s", "sx", "(", "()", "(+ s0", "(+ s0 1) 2", "(? s0 1)", "(// s0)",
                           "(not s0 s1)", "99999999999999999999", "(+)", "1.5"}) {
    EXPECT_THROW(Expression::parse(text), std::invalid_argument) << text;
  }
  EXPECT_THROW(Expression::parse(std::string(100'000, '(')), std::invalid_argument);
}

TEST(Expressions, RoundDownAndNoticeWhatHasNoValue) {
  const auto value = [](const char* text, Values symbols = {}) {
    return Expression::parse(text).evaluate(symbols);
  };
  EXPECT_EQ(value("(// -7 2)"), -4);
  EXPECT_EQ(value("(% -7 2)"), 1);
  EXPECT_EQ(value("(// 7 -2)"), -4);
  EXPECT_EQ(value("(min 3 s0 5)", {4}), 3);
  EXPECT_EQ(value("(or 0 (< s0 4))", {3}), 1);
  EXPECT_EQ(value("(// s0 0)", {3}), std::nullopt);
  EXPECT_EQ(value("(% s0 0)", {3}), std::nullopt);
  EXPECT_EQ(value("s1", {3}), std::nullopt);
  EXPECT_EQ(value("(* 4611686018427387904 4)"), std::nullopt);
  EXPECT_EQ(value("(+ 9223372036854775807 1)"), std::nullopt);
  EXPECT_EQ(value("(// -9223372036854775808 -1)"), std::nullopt);
}

std::string fitted(const std::vector<Values>& symbols, const Values& values, size_t constants = 8) {
  const auto found = fit(symbols, values, constants);
  return found ? found->text() : "nothing";
}

TEST(Fitting, PrefersWhatIsSimple) {
  const std::vector<Values> two = {{4, 64}, {6, 48}};
  EXPECT_EQ(fitted(two, {5, 5}), "5");
  EXPECT_EQ(fitted(two, {64, 48}), "s1");
  EXPECT_EQ(fitted(two, {256, 288}), "(* s0 s1)");
  EXPECT_EQ(fitted(two, {12, 18}), "(* 3 s0)");
  EXPECT_EQ(fitted(two, {65, 49}), "(+ s1 1)");
  EXPECT_EQ(fitted(two, {68, 54}), "(+ s0 s1)");
  EXPECT_EQ(fitted(two, {16 * 256, 16 * 288}), "(* 16 (* s0 s1))");
}

TEST(Fitting, FindsWhatLayersMakeOfSizes) {
  const std::vector<Values> sizes = {{32}, {48}, {35}, {64}, {51}};
  const auto apply = [&](auto&& function) {
    Values values;
    for (const Values& member : sizes) values.push_back(function(member[0]));
    return values;
  };
  EXPECT_EQ(fitted(sizes, apply([](int64_t x) { return (x + 1) / 2; })), "(// (+ s0 1) 2)");
  EXPECT_EQ(fitted(sizes, apply([](int64_t x) { return x / 4; })), "(// s0 4)");
  EXPECT_EQ(fitted(sizes, apply([](int64_t x) { return 3 * x - 2; })), "(+ (* 3 s0) -2)");
  EXPECT_EQ(fitted(sizes, apply([](int64_t x) { return std::min<int64_t>(x, 40); })), "(min s0 40)");
  // A convolution without padding: written otherwise, and the same.
  const auto windows = [](int64_t x) { return (x - 3) / 2 + 1; };
  const auto found = fit(sizes, apply(windows), 8);
  ASSERT_TRUE(found);
  for (int64_t x = 3; x < 100; ++x) EXPECT_EQ(found->evaluate(Values{x}), windows(x)) << found->text();
}

TEST(Fitting, TakesNoMoreConstantsThanItMay) {
  const std::vector<Values> two = {{4}, {6}};
  EXPECT_EQ(fitted(two, {10, 14}, 1), "nothing");  // any two points lie on a line
  EXPECT_EQ(fitted(two, {10, 14}, 2), "(+ (* 2 s0) 2)");
}

/// What is fitted to few samples may be wrong elsewhere. Whatever it is, it gives the
/// samples' values, and `evaluate` tells where it differs from the truth.
TEST(Fitting, MakesNothingOfTheEndOfATensor) {
  const std::vector<Values> sizes{{6}, {9}, {11}}, ends{{INT64_MAX}, {4}, {7}};
  EXPECT_FALSE(fit(sizes, std::vector<int64_t>{INT64_MAX, 4, 7}, 8));
  EXPECT_FALSE(fit(ends, std::vector<int64_t>{6, -9, 11}, 8));
  EXPECT_TRUE(fit(sizes, std::vector<int64_t>{INT64_MAX, INT64_MAX, INT64_MAX}, 8));
}

TEST(Fitting, EndsWhereSymbolsAreMany) {
  // Of 64 sizes, products of three would be 48,000.
  std::vector<std::vector<int64_t>> members(3);
  for (int64_t member = 0; member < 3; ++member) {
    for (int64_t k = 0; k < 64; ++k) members[static_cast<size_t>(member)].push_back(2 + (7 * member + 5 * k * k) % 61);
  }
  const std::vector<int64_t> unknown{5, 1000, 77};
  for (int time = 0; time < 50; ++time) (void)fit(members, unknown, 8);
}

TEST(Fitting, IsRightWhereItWasAsked) {
  std::mt19937 random(1);
  const auto below = [&](int n) { return static_cast<int64_t>(random() % static_cast<uint32_t>(n)); };
  const std::function<Expression(int)> tree = [&](int depth) -> Expression {
    if (depth == 0 || below(4) == 0) {
      return below(2) == 0 ? Expression::symbol(static_cast<uint32_t>(below(3)))
                           : Expression::constant(below(9) - 2);
    }
    constexpr Kind kinds[] = {Kind::kAdd, Kind::kSubtract, Kind::kMultiply, Kind::kFloorDivide,
                              Kind::kMin, Kind::kMax,      Kind::kModulo};
    return Expression::of(kinds[below(7)], {tree(depth - 1), tree(depth - 1)});
  };
  const auto point = [&] { return Values{2 + below(60), 2 + below(60), 2 + below(60)}; };
  int found = 0, right_elsewhere = 0, told = 0;
  for (int k = 0; k < 8'000; ++k) {
    const Expression truth = tree(3);
    std::vector<Values> samples;
    Values values;
    while (samples.size() < 2 + static_cast<size_t>(k % 3)) {
      const Values at = point();
      const auto value = truth.evaluate(at);
      if (!value) break;
      samples.push_back(at);
      values.push_back(*value);
    }
    if (samples.size() < 2) continue;
    const auto guess = fit(samples, values, 8);
    if (!guess) continue;
    ++found;
    EXPECT_EQ(Expression::parse(guess->text()).text(), guess->text());
    for (size_t m = 0; m < samples.size(); ++m) {
      ASSERT_EQ(guess->evaluate(samples[m]), values[m]) << truth.text() << " as " << guess->text();
    }
    const Values elsewhere = point();
    if (const auto value = truth.evaluate(elsewhere)) {
      ++(guess->evaluate(elsewhere) == value ? right_elsewhere : told);
    }
  }
  EXPECT_GT(found, 2'000);
  EXPECT_GT(right_elsewhere, told / 4);
  EXPECT_GT(told, 0) << "the test asks nothing";
}

/// A trace of an input of `batch` x `length`, one of batch * length, a view and a slice.
std::string trace(int64_t batch, int64_t length, int64_t dim = 1) {
  const auto n = [](int64_t value) { return std::to_string(value); };
  return "{\"format\":1,\"device\":\"cpu\",\"inputs\":[{\"kind\":\"tensor\",\"dtype\":\"float32\","
         "\"sizes\":[" + n(batch) + "," + n(length) + "],\"strides\":[" + n(length) +
         ",1],\"offset\":0},{\"kind\":\"tensor\",\"dtype\":\"int64\",\"sizes\":[" +
         n(batch * length) + "],\"strides\":[1],\"offset\":0}],\"steps\":[{\"op\":\"aten::view\","
         "\"overload\":\"\",\"args\":[{\"value\":0},{\"list\":[{\"int\":" + n(batch * length) +
         "}]}],\"results\":[{\"value\":2}]},\n{\"op\":\"aten::slice\",\"overload\":\"Tensor\","
         "\"args\":[{\"value\":2},{\"int\":" + n(dim) + "},{\"int\":0},{\"int\":" + n(length - 1) +
         "},{\"int\":1}],\"results\":[{\"value\":3}]}],\"outputs\":[3]}";
}

TEST(GeneralTraces, ComeFromTwoThatDifferInSizes) {
  const SplitTrace a(trace(4, 64)), b(trace(6, 48));
  EXPECT_EQ(a.skeleton(), b.skeleton());
  const std::vector<Values> members = {a.integers, b.integers};
  const auto general = GeneralTrace::make(b, members);
  ASSERT_TRUE(general);
  EXPECT_EQ(general->symbol_count(), 2u);
  EXPECT_EQ(general->symbols_text(Values{6, 48}), "s0 = 6 (input 0 dim 0), s1 = 48 (input 0 dim 1)");
  for (const char* part : {"\"symbols\":[6,48]", "\"sizes\":[\"s0\",\"s1\"]", "\"strides\":[\"s1\",1]",
                           "\"sizes\":[\"(* s0 s1)\"]", "{\"expr\":\"(* s0 s1)\"}",
                           "{\"expr\":\"(+ s1 -1)\"}"}) {
    EXPECT_NE(general->text().find(part), std::string::npos) << part << " in " << general->text();
  }
  EXPECT_EQ(general->symbols_of(SplitTrace(trace(3, 40)).integers), (Values{3, 40}));
  // One whose integers are not what the expressions say is no member.
  EXPECT_FALSE(general->symbols_of(SplitTrace(trace(3, 40, 0)).integers));
  EXPECT_FALSE(general->symbols_of(SplitTrace(trace(1, 40)).integers));
}

TEST(GeneralTraces, LeaveSizesOfOneAlone) {
  const SplitTrace a(trace(4, 64)), b(trace(1, 64)), c(trace(6, 48));
  EXPECT_FALSE(GeneralTrace::make(b, std::vector<Values>{a.integers, b.integers}));
  const auto general =
      GeneralTrace::make(c, std::vector<Values>{a.integers, b.integers, c.integers});
  ASSERT_TRUE(general);
  EXPECT_EQ(general->symbol_count(), 2u);
  EXPECT_FALSE(general->symbols_of(b.integers));
}

TEST(GeneralTraces, TakeOtherIntegersAsNumbers) {
  const SplitTrace a(trace(4, 64, 0)), b(trace(4, 64, 9)), c(trace(4, 64, 5));
  EXPECT_EQ(a.skeleton(), b.skeleton());
  const auto general = GeneralTrace::make(b, std::vector<Values>{a.integers, b.integers});
  ASSERT_TRUE(general);
  EXPECT_EQ(general->symbol_count(), 1u);
  EXPECT_EQ(general->number_count(), 1u);
  for (const char* part :
       {"\"symbols\":[11],\"numbers\":1,", "{\"expr\":\"(+ s0 -2)\"}", "\"sizes\":[4,64]"}) {
    EXPECT_NE(general->text().find(part), std::string::npos) << part << " in " << general->text();
  }
  EXPECT_EQ(general->symbols_of(c.integers), Values{7});
  EXPECT_FALSE(general->symbols_of(SplitTrace(trace(4, 64, -1)).integers));
  EXPECT_FALSE(general->symbols_of(SplitTrace(trace(4, 32, 9)).integers));
}

/// A part of a storage, which begins at `offset` with `stride` between its rows, and a position.
std::string part(int64_t offset, int64_t stride, int64_t position) {
  return "{\"format\":1,\"device\":\"cpu\",\"inputs\":[{\"kind\":\"tensor\",\"dtype\":\"float32\","
         "\"sizes\":[8,32],\"strides\":[" + std::to_string(stride) + ",1],\"offset\":" +
         std::to_string(offset) + "}],\"steps\":[{\"op\":\"aten::select\",\"args\":[{\"int\":" +
         std::to_string(position) + "}]}]}";
}

TEST(GeneralTraces, TakeWhereAnInputLiesAsANumber) {
  const SplitTrace a(part(32, 640, 7)), b(part(96, 960, 7)), c(part(320, 1600, 7)),
      d(part(320, 640, 7));
  const auto general =
      GeneralTrace::make(b, std::vector<Values>{a.integers, d.integers, b.integers});
  ASSERT_TRUE(general);
  EXPECT_EQ(general->number_count(), 2u);
  EXPECT_TRUE(general->symbols_of(c.integers));
  EXPECT_FALSE(general->symbols_of(SplitTrace(part(320, 1600, 8)).integers));
}

TEST(GeneralTraces, ExplainWhereAnInputLiesByPositions) {
  // The other way round, 7 is 226 // 31, and so is 224 // 31, at this place alone.
  const SplitTrace a(part(96, 640, 3)), b(part(224, 640, 7)), c(part(1120, 640, 35));
  const auto general = GeneralTrace::make(b, std::vector<Values>{a.integers, b.integers});
  ASSERT_TRUE(general);
  EXPECT_EQ(general->number_count(), 1u);
  EXPECT_TRUE(general->symbols_of(c.integers)) << general->mismatch(c.integers);
}

TEST(GeneralTraces, NeedSomethingThatDiffers) {
  const SplitTrace a(trace(4, 64));
  EXPECT_FALSE(GeneralTrace::make(a, std::vector<Values>{a.integers, a.integers}));
}

TEST(GeneralTraces, KeepTheTextOfTheRest) {
  const SplitTrace a(trace(4, 64));
  std::string whole;
  for (size_t k = 0; k < a.integers.size(); ++k) {
    whole += a.pieces[k] + std::to_string(a.integers[k]);
  }
  EXPECT_EQ(whole + a.pieces.back(), trace(4, 64));
}

}  // namespace
}  // namespace reprise
