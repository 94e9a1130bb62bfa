#include "symint/symbolic_number.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace reprise {
namespace {

using Kind = SymbolicNumber::Kind;
using Op = Expression::Kind;

c10::SymNode node(Kind kind, Expression expression, int64_t value, double real = 0) {
  return c10::make_intrusive<SymbolicNumber>(kind, std::move(expression), value, real);
}

/// The other side of an operator, which may be a constant that libtorch wrapped.
c10::intrusive_ptr<SymbolicNumber> ours(const c10::SymNode& other) {
  if (auto* number = dynamic_cast<SymbolicNumber*>(other.get())) {
    return c10::intrusive_ptr<SymbolicNumber>::reclaim_copy(number);
  }
  if (other->is_float()) {
    return c10::make_intrusive<SymbolicNumber>(Kind::kFloat, Expression::constant(0), 0,
                                               other->guard_float(__FILE__, __LINE__));
  }
  const bool boolean = other->is_bool();
  const int64_t value = boolean ? other->guard_bool(__FILE__, __LINE__)
                                : other->guard_int(__FILE__, __LINE__);
  return c10::make_intrusive<SymbolicNumber>(boolean ? Kind::kBool : Kind::kInt,
                                             Expression::constant(value), value);
}

bool is_number(const Expression& e) { return e.kind() == Op::kConstant; }
bool is_number(const Expression& e, int64_t value) { return is_number(e) && e.value() == value; }

/// What no symbols make negative.
bool is_natural(const Expression& e) {
  if (is_number(e)) return e.value() >= 0;
  if (e.kind() == Op::kSymbol) return true;
  const bool keeps = e.kind() == Op::kAdd || e.kind() == Op::kMultiply || e.kind() == Op::kMin ||
                     e.kind() == Op::kMax || e.kind() == Op::kFloorDivide;
  const auto& operands = e.operands();
  return keeps && std::all_of(operands.begin(), operands.end(), is_natural);
}

/// The same in fewer words.
Expression simplified(Op op, const Expression& a, const Expression& b, int64_t value) {
  if (is_number(a) && is_number(b)) return Expression::constant(value);
  switch (op) {
    case Op::kAdd:
      if (is_number(b, 0)) return a;
      if (is_number(a, 0)) return b;
      if (int64_t sum = 0; is_number(b) && a.kind() == Op::kAdd && is_number(a.operands().back()) &&
                           a.operands().size() == 2 &&
                           !__builtin_add_overflow(a.operands().back().value(), b.value(), &sum)) {
        return sum == 0 ? a.operands()[0] : Expression::of(Op::kAdd, {a.operands()[0], Expression::constant(sum)});
      }
      break;
    case Op::kSubtract:
      if (is_number(b, 0)) return a;
      if (a == b) return Expression::constant(0);
      break;
    case Op::kMultiply:
      if (is_number(b, 1)) return a;
      if (is_number(a, 1)) return b;
      if (is_number(a, 0) || is_number(b, 0)) return Expression::constant(0);
      break;
    case Op::kFloorDivide:
      if (is_number(b, 1)) return a;
      break;
    case Op::kMin:
    case Op::kMax:
    case Op::kEqual:
    case Op::kUnequal:
    case Op::kLess:
    case Op::kLessOrEqual:
    case Op::kGreater:
    case Op::kGreaterOrEqual:
      // A size is compared with -1 wherever one may be left to be inferred.
      if ((is_natural(a) && is_number(b) && b.value() < 0) ||
          (is_natural(b) && is_number(a) && a.value() < 0)) {
        return op == Op::kMin || op == Op::kMax ? (value < 0 ? Expression::constant(value)
                                                             : (is_number(a) ? b : a))
                                                : Expression::constant(value);
      }
      if (!(a == b)) break;
      return op == Op::kMin || op == Op::kMax ? a : Expression::constant(value);
    default:
      break;
  }
  return Expression::of(op, {a, b});
}

}  // namespace

GuardListener*& GuardListener::current() {
  thread_local GuardListener* listener = nullptr;
  return listener;
}

SymbolicNumber::SymbolicNumber(Kind kind, Expression expression, int64_t value, double real)
    : kind_(kind), expression_(std::move(expression)), value_(value), real_(real) {}

c10::SymInt SymbolicNumber::make(const Expression& expression, int64_t value) {
  if (is_number(expression)) return value;
  return c10::SymInt(node(Kind::kInt, expression, value));
}

const SymbolicNumber* SymbolicNumber::of(const c10::SymInt& number) {
  if (!number.is_heap_allocated()) return nullptr;
  return dynamic_cast<const SymbolicNumber*>(number.toSymNodeImplUnowned());
}

int64_t SymbolicNumber::symbolic_value_of(const c10::SymInt& number) {
  const SymbolicNumber* own = of(number);
  return own != nullptr ? own->value() : number.guard_int(__FILE__, __LINE__);
}

c10::SymNode SymbolicNumber::clone() { return node(kind_, expression_, value_, real_); }

std::string SymbolicNumber::str() {
  return kind_ == Kind::kFloat ? std::to_string(real_) : expression_.named_text();
}

c10::SymNode SymbolicNumber::combined(Op op, const c10::SymNode& with) {
  const auto other = ours(with);
  const auto text = [&] { return Expression::of(op, {expression_, other->expression_}).named_text(); };
  const bool divides = op == Op::kFloorDivide || op == Op::kModulo;
  TORCH_CHECK_VALUE(!divides || other->value_ != 0, "reprise: ", text(), " divides by zero: ",
                    other->expression_.named_text(), " is 0");
  const auto value = Expression::of(op, {Expression::constant(value_),
                                         Expression::constant(other->value_)}).evaluate({});
  TORCH_CHECK_VALUE(value.has_value(), "reprise: ", text(), " with ", value_, " and ",
                    other->value_, " does not fit into 64 bits");
  // A number that took so much to compute goes on as a plain one: another size is another trace.
  constexpr uint32_t kLongest = 512;
  Expression expression = simplified(op, expression_, other->expression_, *value);
  if (expression.length() > kLongest) expression = Expression::constant(*value);
  return node(Kind::kInt, std::move(expression), *value);
}

c10::SymNode SymbolicNumber::compared(Op op, const c10::SymNode& with) {
  const auto other = ours(with);
  if (kind_ == Kind::kFloat || other->kind_ == Kind::kFloat) {
    const double a = real(), b = other->real();
    const bool holds = op == Op::kEqual       ? a == b
                       : op == Op::kUnequal   ? a != b
                       : op == Op::kLess      ? a < b
                       : op == Op::kGreater   ? a > b
                       : op == Op::kLessOrEqual ? a <= b
                                                : a >= b;
    return wrap_bool(holds);
  }
  const int64_t value = *Expression::of(op, {Expression::constant(value_),
                                             Expression::constant(other->value_)}).evaluate({});
  return node(Kind::kBool, simplified(op, expression_, other->expression_, value), value);
}

c10::SymNode SymbolicNumber::add(const c10::SymNode& other) {
  if (is_float() || other->is_float()) return wrap_float(real() + ours(other)->real());
  return combined(Op::kAdd, other);
}
c10::SymNode SymbolicNumber::sub(const c10::SymNode& other) {
  if (is_float() || other->is_float()) return wrap_float(real() - ours(other)->real());
  return combined(Op::kSubtract, other);
}
c10::SymNode SymbolicNumber::mul(const c10::SymNode& other) {
  if (is_float() || other->is_float()) return wrap_float(real() * ours(other)->real());
  return combined(Op::kMultiply, other);
}
c10::SymNode SymbolicNumber::truediv(const c10::SymNode& other) {
  return wrap_float(real() / ours(other)->real());
}
c10::SymNode SymbolicNumber::pow(const c10::SymNode& other) {
  return wrap_float(std::pow(real(), ours(other)->real()));
}
c10::SymNode SymbolicNumber::floordiv(const c10::SymNode& other) {
  return combined(Op::kFloorDivide, other);
}
c10::SymNode SymbolicNumber::mod(const c10::SymNode& other) { return combined(Op::kModulo, other); }
c10::SymNode SymbolicNumber::eq(const c10::SymNode& other) { return compared(Op::kEqual, other); }
c10::SymNode SymbolicNumber::ne(const c10::SymNode& other) { return compared(Op::kUnequal, other); }
c10::SymNode SymbolicNumber::gt(const c10::SymNode& other) { return compared(Op::kGreater, other); }
c10::SymNode SymbolicNumber::lt(const c10::SymNode& other) { return compared(Op::kLess, other); }
c10::SymNode SymbolicNumber::le(const c10::SymNode& other) { return compared(Op::kLessOrEqual, other); }
c10::SymNode SymbolicNumber::ge(const c10::SymNode& other) { return compared(Op::kGreaterOrEqual, other); }
c10::SymNode SymbolicNumber::sym_min(const c10::SymNode& other) {
  if (is_float() || other->is_float()) return wrap_float(std::min(real(), ours(other)->real()));
  return combined(Op::kMin, other);
}
c10::SymNode SymbolicNumber::sym_max(const c10::SymNode& other) {
  if (is_float() || other->is_float()) return wrap_float(std::max(real(), ours(other)->real()));
  return combined(Op::kMax, other);
}
c10::SymNode SymbolicNumber::sym_or(const c10::SymNode& with) {
  const auto other = ours(with);
  return node(Kind::kBool, Expression::of(Op::kOr, {expression_, other->expression_}),
              value_ != 0 || other->value_ != 0);
}
c10::SymNode SymbolicNumber::sym_and(const c10::SymNode& with) {
  const auto other = ours(with);
  return node(Kind::kBool, Expression::of(Op::kAnd, {expression_, other->expression_}),
              value_ != 0 && other->value_ != 0);
}
c10::SymNode SymbolicNumber::sym_not() {
  return node(Kind::kBool, Expression::of(Op::kNot, {expression_}), value_ == 0);
}
c10::SymNode SymbolicNumber::sym_ite(const c10::SymNode& then_value, const c10::SymNode& else_value) {
  return guard_bool(__FILE__, __LINE__) ? then_value : else_value;
}
c10::SymNode SymbolicNumber::ceil() {
  return is_float() ? wrap_int(static_cast<int64_t>(std::ceil(real_))) : clone();
}
c10::SymNode SymbolicNumber::floor() {
  return is_float() ? wrap_int(static_cast<int64_t>(std::floor(real_))) : clone();
}
c10::SymNode SymbolicNumber::neg() {
  if (is_float()) return wrap_float(-real_);
  return wrap_int(0)->sub(c10::SymNode::reclaim_copy(this));
}
c10::SymNode SymbolicNumber::sym_float() { return wrap_float(real()); }
c10::SymNode SymbolicNumber::wrap_int(int64_t value) {
  return node(Kind::kInt, Expression::constant(value), value);
}
c10::SymNode SymbolicNumber::wrap_float(double value) {
  return node(Kind::kFloat, Expression::constant(0), 0, value);
}
c10::SymNode SymbolicNumber::wrap_bool(bool value) {
  return node(Kind::kBool, Expression::constant(value), value);
}

int64_t SymbolicNumber::guard_int(const char*, int64_t) {
  TORCH_CHECK(kind_ != Kind::kFloat, "reprise: ", real_, " is no integer");
  return value_;
}

bool SymbolicNumber::guard_bool(const char*, int64_t) {
  if (!is_number(expression_)) {
    if (GuardListener* listener = GuardListener::current()) {
      listener->note_guard(value_ != 0 ? expression_ : Expression::of(Op::kNot, {expression_}));
    }
  }
  return value_ != 0;
}

double SymbolicNumber::guard_float(const char*, int64_t) { return real(); }

}  // namespace reprise
