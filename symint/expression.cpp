#include "symint/expression.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <stdexcept>
#include <utility>

#include "symint/symbols.h"

namespace reprise {
namespace {

using Kind = Expression::Kind;

struct Operator {
  std::string_view name;
  Kind kind;
};
constexpr std::array kOperators = {
    Operator{"+", Kind::kAdd},          Operator{"-", Kind::kSubtract},
    Operator{"*", Kind::kMultiply},     Operator{"//", Kind::kFloorDivide},
    Operator{"%", Kind::kModulo},       Operator{"min", Kind::kMin},
    Operator{"max", Kind::kMax},        Operator{"==", Kind::kEqual},
    Operator{"!=", Kind::kUnequal},     Operator{"<", Kind::kLess},
    Operator{"<=", Kind::kLessOrEqual}, Operator{">", Kind::kGreater},
    Operator{">=", Kind::kGreaterOrEqual},
    Operator{"and", Kind::kAnd},        Operator{"or", Kind::kOr},
    Operator{"not", Kind::kNot},
};

std::string_view name_of(Kind kind) {
  return std::find_if(kOperators.begin(), kOperators.end(),
                      [&](const Operator& each) { return each.kind == kind; })
      ->name;
}

/// How many operands: at least, at most.
std::pair<size_t, size_t> operands_of(Kind kind) {
  constexpr size_t kAny = SIZE_MAX;
  switch (kind) {
    case Kind::kConstant:
    case Kind::kSymbol: return {0, 0};
    case Kind::kNot: return {1, 1};
    case Kind::kAdd:
    case Kind::kMultiply:
    case Kind::kMin:
    case Kind::kMax:
    case Kind::kAnd:
    case Kind::kOr: return {1, kAny};
    default: return {2, 2};
  }
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Expression whole() {
    Expression expression = next();
    if (at_ != text_.size()) fail("the end");
    return expression;
  }

 private:
  static constexpr int kDeepest = 200;

  [[noreturn]] void fail(const std::string& expected) const {
    throw std::invalid_argument("expected " + expected + " at character " + std::to_string(at_) +
                                " of '" + std::string(text_) + "'");
  }
  std::string_view word() {
    const size_t start = at_;
    while (at_ < text_.size() && text_[at_] != ' ' && text_[at_] != ')' && text_[at_] != '(') ++at_;
    return text_.substr(start, at_ - start);
  }
  template <class Number>
  Number number(std::string_view digits) {
    Number value = 0;
    const auto [end, error] = std::from_chars(digits.begin(), digits.end(), value);
    if (error != std::errc() || end != digits.end()) fail("a number");
    return value;
  }

  Expression next() {
    if (at_ == text_.size()) fail("an expression");
    if (text_[at_] != '(') {
      const std::string_view name = word();
      if (name.starts_with('s')) return Expression::symbol(number<uint32_t>(name.substr(1)));
      return Expression::constant(number<int64_t>(name));
    }
    if (++depth_ > kDeepest) fail("fewer parentheses");
    ++at_;
    const std::string_view name = word();
    const auto* found = std::find_if(kOperators.begin(), kOperators.end(),
                                     [&](const Operator& each) { return each.name == name; });
    if (found == kOperators.end()) fail("an operator");
    std::vector<Expression> operands;
    while (at_ < text_.size() && text_[at_] == ' ') {
      ++at_;
      operands.push_back(next());
    }
    if (at_ == text_.size() || text_[at_] != ')') fail("')'");
    ++at_;
    --depth_;
    const auto [least, most] = operands_of(found->kind);
    if (operands.size() < least || operands.size() > most) fail("another number of operands");
    return Expression::of(found->kind, std::move(operands));
  }

  std::string_view text_;
  size_t at_ = 0;
  int depth_ = 0;
};

std::optional<int64_t> combine(Kind kind, int64_t a, int64_t b) {
  int64_t result = 0;
  switch (kind) {
    case Kind::kAdd: return __builtin_add_overflow(a, b, &result) ? std::nullopt : std::optional(result);
    case Kind::kSubtract: return __builtin_sub_overflow(a, b, &result) ? std::nullopt : std::optional(result);
    case Kind::kMultiply: return __builtin_mul_overflow(a, b, &result) ? std::nullopt : std::optional(result);
    case Kind::kFloorDivide:
    case Kind::kModulo: {
      if (b == 0 || (a == INT64_MIN && b == -1)) return std::nullopt;
      const int64_t quotient = a / b - ((a % b != 0) && ((a < 0) != (b < 0)) ? 1 : 0);
      return kind == Kind::kFloorDivide ? quotient : a - quotient * b;
    }
    case Kind::kMin: return std::min(a, b);
    case Kind::kMax: return std::max(a, b);
    case Kind::kEqual: return a == b;
    case Kind::kUnequal: return a != b;
    case Kind::kLess: return a < b;
    case Kind::kLessOrEqual: return a <= b;
    case Kind::kGreater: return a > b;
    case Kind::kGreaterOrEqual: return a >= b;
    case Kind::kAnd: return a != 0 && b != 0;
    case Kind::kOr: return a != 0 || b != 0;
    default: return std::nullopt;
  }
}

}  // namespace

Expression Expression::constant(int64_t value) {
  return Expression(Node{Kind::kConstant, value, {}, 1});
}
Expression Expression::symbol(uint32_t index) {
  return Expression(Node{Kind::kSymbol, index, {}, 1});
}
Expression Expression::of(Kind kind, std::vector<Expression> operands) {
  uint64_t length = 1;
  for (const Expression& operand : operands) length += operand.length();
  return Expression(Node{kind, 0, std::move(operands),
                         static_cast<uint32_t>(std::min<uint64_t>(length, UINT32_MAX))});
}

Expression Expression::parse(std::string_view text) { return Parser(text).whole(); }

std::string Expression::text() const {
  switch (kind()) {
    case Kind::kConstant: return std::to_string(value());
    case Kind::kSymbol: return "s" + std::to_string(value());
    default: break;
  }
  std::string out = "(" + std::string(name_of(kind()));
  for (const Expression& operand : node_->operands) out += " " + operand.text();
  return out + ")";
}

std::string Expression::named_text(std::span<const std::string> names) const {
  switch (kind()) {
    case Kind::kConstant: return std::to_string(value());
    case Kind::kSymbol:
      return names.empty() ? symbol_name(static_cast<uint32_t>(value()))
                           : names[static_cast<size_t>(value())];
    case Kind::kNot: {
      // A comparison says its contrary itself.
      constexpr std::array<std::pair<Kind, Kind>, 6> kContraries = {
          {{Kind::kEqual, Kind::kUnequal},
           {Kind::kUnequal, Kind::kEqual},
           {Kind::kLess, Kind::kGreaterOrEqual},
           {Kind::kLessOrEqual, Kind::kGreater},
           {Kind::kGreater, Kind::kLessOrEqual},
           {Kind::kGreaterOrEqual, Kind::kLess}}};
      const Expression& operand = node_->operands[0];
      for (const auto& [what, contrary] : kContraries) {
        if (operand.kind() == what) return of(contrary, operand.node_->operands).named_text(names);
      }
      return "not (" + operand.named_text(names) + ")";
    }
    default: break;
  }
  const bool call = kind() == Kind::kMin || kind() == Kind::kMax;
  const std::string name(name_of(kind()));
  std::string out;
  for (const Expression& operand : node_->operands) {
    if (!out.empty()) out += call ? ", " : " " + name + " ";
    const bool nested = !call && !operand.node_->operands.empty() &&
                        operand.kind() != Kind::kMin && operand.kind() != Kind::kMax;
    out += nested ? "(" + operand.named_text(names) + ")" : operand.named_text(names);
  }
  return call ? name + "(" + out + ")" : out;
}

Expression Expression::with_symbols(std::span<const uint32_t> symbols) const {
  if (kind() == Kind::kSymbol) return symbol(symbols[static_cast<size_t>(value())]);
  if (kind() == Kind::kConstant) return *this;
  std::vector<Expression> operands;
  for (const Expression& operand : node_->operands) operands.push_back(operand.with_symbols(symbols));
  return of(kind(), std::move(operands));
}

std::optional<int64_t> Expression::evaluate(std::span<const int64_t> symbols) const {
  switch (kind()) {
    case Kind::kConstant: return value();
    case Kind::kSymbol: {
      const auto index = static_cast<size_t>(value());
      return index < symbols.size() ? std::optional(symbols[index]) : std::nullopt;
    }
    default: break;
  }
  std::optional<int64_t> result;
  for (const Expression& operand : node_->operands) {
    const auto next = operand.evaluate(symbols);
    if (!next) return std::nullopt;
    result = result ? combine(kind(), *result, *next) : next;
    if (!result) return std::nullopt;
  }
  if (kind() == Kind::kNot) return *result == 0;
  if (kind() == Kind::kAnd || kind() == Kind::kOr) return *result != 0;
  return result;
}

}  // namespace reprise
