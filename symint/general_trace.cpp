#include "symint/general_trace.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdlib>
#include <map>
#include <utility>

namespace reprise {
namespace {

using Kind = Expression::Kind;
using Values = std::vector<int64_t>;

// ---------------------------------------------------------------------------
// Taking a trace apart

constexpr std::string_view kInt = "{\"int\":";
constexpr std::string_view kSizes = "\"sizes\":[";
constexpr std::string_view kStrides = "\"strides\":[";
constexpr std::string_view kOffset = "\"offset\":";

// ---------------------------------------------------------------------------
// Finding expressions

Expression operator*(int64_t factor, const Expression& e) {
  return factor == 1 ? e : Expression::of(Kind::kMultiply, {Expression::constant(factor), e});
}
Expression operator+(const Expression& e, int64_t term) {
  return term == 0 ? e : Expression::of(Kind::kAdd, {e, Expression::constant(term)});
}
Expression divided(const Expression& e, int64_t divisor) {
  return Expression::of(Kind::kFloorDivide, {e, Expression::constant(divisor)});
}

/// A candidate that others are built of, with its value in each member.
struct Term {
  Expression expression;
  Values values;
};

class Fitter {
 public:
  Fitter(std::span<const Values> symbols, std::span<const int64_t> values, size_t most_constants,
         std::span<const Expression> sizes)
      : symbols_(symbols), values_(values), most_constants_(most_constants), sizes_(sizes) {}

  /// From the simplest to the least simple.
  std::optional<Expression> run() {
    if (std::all_of(values_.begin(), values_.end(), [&](int64_t v) { return v == values_[0]; })) {
      return Expression::constant(values_[0]);
    }
    // Sizes do not reach so far, nor what follows from them: `INT64_MAX` is "to the end".
    constexpr int64_t kFarthest = int64_t{1} << 40;
    if (std::any_of(values_.begin(), values_.end(), [](int64_t v) { return v < -kFarthest || v > kFarthest; })) {
      return std::nullopt;
    }
    make_terms();
    using Try = std::optional<Expression> (Fitter::*)();
    constexpr std::array<std::pair<size_t, Try>, 8> kTries = {{{0, &Fitter::itself},
                                                               {1, &Fitter::multiple},
                                                               {1, &Fitter::shifted},
                                                               {0, &Fitter::sum_or_difference},
                                                               {1, &Fitter::quotient},
                                                               {1, &Fitter::bounded},
                                                               {2, &Fitter::affine},
                                                               {3, &Fitter::rounded}}};
    for (const auto& [constants, attempt] : kTries) {
      if (constants > most_constants_) continue;
      if (auto found = (this->*attempt)()) return found;
    }
    return std::nullopt;
  }

 private:
  /// Symbols and sizes, their squares and products of up to three where they are few.
  void make_terms() {
    const size_t count = symbols_.empty() ? 0 : symbols_[0].size();
    for (uint32_t k = 0; k < count; ++k) {
      Term term{Expression::symbol(k), {}};
      for (const Values& member : symbols_) term.values.push_back(member[k]);
      singles_.push_back(std::move(term));
    }
    for (const Expression& size : sizes_) {
      Term term{size, {}};
      for (const Values& member : symbols_) term.values.push_back(size.evaluate(member).value());
      singles_.push_back(std::move(term));
    }
    terms_ = singles_;
    // Of many, products would be more than there is time for.
    const size_t most = singles_.size() <= 8 ? 3 : singles_.size() <= 24 ? 2 : 1;
    for (size_t degree = 2, begin = 0; degree <= most; ++degree) {
      const size_t end = terms_.size();
      for (size_t a = begin; a < end; ++a) {
        for (const Term& b : singles_) {
          Term product{Expression::of(Kind::kMultiply, {terms_[a].expression, b.expression}), {}};
          bool fits = true;
          for (size_t m = 0; m < values_.size(); ++m) {
            int64_t value = 0;
            fits = fits && !__builtin_mul_overflow(terms_[a].values[m], b.values[m], &value);
            product.values.push_back(value);
          }
          const auto same = [&](const Term& other) { return other.values == product.values; };
          if (fits && std::none_of(terms_.begin(), terms_.end(), same)) {
            terms_.push_back(std::move(product));
          }
        }
      }
      begin = end;
    }
  }

  bool right(const Expression& expression) const {
    for (size_t m = 0; m < values_.size(); ++m) {
      if (expression.evaluate(symbols_[m]) != values_[m]) return false;
    }
    return true;
  }
  std::optional<Expression> if_right(Expression expression) const {
    return right(expression) ? std::optional(std::move(expression)) : std::nullopt;
  }
  template <class Attempt>
  std::optional<Expression> first(const std::vector<Term>& terms, const Attempt& attempt) const {
    for (const Term& term : terms) {
      if (auto found = attempt(term)) return found;
    }
    return std::nullopt;
  }

  std::optional<Expression> itself() {
    return first(terms_, [&](const Term& t) { return if_right(t.expression); });
  }
  std::optional<Expression> multiple() {
    return first(terms_, [&](const Term& t) -> std::optional<Expression> {
      if (t.values[0] == 0 || values_[0] % t.values[0] != 0) return std::nullopt;
      return if_right(values_[0] / t.values[0] * t.expression);
    });
  }
  std::optional<Expression> shifted() {
    std::optional<Expression> nearest;
    int64_t least = INT64_MAX;
    for (const Term& t : terms_) {
      int64_t shift = 0;
      if (__builtin_sub_overflow(values_[0], t.values[0], &shift) || shift == INT64_MIN) continue;
      if (std::abs(shift) >= least) continue;
      if (auto found = if_right(t.expression + shift)) {
        nearest = std::move(found);
        least = std::abs(shift);
      }
    }
    return nearest;
  }
  std::optional<Expression> sum_or_difference() {
    return first(singles_, [&](const Term& a) {
      return first(singles_, [&](const Term& b) -> std::optional<Expression> {
        auto sum = if_right(Expression::of(Kind::kAdd, {a.expression, b.expression}));
        if (sum) return sum;
        return if_right(Expression::of(Kind::kSubtract, {a.expression, b.expression}));
      });
    });
  }
  std::optional<Expression> quotient() {
    return first(terms_, [&](const Term& t) -> std::optional<Expression> {
      if (values_[0] <= 0) return std::nullopt;
      for (const int64_t up : {0, 1}) {  // rounded down, rounded up
        const int64_t divisor = t.values[0] / std::max<int64_t>(values_[0] - up, 1);
        for (int64_t c = std::max<int64_t>(divisor - 1, 2); c <= divisor + 1; ++c) {
          if (auto found = if_right(divided(t.expression + up * (c - 1), c))) return found;
        }
      }
      return std::nullopt;
    });
  }
  std::optional<Expression> bounded() {
    return first(singles_, [&](const Term& t) -> std::optional<Expression> {
      for (size_t m = 0; m < values_.size(); ++m) {
        if (values_[m] == t.values[m]) continue;
        const Kind kind = values_[m] < t.values[m] ? Kind::kMin : Kind::kMax;
        return if_right(
            Expression::of(kind, {t.expression, Expression::constant(values_[m])}));
      }
      return std::nullopt;
    });
  }
  std::optional<Expression> affine() {
    return first(terms_, [&](const Term& t) -> std::optional<Expression> {
      for (size_t m = 1; m < values_.size(); ++m) {
        const int64_t rise = values_[m] - values_[0];
        int64_t run = 0;
        if (__builtin_sub_overflow(t.values[m], t.values[0], &run)) return std::nullopt;
        if (run == 0) continue;
        if (rise % run != 0) return std::nullopt;
        const int64_t slope = rise / run;
        int64_t product = 0, rest = 0;
        if (__builtin_mul_overflow(slope, t.values[0], &product) ||
            __builtin_sub_overflow(values_[0], product, &rest)) {
          return std::nullopt;
        }
        return if_right(slope * t.expression + rest);
      }
      return std::nullopt;
    });
  }
  /// What strides, kernels and paddings make of a size: (a x + b) // c + d.
  std::optional<Expression> rounded() {
    constexpr int64_t kMostStride = 8, kMostPadding = 8;
    return first(terms_, [&](const Term& t) -> std::optional<Expression> {
      for (int64_t c = 2; c <= kMostStride; ++c) {
        for (int64_t size = 0; size <= kMostPadding; ++size) {
          for (const int64_t b : {size, -size}) {
            const Expression whole = divided(t.expression + b, c);
            const auto at_first = whole.evaluate(symbols_[0]);
            if (!at_first) continue;
            if (auto found = if_right(whole + (values_[0] - *at_first))) return found;
          }
        }
      }
      return std::nullopt;
    });
  }

  const std::span<const Values> symbols_;
  const std::span<const int64_t> values_;
  const size_t most_constants_;
  const std::span<const Expression> sizes_;
  std::vector<Term> singles_, terms_;
};

}  // namespace

std::string place(const SplitTrace::Site& site, size_t number) {
  using Kind = SplitTrace::Site::Kind;
  const std::string input = "input " + std::to_string(site.input) +
                            (site.name.empty() ? "" : " (" + site.name + ")");
  switch (site.kind) {
    case Kind::kSize: return input + " dim " + std::to_string(site.dim);
    case Kind::kStride: return input + " stride " + std::to_string(site.dim);
    case Kind::kOffset: return input + " offset";
    case Kind::kArgument: break;
  }
  return "integer " + std::to_string(number) + " of the trace";
}

SplitTrace::SplitTrace(std::string_view trace) {
  size_t start = 0, at = 0;
  uint32_t inputs = 0;
  const auto take = [&](size_t digits, Site site) {
    int64_t value = 0;
    const auto [end, error] = std::from_chars(trace.begin() + digits, trace.end(), value);
    if (error != std::errc()) return digits;
    pieces.emplace_back(trace.substr(start, digits - start));
    sites.push_back(site);
    integers.push_back(value);
    return start = static_cast<size_t>(end - trace.begin());
  };
  const auto take_list = [&](size_t digits, Site site) {
    for (; digits < trace.size() && trace[digits] != ']'; ++site.dim) {
      const size_t next = take(digits, site);
      if (next == digits) return next;
      digits = next + (next < trace.size() && trace[next] == ',' ? 1 : 0);
    }
    return digits;
  };
  while (at < trace.size()) {
    const std::string_view rest = trace.substr(at);
    if (rest.starts_with(kInt)) {
      at = take(at + kInt.size(), {});
    } else if (rest.starts_with(kSizes)) {
      at = take_list(at + kSizes.size(), {Site::Kind::kSize, inputs++, 0});
    } else if (rest.starts_with(kStrides)) {
      at = take_list(at + kStrides.size(), {Site::Kind::kStride, inputs - 1, 0});
    } else if (rest.starts_with(kOffset)) {
      at = take(at + kOffset.size(), {Site::Kind::kOffset, inputs - 1, 0});
    } else {
      ++at;
    }
  }
  pieces.emplace_back(trace.substr(start));
}

std::string SplitTrace::skeleton() const {
  std::string out;
  for (const std::string& piece : pieces) {
    out += piece;
    out += '#';
  }
  return out;
}

std::optional<Expression> fit(std::span<const Values> symbols, std::span<const int64_t> values,
                              size_t most_constants, std::span<const Expression> sizes) {
  return Fitter(symbols, values, most_constants, sizes).run();
}

std::optional<GeneralTrace> GeneralTrace::make(const SplitTrace& like,
                                               std::span<const Values> all,
                                               std::string* problem) {
  const auto give_up = [&](const std::string& why) -> std::optional<GeneralTrace> {
    if (problem != nullptr) *problem = why;
    return std::nullopt;
  };
  const auto list = [](const Values& values) {
    std::string text;
    for (const int64_t value : values) text += (text.empty() ? "" : ", ") + std::to_string(value);
    return text;
  };
  const auto column = [](std::span<const Values> members, size_t site) {
    Values values;
    for (const Values& member : members) values.push_back(member[site]);
    return values;
  };
  const auto differs = [](const Values& values) {
    return std::any_of(values.begin(), values.end(), [&](int64_t v) { return v != values[0]; });
  };

  std::vector<Values> members(all.begin(), all.end());
  for (size_t site = 0; site < like.sites.size(); ++site) {
    if (like.sites[site].kind != SplitTrace::Site::Kind::kSize) continue;
    if (!differs(column(members, site))) continue;
    std::erase_if(members, [&](const Values& member) { return member[site] < 2; });
  }
  if (members.size() < 2) return give_up("sizes of 0 and 1 have programs of their own");

  GeneralTrace general;
  general.sites_ = like.sites;
  std::vector<Values> symbols(members.size());
  std::vector<std::optional<Expression>> found(like.sites.size());
  for (size_t site = 0; site < like.sites.size(); ++site) {
    if (like.sites[site].kind != SplitTrace::Site::Kind::kSize) continue;
    const Values values = column(members, site);
    found[site] = fit(symbols, values, members.size() - 2);
    if (found[site]) continue;
    found[site] = Expression::symbol(static_cast<uint32_t>(general.symbols_.size()));
    general.symbols_.push_back(site);
    for (size_t m = 0; m < members.size(); ++m) symbols[m].push_back(values[m]);
  }
  // What other integers are made of: sizes that are no symbols themselves.
  constexpr size_t kMostSizes = 4;
  std::vector<Expression> sizes;
  std::vector<Values> size_values;
  for (size_t site = 0; site < like.sites.size() && sizes.size() < kMostSizes; ++site) {
    if (!found[site] || found[site]->kind() == Kind::kConstant || found[site]->kind() == Kind::kSymbol) {
      continue;
    }
    Values values = column(members, site);
    if (std::find(size_values.begin(), size_values.end(), values) != size_values.end()) continue;
    sizes.push_back(*found[site]);
    size_values.push_back(std::move(values));
  }
  constexpr size_t kAnyConstants = 8;
  std::map<Values, std::optional<Expression>> fits;  // the same numbers come again and again
  // Arguments first: where an input lies often follows from a position, not the other way.
  for (const bool arguments : {true, false}) {
    for (size_t site = 0; site < like.sites.size(); ++site) {
      if (found[site] || arguments != (like.sites[site].kind == SplitTrace::Site::Kind::kArgument)) {
        continue;
      }
      const Values values = column(members, site);
      const auto [known, missing] = fits.try_emplace(values);
      if (missing) known->second = fit(symbols, values, kAnyConstants, sizes);
      if (!known->second) {
        const auto is_no_size = [](int64_t v) { return v < 0 || v > INT64_MAX - kNumberOffset; };
        if (std::any_of(values.begin(), values.end(), is_no_size)) {
          return give_up("no expression gives " + place(like.sites[site], site) + ": " +
                         list(values));
        }
        const auto number = static_cast<uint32_t>(general.symbols_.size());
        known->second = Expression::symbol(number) + -kNumberOffset;
        general.symbols_.push_back(site);
        ++general.numbers_;
        for (size_t m = 0; m < members.size(); ++m) {
          symbols[m].push_back(values[m] + kNumberOffset);
        }
      }
      found[site] = known->second;
    }
  }
  std::map<std::string, uint32_t> numbered;
  for (size_t site = 0; site < like.sites.size(); ++site) {
    const auto [known, missing] =
        numbered.try_emplace(found[site]->text(), static_cast<uint32_t>(numbered.size()));
    if (missing) general.expressions_.push_back(*found[site]);
    general.expected_.push_back(known->second);
  }
  if (general.symbols_.empty()) return give_up("nothing differs");

  std::string& text = general.text_;
  for (size_t site = 0; site < like.sites.size(); ++site) {
    text += like.pieces[site];
    const Expression& expression = general.expressions_[general.expected_[site]];
    if (expression.kind() == Kind::kConstant) {
      text += std::to_string(expression.value());
      continue;
    }
    const std::string quoted = "\"" + expression.text() + "\"";
    if (like.sites[site].kind == SplitTrace::Site::Kind::kArgument) {
      text.resize(text.size() - kInt.size());
      text += "{\"expr\":" + quoted;  // its brace follows
    } else {
      text += quoted;
    }
  }
  text += like.pieces.back();
  std::string hints;
  for (const int64_t hint : symbols.back()) {
    hints += (hints.empty() ? "" : ",") + std::to_string(hint);
  }
  constexpr std::string_view kHeader = "{\"format\":1,";
  text.replace(0, kHeader.size(),
               "{\"format\":1,\"symbols\":[" + hints +
                   "],\"numbers\":" + std::to_string(general.numbers_) + ",");
  return general;
}

int64_t GeneralTrace::symbol(std::span<const int64_t> integers, size_t k) const {
  const bool number = k + numbers_ >= symbols_.size();
  const int64_t value = integers[symbols_[k]];
  // One without its number is refused by the expressions.
  return number && value <= INT64_MAX - kNumberOffset ? value + kNumberOffset : value;
}

std::optional<Values> GeneralTrace::symbols_of(std::span<const int64_t> integers) const {
  if (integers.size() != expected_.size()) return std::nullopt;
  Values symbols;
  for (size_t k = 0; k < symbols_.size(); ++k) {
    symbols.push_back(symbol(integers, k));
    if (symbols.back() < 2) return std::nullopt;
  }
  std::vector<std::optional<int64_t>> values;
  values.reserve(expressions_.size());
  for (const Expression& expression : expressions_) values.push_back(expression.evaluate(symbols));
  for (size_t site = 0; site < expected_.size(); ++site) {
    if (values[expected_[site]] != integers[site]) return std::nullopt;
  }
  return symbols;
}

std::string GeneralTrace::mismatch(std::span<const int64_t> integers) const {
  if (integers.size() != expected_.size()) return "another trace";
  Values symbols;
  for (size_t k = 0; k < symbols_.size(); ++k) {
    symbols.push_back(symbol(integers, k));
    const size_t site = symbols_[k];
    if (symbols[k] < 2) return place(sites_[site], site) + " is " + std::to_string(integers[site]);
  }
  for (size_t site = 0; site < expected_.size(); ++site) {
    const Expression& expression = expressions_[expected_[site]];
    const auto value = expression.evaluate(symbols);
    if (value == integers[site]) continue;
    return place(sites_[site], site) + ": " + expression.named_text(names()) + " gives " +
           (value ? std::to_string(*value) : "nothing") + ", it is " + std::to_string(integers[site]);
  }
  return "";
}

std::vector<std::string> GeneralTrace::names() const {
  std::vector<std::string> out;
  for (size_t k = 0; k < symbols_.size(); ++k) {
    const std::string& name = sites_[symbols_[k]].name;
    out.push_back(name.empty() ? "s" + std::to_string(k) : name);
  }
  return out;
}

std::string GeneralTrace::symbols_text(std::span<const int64_t> symbols) const {
  const std::vector<std::string> all = names();
  std::string out;
  for (size_t k = 0; k < symbols_.size(); ++k) {
    SplitTrace::Site site = sites_[symbols_[k]];
    site.name.clear();
    out += (k > 0 ? ", " : "") + all[k] + " = " + std::to_string(symbols[k]) + " (" +
           place(site, symbols_[k]) + ")";
  }
  return out;
}

}  // namespace reprise
