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
#include "lazy_backend/trace_tree.h"
#include "symint/symbolic_number.h"

namespace reprise {

/// What a call's sizes and integers come to: the same for the call and for what was
/// recorded of one that it matches. By it the child is found among many that differ in
/// them alone.
class CallHash {
 public:
  CallHash() = default;
  /// Of a list of `IValue`s or of `Arg`s.
  template <class Args>
  static CallHash of(const Args& args) {
    CallHash hash;
    for (const auto& arg : args) hash.add(arg);
    return hash;
  }
  uint64_t value() const { return value_; }

  void add(const at::Tensor& tensor) {
    if (!tensor.defined() || !is_lazy(tensor)) return;
    const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    add(impl->sizes());
    add(impl->storage_offset());
  }
  void add(int64_t number) { value_ = (value_ ^ static_cast<uint64_t>(number)) * 0x9e3779b97f4a7c15u; }
  void add(const c10::SymInt& number) { add(SymbolicNumber::value_of(number)); }
  void add(const at::Scalar& number) {
    if (number.isIntegral(/*includeBool=*/false)) add(number.to<int64_t>());
  }
  void add(at::ScalarType type) { add(int64_t(type)); }
  void add(at::Layout layout) { add(int64_t(layout)); }
  void add(at::MemoryFormat format) { add(int64_t(format)); }
  void add(c10::IntArrayRef numbers) {
    for (const int64_t number : numbers) add(number);
  }
  void add(c10::SymIntArrayRef numbers) {
    for (const c10::SymInt& number : numbers) add(number);
  }
  void add(at::TensorList tensors) {
    for (const at::Tensor& tensor : tensors) add(tensor);
  }
  void add(const at::ITensorListRef& tensors) {
    for (const at::Tensor& tensor : tensors) add(tensor);
  }
  void add(const at::OptionalIntArrayRef& numbers) {
    if (numbers.has_value()) add(*numbers);
  }
  void add(const at::OptionalSymIntArrayRef& numbers) {
    if (numbers.has_value()) add(*numbers);
  }
  template <class T>
  void add(const std::optional<T>& value) {
    if (value.has_value()) add(*value);
  }
  void add(const c10::List<std::optional<at::Tensor>>& tensors) {
    for (size_t k = 0; k < tensors.size(); ++k) add(tensors.get(k));
  }
  void add(const c10::IValue& value);
  void add(const Arg& arg);

  // These tell nothing.
  void add(bool) {}
  void add(double) {}
  void add(std::string_view) {}
  void add(at::Device) {}
  void add(const at::Generator&) {}
  template <size_t N>
  void add(const std::array<bool, N>&) {}

 private:
  uint64_t value_ = 0;
};

/// The children that a call can match, in order: those of its hash where the node keeps
/// them apart, all others.
class Candidates {
 public:
  /// `hash` makes the call's `CallHash`, where that is needed.
  template <class Hash>
  Candidates(const Node* node, const Hash& hash)
      : indexed_(node->index != nullptr),
        child_(C10_LIKELY(!indexed_) ? node->child : node->index->find(hash().value())) {}

  Node* get() const { return child_; }
  void next() { child_ = C10_LIKELY(!indexed_) ? child_->sibling : child_->same_hash; }

 private:
  bool indexed_;
  Node* child_;
};

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
    return match(arg, SymbolicNumber::value_of(value));
  }
  bool match(const Arg& arg, const at::Scalar& value) {
    if (value.isFloatingPoint()) return match(arg, value.to<double>());
    if (arg.cast != c10::ScalarType::Undefined && value.isIntegral(/*includeBool=*/true)) {
      const auto number = value.to<int64_t>();
      return can_hold(arg.cast, number) && match(arg, static_cast<double>(number));
    }
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
      if (SymbolicNumber::value_of(value[k]) != ints[k]) return false;
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
    const bool same = std::bit_cast<uint64_t>(recorded) == std::bit_cast<uint64_t>(value);
    // Eager throws, which is not for a program to do.
    if (C10_UNLIKELY(arg.cast != c10::ScalarType::Undefined) && !same && !can_hold(arg.cast, value)) {
      return false;
    }
    if (arg.dynamic) {
      segment_.scalars.push_back(value);
      return true;
    }
    if (C10_LIKELY(same)) return true;
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
