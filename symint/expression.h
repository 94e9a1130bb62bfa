/// \file
/// Integer expressions over symbols, as sizes of tensors are of one another.
///
/// Written in prefix form: `s0`, `12`, `(* 4 s0)`, `(// (+ s0 1) 2)`. The compiler gives
/// its guards in the same form: `(== (% s0 8) 0)`, `(and (>= s0 2) (!= s1 s0))`.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace reprise {

/// Immutable; copies share. Safe to use from several threads.
class Expression {
 public:
  enum class Kind : uint8_t {
    kConstant, kSymbol,
    kAdd, kSubtract, kMultiply, kFloorDivide, kModulo, kMin, kMax,
    kEqual, kUnequal, kLess, kLessOrEqual, kGreater, kGreaterOrEqual, kAnd, kOr, kNot,
  };

  static Expression constant(int64_t value);
  static Expression symbol(uint32_t index);
  static Expression of(Kind kind, std::vector<Expression> operands);

  /// Throws std::invalid_argument, which says where, for what is no expression.
  static Expression parse(std::string_view text);
  std::string text() const;
  /// For people: `4 * tokens`. Symbol k is called `names[k]`, or where none are given as
  /// `symbols.h` says; it must have a name there.
  std::string named_text(std::span<const std::string> names = {}) const;

  /// The value where symbol k is `symbols[k]`: comparisons give 0 or 1, division rounds
  /// down. Nothing where it overflows, divides by zero or names a symbol that is not there.
  std::optional<int64_t> evaluate(std::span<const int64_t> symbols) const;

  /// The same over other symbols: symbol k becomes `symbols[k]`, which must be there.
  Expression with_symbols(std::span<const uint32_t> symbols) const;
  /// Calls `visit(uint32_t symbol)` for each place where a symbol stands.
  template <class Visit>
  void for_each_symbol(const Visit& visit) const {
    if (kind() == Kind::kSymbol) visit(static_cast<uint32_t>(value()));
    for (const Expression& operand : node_->operands) operand.for_each_symbol(visit);
  }

  /// Written the same.
  bool operator==(const Expression& other) const {
    return node_ == other.node_ ||
           (node_->kind == other.node_->kind && node_->value == other.node_->value &&
            node_->operands == other.node_->operands);
  }

  Kind kind() const { return node_->kind; }
  const std::vector<Expression>& operands() const { return node_->operands; }
  /// Operators and operands that it is written with, those of shared parts each time.
  uint32_t length() const { return node_->length; }
  /// Of a constant or a symbol.
  int64_t value() const { return node_->value; }

 private:
  struct Node {
    Kind kind;
    int64_t value = 0;
    std::vector<Expression> operands;
    uint32_t length = 1;
  };
  explicit Expression(Node node) : node_(std::make_shared<const Node>(std::move(node))) {}
  std::shared_ptr<const Node> node_;
};

}  // namespace reprise
