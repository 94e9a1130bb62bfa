/// \file
/// A call that goes straight to the backing device at its own types, for a session that
/// records nothing: what the boxed way does with a stack of `IValue`s.
#pragma once

#include <ATen/core/ATen_fwd.h>
#include <ATen/core/IListRef.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "lazy_backend/below_user_modes.h"
#include "lazy_backend/device.h"
#include "lazy_backend/other_layouts.h"
#include "lazy_backend/storage.h"

namespace reprise {

/// Tensors of the backing device that the calls of a thread use for their arguments, in turns:
/// a new one for each takes longer than some ops.
class SpareTensors {
 public:
  ~SpareTensors();
  /// Null at the end of a thread, when destructors of others may still call ops.
  static SpareTensors* of_this_thread();

  /// What `unwrap` gives. Behind `lent` is what `take_back` needs.
  at::Tensor lend(const at::Tensor& lazy, c10::Storage& lent);
  /// A tensor that is somebody else's by now, or was changed, stays his.
  void take_back(at::Tensor&& tensor, c10::Storage& lent);

 private:
  static constexpr size_t kMost = 8;
  /// Without values, inference mode and bits.
  c10::SmallVector<at::Tensor, kMost> stock_;
  c10::DispatchKeySet keys_;  ///< of each
};

/// What `wrap_new` gives for a result of an op that returned one. Where nobody else holds
/// `result`, it is that tensor itself, made lazy.
at::Tensor made_lazy(at::Tensor&& result, c10::DeviceIndex index);

/// What the lazy tensors of one call stand for.
class Passing {
 public:
  Passing() = default;
  Passing(const Passing&) = delete;
  Passing& operator=(const Passing&) = delete;
  ~Passing() {
    for (Pair& pair : pairs_) {
      if (pair.lent) spare_->take_back(std::move(pair.backing), pair.lent);
    }
  }

  /// False where the call must go the boxed way: a value is pending or was never made, a
  /// tensor or a device is of another kind.
  bool possible() const { return possible_; }

  /// The one key that the backing device's op goes to; none where that takes a look at the
  /// arguments: one of them has a conjugate bit, or is a number of another device.
  c10::DispatchKeySet keys() const {
    return keys_ == c10::DispatchKeySet(keys_.highestPriorityTypeId()) ? keys_
                                                                       : c10::DispatchKeySet();
  }

  at::Tensor unwrapped(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!is_lazy(tensor)) {
      possible_ = possible_ && tensor.dim() == 0 && tensor.device().is_cpu();
      add_keys(tensor);
      return tensor;
    }
    const LazyStorage* storage = lazy_storage(tensor);
    const auto index = tensor.device().index();
    if (index_ < 0) index_ = index;
    possible_ = possible_ && index == index_ && storage->pending_in() == nullptr &&
                storage->error() == nullptr && storage->backing();
    if (!possible_) return tensor;
    // Ops compare the identity of arguments: one that comes again is the same again, and
    // two that are alike are two.
    for (const Pair& pair : pairs_) {
      if (pair.lazy == tensor.unsafeGetTensorImpl()) return pair.backing;
    }
    if (spare_ == nullptr) spare_ = SpareTensors::of_this_thread();
    Pair& pair = pairs_.emplace_back(Pair{tensor.unsafeGetTensorImpl(), {}, {}});
    pair.backing = C10_LIKELY(spare_ != nullptr) ? spare_->lend(tensor, pair.lent) : unwrap(tensor);
    add_keys(pair.backing);
    return pair.backing;
  }
  std::optional<at::Tensor> unwrapped(const std::optional<at::Tensor>& tensor) {
    return tensor.has_value() ? std::optional(unwrapped(*tensor)) : std::nullopt;
  }
  template <class List>
  std::vector<at::Tensor> unwrapped_list(const List& list) {
    std::vector<at::Tensor> all;
    all.reserve(list.size());
    for (const at::Tensor& tensor : list) all.push_back(unwrapped(tensor));
    return all;
  }
  c10::List<std::optional<at::Tensor>> unwrapped(const c10::List<std::optional<at::Tensor>>& list) {
    c10::List<std::optional<at::Tensor>> all;
    for (const std::optional<at::Tensor>& tensor : list) all.push_back(unwrapped(tensor));
    return all;
  }
  std::optional<at::Device> unwrapped(std::optional<at::Device> device) {
    if (!device.has_value()) return device;
    possible_ = possible_ && device->is_lazy() && (index_ < 0 || lazy_index(device->index()) == index_);
    return backing_device_of(device->index());
  }

  /// A result as a lazy tensor.
  at::Tensor wrapped(at::Tensor result, bool several = false) {
    if (!result.defined()) return result;
    if (C10_UNLIKELY(is_of_other_layout(result))) {
      return wrap_other_layout(result, lazy_index(index_));
    }
    for (const Pair& pair : pairs_) {
      if (pair.backing.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl() !=
          result.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl()) {
        continue;
      }
      return wrap(c10::intrusive_ptr<LazyStorage>::reclaim_copy(lazy_storage(pair.lazy)), result,
                  pair.lazy->key_set());
    }
    if (C10_LIKELY(!several)) return made_lazy(std::move(result), lazy_index(index_));
    at::Tensor lazy = wrap_new(result, lazy_index(index_));
    pairs_.push_back({lazy.unsafeGetTensorImpl(), std::move(result), {}});  // another may share its storage
    made_.push_back(lazy);
    return lazy;
  }
  std::vector<at::Tensor> wrapped(std::vector<at::Tensor> results) {
    for (at::Tensor& result : results) result = wrapped(std::move(result), true);
    return results;
  }
  template <class... Results>
  std::tuple<Results...> wrapped(std::tuple<Results...> results) {
    return std::apply(
        [this](auto&&... each) {
          return std::tuple<Results...>{this->wrapped(std::move(each), true)...};  // braces: in this order
        },
        std::move(results));
  }

 private:
  void add_keys(const at::Tensor& backing) {
    keys_ = keys_ | (backing.key_set() & c10::after_ADInplaceOrView_keyset);
  }

  struct Pair {
    c10::TensorImpl* lazy;  ///< of an argument, which the caller holds, or in `made_`
    at::Tensor backing;
    c10::Storage lent;
  };
  c10::SmallVector<Pair, 4> pairs_;
  c10::SmallVector<at::Tensor, 2> made_;
  SpareTensors* spare_ = nullptr;
  c10::DeviceIndex index_ = -1;
  c10::DispatchKeySet keys_;
  bool possible_ = true;
};

/// One argument as the backing device's op takes it.
template <class Arg>
class Passed {  // numbers, dtypes, generators
 public:
  Passed(Passing&, std::remove_reference_t<Arg>& arg) : arg_(arg) {}
  Arg get() { return static_cast<Arg>(arg_); }

 private:
  Arg& arg_;
};
template <class Value>
class PassedValue {
 public:
  explicit PassedValue(Value value) : value_(std::move(value)) {}
  Value& get() { return value_; }

 private:
  Value value_;
};
template <>
struct Passed<const at::Tensor&> : PassedValue<at::Tensor> {
  Passed(Passing& call, const at::Tensor& arg) : PassedValue(call.unwrapped(arg)) {}
};
template <>
struct Passed<at::Tensor&> : PassedValue<at::Tensor> {
  Passed(Passing& call, const at::Tensor& arg) : PassedValue(call.unwrapped(arg)) {}
};
template <>
struct Passed<const std::optional<at::Tensor>&> : PassedValue<std::optional<at::Tensor>> {
  Passed(Passing& call, const std::optional<at::Tensor>& arg)
      : PassedValue(call.unwrapped(arg)) {}
};
template <>
struct Passed<at::TensorList> : PassedValue<std::vector<at::Tensor>> {
  Passed(Passing& call, at::TensorList arg) : PassedValue(call.unwrapped_list(arg)) {}
};
template <>
struct Passed<const at::ITensorListRef&> {
  Passed(Passing& call, const at::ITensorListRef& arg)
      : tensors_(call.unwrapped_list(arg)), list_(at::TensorList(tensors_)) {}
  const at::ITensorListRef& get() { return list_; }

 private:
  std::vector<at::Tensor> tensors_;
  at::ITensorListRef list_;
};
template <>
struct Passed<const c10::List<std::optional<at::Tensor>>&>
    : PassedValue<c10::List<std::optional<at::Tensor>>> {
  Passed(Passing& call, const c10::List<std::optional<at::Tensor>>& arg)
      : PassedValue(call.unwrapped(arg)) {}
};
template <>
struct Passed<std::optional<at::Device>> : PassedValue<std::optional<at::Device>> {
  Passed(Passing& call, std::optional<at::Device> arg) : PassedValue(call.unwrapped(arg)) {}
};

}  // namespace reprise
