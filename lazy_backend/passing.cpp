#include "lazy_backend/passing.h"

#include <c10/core/TensorImpl.h>

namespace reprise {
namespace {

/// Of tensors that are nobody else's.
struct TensorDoor : c10::TensorImpl {
  static void set_keys(c10::TensorImpl& tensor, c10::DispatchKeySet keys) {
    tensor.*(&TensorDoor::key_set_) = keys;
  }
  static void set_dtype(c10::TensorImpl& tensor, caffe2::TypeMeta dtype) {
    tensor.*(&TensorDoor::data_type_) = dtype;
  }
  static c10::Storage& storage(c10::TensorImpl& tensor) { return tensor.*(&TensorDoor::storage_); }
};

thread_local bool thread_ends = false;

}  // namespace

SpareTensors::~SpareTensors() { thread_ends = true; }

SpareTensors* SpareTensors::of_this_thread() {
  if (C10_UNLIKELY(thread_ends)) return nullptr;
  thread_local SpareTensors tensors;
  return &tensors;
}

at::Tensor SpareTensors::lend(const at::Tensor& lazy, c10::Storage& lent) {
  const c10::Storage& backing = lazy_storage(lazy)->backing();
  const bool bits = !(lazy.key_set() & kViewBits).empty();
  if (C10_UNLIKELY(stock_.empty())) {
    const NormalTensors normal_tensors;
    at::Tensor tensor = unwrap(lazy);
    if (!bits) {
      keys_ = tensor.key_set();
      lent = c10::Storage(c10::Storage::use_byte_size_t(), 0,
                          c10::DataPtr(nullptr, backing.device()));
    }
    return tensor;
  }
  c10::TensorImpl& spare = *stock_.back().unsafeGetTensorImpl();
  if (C10_UNLIKELY(bits || spare.device() != backing.device())) return unwrap(lazy);
  at::Tensor tensor = std::move(stock_.back());
  stock_.pop_back();
  lent = backing;
  std::swap(TensorDoor::storage(spare), lent);
  TensorDoor::set_dtype(spare, lazy.dtype());
  const auto& like = *lazy.unsafeGetTensorImpl();
  if (spare.sizes() != like.sizes() || spare.strides() != like.strides() ||
      spare.storage_offset() != like.storage_offset()) {
    spare.set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  }
  return tensor;
}

void SpareTensors::take_back(at::Tensor&& tensor, c10::Storage& lent) {
  c10::TensorImpl& spare = *tensor.unsafeGetTensorImpl();
  if (C10_UNLIKELY(tensor.use_count() != 1 || tensor.weak_use_count() != 1 ||
                   stock_.size() == kMost || spare.key_set() != keys_ ||
                   spare.device() != lent.device() || spare.autograd_meta() != nullptr)) {
    return;
  }
  std::swap(TensorDoor::storage(spare), lent);
  stock_.push_back(std::move(tensor));
}

at::Tensor made_lazy(at::Tensor&& result, c10::DeviceIndex index) {
  c10::TensorImpl& tensor = *result.unsafeGetTensorImpl();
  const auto keys = tensor.key_set() - c10::autocast_dispatch_keyset - kViewBits;
  if (C10_UNLIKELY(result.use_count() != 1 || result.weak_use_count() != 1 || keys != backing_key_set(tensor.device()) ||
                   tensor.autograd_meta() != nullptr || tensor.is_wrapped_number() ||
                   !tensor.allow_tensor_metadata_change())) {
    return wrap_new(result, index);
  }
  auto storage = c10::make_intrusive<LazyStorage>(tensor.unsafe_storage().nbytes(), index);
  storage->set_backing(std::move(TensorDoor::storage(tensor)));
  tensor.set_storage_keep_dtype(c10::Storage(std::move(storage)));
  const auto bits = tensor.key_set() & kViewBits;
  const auto autograd = c10::getAutogradRelatedKeySetFromBackend(c10::BackendComponent::LazyBit);
  TensorDoor::set_keys(tensor, (tensor.is_inference() ? kLazyKeys : kLazyKeys | autograd) | bits);
  return std::move(result);
}

}  // namespace reprise
