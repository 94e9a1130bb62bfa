/// \file
/// Symbolic integers for libtorch: what is behind a `c10::SymInt` that came from a marked
/// size.
///
/// Each has an expression over symbols (`symbols.h`) and the value that it has now, so it
/// works wherever libtorch takes a `SymInt`. A comparison that steers C++ is answered from
/// the value and reported as a guard. Floats made of symbols are plain values.
#pragma once

#include <c10/core/SymInt.h>
#include <c10/core/SymNodeImpl.h>

#include <string>

#include "symint/expression.h"

namespace reprise {

/// Told of what the thread's C++ asks of symbols. Called at the asking line.
class GuardListener {
 public:
  virtual ~GuardListener() = default;
  /// `condition` was asked for, and holds; it depends on symbols.
  virtual void note_guard(const Expression& condition) = 0;
  /// The listener of the calling thread, null where there is none.
  static GuardListener*& current();
};

/// Immutable; safe to use from several threads.
class SymbolicNumber final : public c10::SymNodeImpl {
 public:
  enum class Kind : uint8_t { kInt, kBool, kFloat };

  SymbolicNumber(Kind kind, Expression expression, int64_t value, double real = 0);

  /// A `SymInt` with this expression; a plain one where that is a constant.
  static c10::SymInt make(const Expression& expression, int64_t value);
  /// What is behind `number`; null where it is plain, or libtorch's or somebody else's.
  static const SymbolicNumber* of(const c10::SymInt& number);
  /// The value of any number, ours or not, without a guard where it is ours.
  static int64_t value_of(const c10::SymInt& number) {
    return C10_LIKELY(!number.is_heap_allocated()) ? number.as_int_unchecked()
                                                   : symbolic_value_of(number);
  }

  const Expression& expression() const { return expression_; }
  int64_t value() const { return value_; }

  bool is_int() override { return kind_ == Kind::kInt; }
  bool is_bool() override { return kind_ == Kind::kBool; }
  bool is_float() override { return kind_ == Kind::kFloat; }
  bool has_hint() override { return true; }
  c10::SymNode clone() override;
  std::string str() override;

  c10::SymNode add(const c10::SymNode& other) override;
  c10::SymNode sub(const c10::SymNode& other) override;
  c10::SymNode mul(const c10::SymNode& other) override;
  c10::SymNode truediv(const c10::SymNode& other) override;
  c10::SymNode pow(const c10::SymNode& other) override;
  c10::SymNode floordiv(const c10::SymNode& other) override;
  c10::SymNode mod(const c10::SymNode& other) override;
  c10::SymNode eq(const c10::SymNode& other) override;
  c10::SymNode ne(const c10::SymNode& other) override;
  c10::SymNode gt(const c10::SymNode& other) override;
  c10::SymNode lt(const c10::SymNode& other) override;
  c10::SymNode le(const c10::SymNode& other) override;
  c10::SymNode ge(const c10::SymNode& other) override;
  c10::SymNode sym_min(const c10::SymNode& other) override;
  c10::SymNode sym_max(const c10::SymNode& other) override;
  c10::SymNode sym_or(const c10::SymNode& other) override;
  c10::SymNode sym_and(const c10::SymNode& other) override;
  c10::SymNode sym_not() override;
  c10::SymNode sym_ite(const c10::SymNode& then_value, const c10::SymNode& else_value) override;
  c10::SymNode ceil() override;
  c10::SymNode floor() override;
  c10::SymNode neg() override;
  c10::SymNode sym_float() override;
  c10::SymNode wrap_int(int64_t value) override;
  c10::SymNode wrap_float(double value) override;
  c10::SymNode wrap_bool(bool value) override;

  /// libtorch needs the number itself: what follows is right for this value alone, which
  /// the trace says where it matters.
  int64_t guard_int(const char* file, int64_t line) override;
  bool guard_bool(const char* file, int64_t line) override;
  double guard_float(const char* file, int64_t line) override;
  int64_t int_() override { return guard_int(__FILE__, __LINE__); }
  bool bool_() override { return guard_bool(__FILE__, __LINE__); }

 private:
  static int64_t symbolic_value_of(const c10::SymInt& number);
  double real() const { return kind_ == Kind::kFloat ? real_ : static_cast<double>(value_); }
  /// `kind` of both, in 64 bits; throws where that overflows or divides by zero.
  c10::SymNode combined(Expression::Kind kind, const c10::SymNode& other);
  c10::SymNode compared(Expression::Kind kind, const c10::SymNode& other);

  const Kind kind_;
  const Expression expression_;
  const int64_t value_;
  const double real_;
};

}  // namespace reprise
