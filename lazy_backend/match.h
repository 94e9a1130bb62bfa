/// \file
/// Compares the arguments of a call with recorded ones, binding slots on the way.
///
/// Nothing is allocated. Each overload takes one type of op signatures; the one
/// for `IValue` serves the boxed entry.
#pragma once

#include <ATen/core/ATen_fwd.h>
#include <ATen/core/IListRef.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Scalar.h>
#include <c10/core/SymIntArrayRef.h>

#include <bit>
#include <optional>
#include <string_view>

#include "lazy_backend/segment.h"
#include "lazy_backend/trace.h"

namespace reprise {

class Matcher {
 public:
  /// With `floats_may_differ`, floats that could be made dynamic match any
  /// value, and `differing` tells whether one did.
  explicit Matcher(Segment& segment, bool floats_may_differ = false)
      : segment_(segment), floats_may_differ_(floats_may_differ) {}

  bool differing = false;

  bool match(const Arg& arg, const at::Tensor& tensor) {
    if (C10_LIKELY(arg.kind == Arg::Kind::kTensor)) {
      return tensor.defined() && match_lazy(arg, *tensor.unsafeGetTensorImpl());
    }
    if (!tensor.defined()) {
      return arg.kind == Arg::Kind::kUndefined || arg.kind == Arg::Kind::kNone;
    }
    return arg.kind == Arg::Kind::kNumber && match_number(arg, tensor);
  }
  bool match(const Arg& arg, const std::optional<at::Tensor>& tensor) {
    if (!tensor.has_value()) {
      return arg.kind == Arg::Kind::kNone || arg.kind == Arg::Kind::kUndefined;
    }
    return match(arg, *tensor);
  }
  bool match(const Arg& arg, bool value) { return arg.kind == Arg::Kind::kBool && arg.b == value; }
  bool match(const Arg& arg, int64_t value) {
    return arg.kind == Arg::Kind::kInt && arg.i == value;
  }
  bool match(const Arg& arg, double value) {
    return arg.kind == Arg::Kind::kDouble && match_float(arg, arg.d, value);
  }
  bool match(const Arg& arg, const c10::SymInt& value) {
    return !value.is_heap_allocated() && match(arg, value.as_int_unchecked());
  }
  bool match(const Arg& arg, const at::Scalar& value) {
    if (value.isFloatingPoint()) return match(arg, value.to<double>());
    if (value.isBoolean()) return match(arg, value.to<bool>());
    if (value.isIntegral(/*includeBool=*/false)) return match(arg, value.to<int64_t>());
    return arg.kind == Arg::Kind::kConstant && match_constant(arg, c10::IValue(value));
  }
  bool match(const Arg& arg, at::ScalarType value) { return match(arg, int64_t(value)); }
  bool match(const Arg& arg, at::Layout value) { return match(arg, int64_t(value)); }
  bool match(const Arg& arg, at::MemoryFormat value) { return match(arg, int64_t(value)); }
  bool match(const Arg& arg, c10::IntArrayRef value) {
    return arg.kind == Arg::Kind::kIntList && arg.ints() == value;
  }
  bool match(const Arg& arg, c10::SymIntArrayRef value) {
    if (arg.kind != Arg::Kind::kIntList) return false;
    const auto ints = arg.ints();
    if (ints.size() != value.size()) return false;
    for (size_t k = 0; k < ints.size(); ++k) {
      if (value[k].is_heap_allocated() || value[k].as_int_unchecked() != ints[k]) return false;
    }
    return true;
  }
  bool match(const Arg& arg, const at::OptionalIntArrayRef& value) {
    return value.has_value() ? match(arg, *value) : arg.kind == Arg::Kind::kNone;
  }
  bool match(const Arg& arg, const at::OptionalSymIntArrayRef& value) {
    return value.has_value() ? match(arg, *value) : arg.kind == Arg::Kind::kNone;
  }
  bool match(const Arg& arg, std::string_view value) {
    return arg.kind == Arg::Kind::kConstant && arg.constant().isString() &&
           arg.constant().toStringView() == value;
  }
  bool match(const Arg& arg, at::TensorList value) { return match_list(arg, value); }
  bool match(const Arg& arg, const at::ITensorListRef& value) {
    if (arg.kind != Arg::Kind::kList || arg.list().size() != value.size()) return false;
    size_t k = 0;
    for (const at::Tensor& tensor : value) {
      if (!match(arg.list()[k++], tensor)) return false;
    }
    return true;
  }
  bool match(const Arg& arg, const c10::List<std::optional<at::Tensor>>& value) {
    if (arg.kind != Arg::Kind::kList || arg.list().size() != value.size()) return false;
    for (size_t k = 0; k < value.size(); ++k) {
      // A view into the list, no copy of the tensor.
      const c10::IValue& item = value.get(k).has_value() ? c10::IValue(*value.get(k)) : c10::IValue();
      if (!match(arg.list()[k], item)) return false;
    }
    return true;
  }
  template <class T>
  bool match(const Arg& arg, const std::optional<T>& value) {
    return value.has_value() ? match(arg, *value) : arg.kind == Arg::Kind::kNone;
  }
  template <size_t N>
  bool match(const Arg& arg, const std::array<bool, N>& value) {
    if (arg.kind != Arg::Kind::kConstant || !arg.constant().isBoolList()) return false;
    const auto recorded = arg.constant().toBoolList();
    if (recorded.size() != N) return false;
    for (size_t k = 0; k < N; ++k) {
      if (recorded.get(k) != value[k]) return false;
    }
    return true;
  }
  bool match(const Arg& arg, const c10::IValue& value);

 private:
  bool match_lazy(const Arg& arg, const c10::TensorImpl& tensor) {
    if (C10_UNLIKELY(!is_lazy(&tensor))) return false;
    LazyStorage* storage = lazy_storage(&tensor);
    if (arg.first_use) {
      // Pending means: in another session, or in a segment not launched yet.
      if (storage->pending_in() != nullptr || segment_.find(storage) >= 0 ||
          C10_UNLIKELY(storage->error() != nullptr)) {
        return false;
      }
      segment_.add_input(storage);
    } else if (segment_.at(arg.slot) != storage) {
      return false;
    }
    return arg.geometry().matches(tensor);
  }
  bool match_float(const Arg& arg, double recorded, double value) {
    if (arg.dynamic) {
      segment_.scalars.push_back(value);
      return true;
    }
    if (C10_LIKELY(std::bit_cast<uint64_t>(recorded) == std::bit_cast<uint64_t>(value))) {
      return true;
    }
    differing = true;
    return floats_may_differ_;
  }
  bool match_number(const Arg& arg, const at::Tensor& tensor);
  bool match_constant(const Arg& arg, const c10::IValue& value);
  bool match_list(const Arg& arg, at::TensorList value) {
    if (arg.kind != Arg::Kind::kList || arg.list().size() != value.size()) return false;
    for (size_t k = 0; k < value.size(); ++k) {
      if (!match(arg.list()[k], value[k])) return false;
    }
    return true;
  }

  Segment& segment_;
  const bool floats_may_differ_;
};

}  // namespace reprise
