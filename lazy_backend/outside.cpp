/// \file
/// Calls that are no steps of a trace: reads and writes of the host, changes of
/// metadata, ops whose results depend on data, and what libtorch may not record.
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>

#include <functional>

#include "lazy_backend/below_user_modes.h"
#include "lazy_backend/device.h"
#include "lazy_backend/other_layouts.h"
#include "lazy_backend/session.h"
#include "lazy_backend/step_recorder.h"

namespace reprise {
namespace {

/// Gives up a session's lock while code runs that may be the user's.
class Unlocked {
 public:
  explicit Unlocked(SessionLock& lock) : lock_(lock) { lock_.unlock(); }
  ~Unlocked() { lock_.lock(); }

 private:
  SessionLock& lock_;
};

using Pair = Unwrapper::Pair;

/// The same tensor, which says that its gradient is wanted.
at::Tensor wanting_gradient(const at::Tensor& tensor) {
  at::Tensor copy(tensor.unsafeGetTensorImpl()->shallow_copy_and_detach(
      c10::VariableVersion(0), /*allow_tensor_metadata_change=*/true));
  if (c10::isFloatingType(copy.scalar_type()) || copy.is_complex()) copy.set_requires_grad(true);
  return copy;
}

/// Lazy tensors in place of those of the backing device.
c10::IValue wrap_value(const c10::IValue& value, const std::vector<Pair>& arguments,
                       std::vector<Pair>& results, c10::DeviceIndex index, bool to_lazy) {
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const c10::IValue& item : value.toListRef()) {
      list.push_back(wrap_value(item, arguments, results, index, to_lazy).toTensor());
    }
    return list;
  }
  if (value.isList() && holds_lists(value)) {
    c10::impl::GenericList list(value.toList().elementType());
    for (const c10::IValue& item : value.toListRef()) {
      list.push_back(wrap_value(item, arguments, results, index, to_lazy));
    }
    return list;
  }
  if (!value.isTensor() || !value.toTensor().defined()) return value;
  const at::Tensor& tensor = value.toTensor();
  if (is_lazy(tensor) || is_lazy_of_other_layout(tensor)) return value;
  if (is_of_other_layout(tensor)) {
    const bool wrapped = to_lazy && tensor.device() == backing_device_of(index);
    return wrapped ? wrap_other_layout(tensor, index) : tensor;
  }
  for (const auto* known : {&arguments, static_cast<const std::vector<Pair>*>(&results)}) {
    for (const Pair& pair : *known) {
      if (pair.backing.is_same(tensor)) return pair.lazy;
    }
    for (const Pair& pair : *known) {
      if (pair.backing.has_storage() && tensor.has_storage() &&
          pair.backing.storage().unsafeGetStorageImpl() ==
              tensor.storage().unsafeGetStorageImpl()) {
        return wrap(c10::intrusive_ptr<LazyStorage>::reclaim_copy(lazy_storage(pair.lazy)),
                    tensor, pair.lazy.key_set());
      }
    }
  }
  if (!to_lazy || tensor.device() != backing_device_of(index)) return value;
  if (auto storage = find_shared_storage(tensor.storage())) {
    return wrap(std::move(storage), tensor);
  }
  at::Tensor lazy = wrap_new(tensor, index);
  results.push_back({lazy, tensor});
  return lazy;
}

}  // namespace

void Session::call_outside(const c10::OperatorHandle& op, const OpPolicy& how,
                           torch::jit::Stack* stack) {
  switch (how.kind) {
    case OpPolicy::Kind::kCopy: {
      const auto arguments = call_arguments(op, *stack);
      const at::Tensor to = arguments[0].toTensor(), from = arguments[1].toTensor();
      if (is_lazy(to) && !is_lazy(from)) {
        host_write(to, from, arguments[2].toBool());
        torch::jit::drop(*stack, arguments.size());
        stack->emplace_back(to);
        return;
      }
      break;  // a read, or a copy between two lazy devices
    }
    case OpPolicy::Kind::kMetadata:
      return metadata(op, stack);
    case OpPolicy::Kind::kResize:
      return resize(op, stack);
    case OpPolicy::Kind::kSetStorage:
      return set_storage(op, stack);
    case OpPolicy::Kind::kAllocate:
      return allocate(op, how, stack);
    default:
      break;
  }
  leave(op, how, stack);
}

void Session::call_at_once(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  settle_others(call_arguments(op, *stack));
  const std::lock_guard<SessionLock> guard(lock_);
  // What is written lazily may lie in the memory that such a tensor is made of.
  end_segment("a sparse or quantized tensor is used");
  const size_t count = op.schema().arguments().size();
  const std::vector<c10::IValue> arguments(stack->end() - static_cast<std::ptrdiff_t>(count),
                                           stack->end());
  leave(op, policy(op), stack, /*at_once=*/true);
  visit_tensors(arguments, note_shared_storage);
  visit_tensors(torch::jit::last(*stack, op.schema().returns().size()), note_shared_storage);
}

void Session::leave(const c10::OperatorHandle& op, const OpPolicy& how,
                    torch::jit::Stack* stack, bool at_once) {
  const auto arguments = call_arguments(op, *stack);
  const size_t count = arguments.size();
  c10::DeviceIndex index = lazy_index(-1);
  bool to_lazy = false, explicit_device = false;
  if (how.device_argument >= 0) {
    const c10::IValue& device = arguments[static_cast<size_t>(how.device_argument)];
    if (device.isDevice()) {
      explicit_device = true;
      to_lazy = device.toDevice().is_lazy();
      if (to_lazy && device.toDevice().has_index()) index = device.toDevice().index();
    }
  }
  for (size_t k = 0; k < count; ++k) {
    const bool writes =
        std::find(how.writes.begin(), how.writes.end(), static_cast<uint8_t>(k)) !=
        how.writes.end();
    visit_tensors(arguments.slice(k, 1), [&](const at::Tensor& tensor) {
      if (is_lazy_of_other_layout(tensor) && !explicit_device) {
        to_lazy = true;
        index = tensor.device().index();
      }
      if (!is_lazy(tensor)) return;
      detach_from_segment(lazy_storage(tensor), writes,
                          writes ? "an op outside the trace writes a tensor"
                                 : "a value was read");
      if (!explicit_device) {
        to_lazy = true;
        index = tensor.device().index();
      }
    });
  }
  Unwrapper unwrap_argument;
  std::vector<Pair> made;
  torch::jit::Stack backing;
  for (size_t k = 0; k < count; ++k) {
    const c10::IValue& value = arguments[k];
    backing.push_back(unwrap_argument(value));
    // Kernels of sparse ops save what a gradient needs where they see that one is wanted.
    const bool wants_gradient =
        value.isTensor() && value.toTensor().defined() && value.toTensor().requires_grad() &&
        at_once && std::find(how.writes.begin(), how.writes.end(), k) == how.writes.end();
    if (wants_gradient) backing.back() = wanting_gradient(backing.back().toTensor());
  }
  {
    const Unlocked unlocked(lock_);
    const BelowUserModes below;
    op.callBoxed(&backing);
  }
  for (const Pair& pair : unwrap_argument.pairs()) {
    if (same_geometry(pair.backing, pair.lazy)) continue;
    lazy_storage(pair.lazy)->set_backing(pair.backing.storage());
    take_geometry(pair.backing, pair.lazy);
  }
  visit_tensors(arguments, [](const at::Tensor& tensor) {
    if (is_lazy_of_other_layout(tensor)) refresh_other_layout(tensor);
  });
  const auto& returns = how.returns_argument;
  c10::SmallVector<c10::IValue, 4> results;
  for (size_t k = 0; k < backing.size(); ++k) {
    const int again = k < returns.size() ? returns[k] : -1;
    if (again >= 0 && backing[k].isTensor()) {
      results.push_back((*stack)[stack->size() - count + static_cast<size_t>(again)]);
    } else {
      results.push_back(wrap_value(backing[k], unwrap_argument.pairs(), made, index, to_lazy));
    }
  }
  torch::jit::drop(*stack, count);
  for (c10::IValue& result : results) stack->push_back(std::move(result));
}

void Session::host_write(const at::Tensor& destination, const at::Tensor& source,
                         bool non_blocking) {
  LazyStorage* storage = lazy_storage(destination);
  detach_from_segment(storage, /*to_write=*/true, "the host writes a tensor of the step");
  const BelowUserModes below;
  unwrap(destination).copy_(source, non_blocking);
}

void Session::allocate(const c10::OperatorHandle& op, const OpPolicy& how,
                       torch::jit::Stack* stack) {
  const size_t base = stack->size() - op.schema().arguments().size();
  c10::IValue& device = (*stack)[base + static_cast<size_t>(how.device_argument)];
  const c10::DeviceIndex index = lazy_index(device.isDevice() ? device.toDevice().index() : -1);
  device = backing_device_of(index);
  const BelowUserModes below;
  op.callBoxed(stack);
  stack->back() = wrap_new(stack->back().toTensor(), index);
}

void Session::metadata(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  // Only how the tensor lies over its storage changes: asked of a tensor that has no data,
  // so that a pending one stays pending. Not of one on the meta device, whose kernels are
  // Python's once a Python has imported torch.
  const size_t count = op.schema().arguments().size();
  const at::Tensor self = (*stack)[stack->size() - count].toTensor();
  const BelowUserModes below;
  const at::Tensor bare = stand_in(self);
  (*stack)[stack->size() - count] = bare;
  op.callBoxed(stack);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(bare.sizes(), bare.strides(),
                                                    bare.storage_offset());
  if (!stack->empty()) stack->back() = self;
}

void Session::resize(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const at::Tensor self = (*stack)[stack->size() - count].toTensor();
  LazyStorage* storage = lazy_storage(self);
  detach_from_segment(storage, /*to_write=*/true, "a tensor of the step was resized");
  const BelowUserModes below;
  const at::Tensor backing = unwrap(self);
  for (size_t k = stack->size() - count; k < stack->size(); ++k) {
    c10::IValue& value = (*stack)[k];
    if (value.isTensor() && is_lazy(value.toTensor())) {
      // Of another tensor only the sizes count; it may be pending.
      value = value.toTensor().is_same(self) ? backing : stand_in(value.toTensor());
    } else if (value.isDevice() && value.toDevice().is_lazy()) {
      value = backing.device();
    }
  }
  op.callBoxed(stack);
  storage->set_backing(backing.storage());
  take_geometry(backing, self);
  if (!stack->empty()) stack->back() = self;
}

namespace {

/// Throws where a tensor would lie outside of its storage. Eager's `set_` lets the storage grow.
void check_fits(const c10::OperatorHandle& op, const c10::Storage& storage, size_t itemsize,
                int64_t offset, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  TORCH_CHECK(offset >= 0 && std::all_of(sizes.begin(), sizes.end(), [](int64_t n) { return n >= 0; }) &&
                  std::all_of(strides.begin(), strides.end(), [](int64_t n) { return n >= 0; }) &&
                  (strides.empty() || strides.size() == sizes.size()),
              "reprise: ", op.operator_name(), " with sizes ", sizes, ", strides ", strides,
              " and storage offset ", offset, ": there is no such tensor");
  const auto extra = static_cast<size_t>(offset);
  const size_t nbytes = strides.empty()
                            ? at::detail::computeStorageNbytesContiguous(sizes, itemsize, extra)
                            : at::detail::computeStorageNbytes(sizes, strides, itemsize, extra);
  TORCH_CHECK(nbytes <= storage.nbytes(), "reprise: ", op.operator_name(), " needs a storage of ", nbytes,
              " bytes and got one of ", storage.nbytes(), ", which does not grow by it; resize_ it before");
}

}  // namespace

void Session::set_storage(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  // Only which storage the tensor lies over changes; the storage may be pending.
  const auto arguments = call_arguments(op, *stack);
  const size_t count = arguments.size();
  const at::Tensor self = arguments[0].toTensor();
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  const auto check_lazy = [&](c10::Device device) {
    TORCH_CHECK(device == self.device(), "reprise: ", op.operator_name(), " of a tensor on ",
                self.device(), " got a storage on ", device,
                "; move the tensor first with .to(torch::kLazy)");
  };
  if (count == 1) {
    const at::Tensor empty = at::empty({0}, self.options());
    impl->set_storage_keep_dtype(empty.storage());
    impl->set_sizes_contiguous({0});
  } else {
    at::Tensor source;
    c10::Storage storage;
    if (arguments[1].isTensor()) {
      source = arguments[1].toTensor();
      check_lazy(source.device());
      storage = source.storage();
    } else {
      storage = arguments[1].toStorage();
      check_lazy(storage.device());
    }
    if (count >= 4) {
      const int64_t offset = arguments[2].toInt();
      const auto sizes = arguments[3].toIntVector();
      std::vector<int64_t> strides;
      if (count >= 5 && arguments[4].isIntList()) strides = arguments[4].toIntVector();
      check_fits(op, storage, self.itemsize(), offset, sizes, strides);
      impl->set_storage_keep_dtype(storage);
      if (strides.empty() && !sizes.empty()) {
        impl->set_storage_offset(offset);
        impl->set_sizes_contiguous(sizes);
      } else {
        impl->set_sizes_and_strides(sizes, strides, offset);
      }
    } else if (source.defined()) {
      impl->set_storage_keep_dtype(storage);
      impl->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
    } else {
      impl->set_storage_keep_dtype(storage);
      const auto elements =
          static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
      impl->set_storage_offset(0);
      impl->set_sizes_contiguous({elements});
    }
  }
  torch::jit::drop(*stack, count);
  stack->emplace_back(self);
}

}  // namespace reprise
