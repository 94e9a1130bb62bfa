/// \file
/// Python's arithmetic on sizes, on numbers and on symbols alike.
#include <c10/core/SymBool.h>
#include <c10/core/SymFloat.h>
#include <c10/core/SymInt.h>

#include <cmath>
#include <functional>
#include <unordered_map>

#include "interchange/exported_graph.h"

namespace reprise {
namespace {

using Values = std::span<const c10::IValue>;

bool is_integer(const c10::IValue& value) { return value.isInt() || value.isSymInt() || value.isBool(); }

c10::SymInt as_int(const c10::IValue& value) {
  return value.isBool() ? c10::SymInt(value.toBool() ? 1 : 0) : value.toSymInt();
}
c10::SymFloat as_float(const c10::IValue& value) {
  return is_integer(value) ? static_cast<c10::SymFloat>(as_int(value)) : value.toSymFloat();
}
bool as_bool(const c10::IValue& value) {
  if (is_integer(value)) return as_int(value).guard_int(__FILE__, __LINE__) != 0;
  return value.isSymBool() ? value.toSymBool().guard_bool(__FILE__, __LINE__)
                           : as_float(value).guard_float(__FILE__, __LINE__) != 0;
}

/// `Of` on two integers, or else on two floats.
template <class Of>
c10::IValue both(Values values) {
  const bool integers = is_integer(values[0]) && is_integer(values[1]);
  return integers ? c10::IValue(Of()(as_int(values[0]), as_int(values[1])))
                  : c10::IValue(Of()(as_float(values[0]), as_float(values[1])));
}

struct Greatest {
  auto operator()(const auto& a, const auto& b) const { return a.max(b); }
};
struct Least {
  auto operator()(const auto& a, const auto& b) const { return a.min(b); }
};

c10::SymInt floor_divide(const c10::SymInt& a, const c10::SymInt& b) {
  const auto x = a.maybe_as_int(), y = b.maybe_as_int();
  if (!x || !y) return a / b;  // of sizes, which are not negative
  TORCH_CHECK(*y != 0, "reprise: a size is divided by zero");
  const int64_t quotient = *x / *y;
  return *x % *y != 0 && (*x < 0) != (*y < 0) ? quotient - 1 : quotient;
}

c10::SymInt modulo(const c10::SymInt& a, const c10::SymInt& b) {
  const auto x = a.maybe_as_int(), y = b.maybe_as_int();
  if (!x || !y) return a % b;
  TORCH_CHECK(*y != 0, "reprise: a size is divided by zero");
  const int64_t rest = *x % *y;
  return rest != 0 && (rest < 0) != (*y < 0) ? rest + *y : rest;
}

c10::IValue power(Values values) {
  if (!is_integer(values[0]) || !is_integer(values[1])) {
    return std::pow(as_float(values[0]).guard_float(__FILE__, __LINE__),
                    as_float(values[1]).guard_float(__FILE__, __LINE__));
  }
  const int64_t exponent = as_int(values[1]).guard_int(__FILE__, __LINE__);
  if (exponent < 0) {
    return std::pow(as_float(values[0]).guard_float(__FILE__, __LINE__), static_cast<double>(exponent));
  }
  c10::SymInt result = 1;
  for (int64_t k = 0; k < exponent; ++k) result = result * as_int(values[0]);
  return result;
}

/// Towards zero.
c10::IValue truncate(Values values) {
  if (is_integer(values[0])) return as_int(values[0]);
  return static_cast<int64_t>(as_float(values[0]).guard_float(__FILE__, __LINE__));
}

const std::unordered_map<std::string, SizeFunction>& table() {
  static const auto* functions = new std::unordered_map<std::string, SizeFunction>{
      {"_operator.add", both<std::plus<>>},
      {"_operator.sub", both<std::minus<>>},
      {"_operator.mul", both<std::multiplies<>>},
      {"_operator.truediv",
       [](Values values) -> c10::IValue { return as_float(values[0]) / as_float(values[1]); }},
      {"_operator.floordiv",
       [](Values values) -> c10::IValue {
         if (is_integer(values[0]) && is_integer(values[1])) {
           return floor_divide(as_int(values[0]), as_int(values[1]));
         }
         return std::floor((as_float(values[0]) / as_float(values[1])).guard_float(__FILE__, __LINE__));
       }},
      {"_operator.mod",
       [](Values values) -> c10::IValue { return modulo(as_int(values[0]), as_int(values[1])); }},
      {"_operator.pow", power},
      {"_operator.neg",
       [](Values values) -> c10::IValue {
         if (is_integer(values[0])) return c10::SymInt(0) - as_int(values[0]);
         return c10::SymFloat(0.0) - as_float(values[0]);
       }},
      {"_operator.pos", [](Values values) -> c10::IValue { return values[0]; }},
      {"_operator.eq", both<std::equal_to<>>},
      {"_operator.ne", both<std::not_equal_to<>>},
      {"_operator.lt", both<std::less<>>},
      {"_operator.le", both<std::less_equal<>>},
      {"_operator.gt", both<std::greater<>>},
      {"_operator.ge", both<std::greater_equal<>>},
      {"_operator.and_", [](Values values) -> c10::IValue { return as_bool(values[0]) && as_bool(values[1]); }},
      {"_operator.or_", [](Values values) -> c10::IValue { return as_bool(values[0]) || as_bool(values[1]); }},
      {"_operator.lshift",
       [](Values values) -> c10::IValue {
         return as_int(values[0]) * (int64_t{1} << as_int(values[1]).guard_int(__FILE__, __LINE__));
       }},
      {"_operator.rshift",
       [](Values values) -> c10::IValue {
         return floor_divide(as_int(values[0]), int64_t{1} << as_int(values[1]).guard_int(__FILE__, __LINE__));
       }},
      {"math.trunc", truncate},
      {"torch.sym_int", truncate},
      {"torch.sym_float", [](Values values) -> c10::IValue { return as_float(values[0]); }},
      {"torch.sym_not", [](Values values) -> c10::IValue { return !as_bool(values[0]); }},
      {"torch.sym_ite", [](Values values) -> c10::IValue { return as_bool(values[0]) ? values[1] : values[2]; }},
      {"torch.sym_max", both<Greatest>},
      {"torch.sym_min", both<Least>},
      {"torch._sym_sqrt",
       [](Values values) -> c10::IValue {
         return std::sqrt(as_float(values[0]).guard_float(__FILE__, __LINE__));
       }},
  };
  return *functions;
}

}  // namespace

SizeFunction size_function(const std::string& target) {
  const auto found = table().find(target);
  return found == table().end() ? nullptr : found->second;
}

}  // namespace reprise
