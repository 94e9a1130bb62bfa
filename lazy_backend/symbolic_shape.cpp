#include "lazy_backend/symbolic_shape.h"

#include <atomic>
#include <utility>

#include "lazy_backend/storage.h"
#include "symint/symbolic_number.h"

namespace reprise {
namespace {

std::atomic<bool> any_made{false};

}  // namespace

bool any_symbolic() { return any_made.load(std::memory_order_relaxed); }

SymbolicShape::SymbolicShape(std::vector<Expression> expressions, const Geometry& now,
                             uint32_t fixed)
    : expressions_(std::move(expressions)),
      numel_(1),
      now_(now),
      rank_(now.rank),
      fixed_(fixed) {
  TORCH_INTERNAL_ASSERT(expressions_.size() == 2 * rank_ + 1);
  numbers_.reserve(expressions_.size());
  for (size_t k = 0; k < expressions_.size(); ++k) {
    const int64_t value = k < 2 * rank_ ? now.dims[k] : now.offset;
    numbers_.push_back(SymbolicNumber::make(expressions_[k], value));
    symbolic_ = symbolic_ || numbers_.back().is_heap_allocated();
    if (k < rank_) numel_ = numel_ * numbers_.back();
  }
  any_made.store(true, std::memory_order_relaxed);
}

SymbolicTensor::SymbolicTensor(c10::Storage storage, c10::DispatchKeySet keys,
                               caffe2::TypeMeta dtype, SymbolicShapePtr shape)
    : c10::TensorImpl(VIEW, std::move(storage), keys, dtype), shape_(std::move(shape)) {
  set_custom_sizes_strides(SizesStridesPolicy::CustomSizes);
}

c10::SymIntArrayRef SymbolicTensor::sym_sizes_custom() const {
  return known() ? shape_->sizes() : sym_sizes_default();
}
c10::SymIntArrayRef SymbolicTensor::sym_strides_custom() const {
  return known() ? shape_->strides() : sym_strides_default();
}
c10::SymInt SymbolicTensor::sym_numel_custom() const {
  return known() ? shape_->numel() : sym_numel_default();
}
c10::SymInt SymbolicTensor::sym_storage_offset_custom() const {
  return known() ? shape_->offset() : c10::SymInt(storage_offset_default());
}

template <class Version>
c10::intrusive_ptr<c10::TensorImpl> SymbolicTensor::copy(Version&& version,
                                                         bool allow_metadata_change) const {
  auto impl = c10::make_intrusive<SymbolicTensor>(c10::Storage(storage()), key_set(), dtype(), shape_);
  copy_tensor_metadata(this, impl.get(), std::forward<Version>(version), allow_metadata_change);
  return impl;
}

c10::intrusive_ptr<c10::TensorImpl> SymbolicTensor::shallow_copy_and_detach(
    const c10::VariableVersion& version, bool allow_metadata_change) const {
  return copy(version, allow_metadata_change);
}
c10::intrusive_ptr<c10::TensorImpl> SymbolicTensor::shallow_copy_and_detach(
    c10::VariableVersion&& version, bool allow_metadata_change) const {
  return copy(std::move(version), allow_metadata_change);
}

SymbolicShapePtr symbolic_shape(const at::Tensor& tensor) {
  if (!any_symbolic() || !tensor.defined()) return nullptr;
  const auto* symbolic = dynamic_cast<const SymbolicTensor*>(tensor.unsafeGetTensorImpl());
  return symbolic == nullptr ? nullptr : symbolic->shape();
}

at::Tensor with_shape(const at::Tensor& tensor, SymbolicShapePtr shape) {
  c10::TensorImpl* from = tensor.unsafeGetTensorImpl();
  auto impl = c10::make_intrusive<SymbolicTensor>(c10::Storage(tensor.storage()), from->key_set(),
                                                  tensor.dtype(), std::move(shape));
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (!from->is_inference()) impl->set_version_counter(from->version_counter());
  return at::Tensor(std::move(impl));
}

}  // namespace reprise
