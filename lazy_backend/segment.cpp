#include "lazy_backend/segment.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "lazy_backend/device.h"
#include "lazy_backend/interpreter.h"
#include "lazy_backend/symbolic_shape.h"

namespace reprise {

void Segment::release(const Binding& binding) {
  if (binding.strong) {
    c10::raw::intrusive_ptr::decref(binding.storage);
  } else {
    c10::raw::weak_intrusive_ptr::decref(binding.storage);
  }
}

std::vector<uint32_t> Segment::live_slots(uint32_t count) const {
  std::vector<uint32_t> live;
  for (uint32_t slot = 0; slot < count; ++slot) {
    if (is_created(slot) && is_alive(slot)) live.push_back(slot);
  }
  return live;
}

int64_t Segment::find_shared(const LazyStorage* storage) const {
  for (size_t k = bindings_.size(); k-- > 0;) {
    if (bindings_[k].storage == storage) return static_cast<int64_t>(k);
  }
  return -1;
}

void Segment::draw_random(const Step& step, uint32_t size, size_t scalars_before) {
  try {
    random.push_back(draw(step));
  } catch (...) {
    rollback(size);
    scalars.resize(scalars_before);
    throw;
  }
}

size_t Segment::random_bytes() const {
  size_t nbytes = 0;
  for (const at::Tensor& numbers : random) nbytes += numbers.storage().nbytes();
  return nbytes;
}

bool Segment::writes_inputs() const {
  return std::any_of(bindings_.begin(), bindings_.end(), [&](const Binding& binding) {
    return !binding.created && binding.storage->pending_in() == session_;
  });
}

at::Tensor Segment::make_new(const Result& result) {
  auto storage = c10::make_intrusive<LazyStorage>(result.nbytes, result.device_index);
  add_pending(storage.get());
  const Geometry& geometry = *result.geometry;
  auto impl = c10::make_intrusive<c10::TensorImpl>(
      c10::Storage(std::move(storage)), kLazyKeys,
      c10::scalarTypeToTypeMeta(geometry.dtype));
  impl->set_sizes_and_strides(geometry.sizes(), geometry.strides(), geometry.offset);
  if (C10_UNLIKELY(geometry.conjugate)) impl->_set_conj(true);
  if (C10_UNLIKELY(geometry.negative)) impl->_set_neg(true);
  at::Tensor tensor(std::move(impl));
  return C10_LIKELY(result.symbolic == nullptr) ? tensor : with_shape(tensor, result.symbolic);
}

at::Tensor Segment::make_alias(const Result& result, c10::DispatchKeySet keys) const {
  const Geometry& geometry = *result.geometry;
  c10::Storage storage(
      c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(at(result.slot)));
  if (keys.empty()) {
    keys = kLazyKeys;
    if (!c10::InferenceMode::is_enabled()) {
      keys = keys | c10::getAutogradRelatedKeySetFromBackend(c10::BackendComponent::LazyBit);
    }
  }
  keys = keys - kViewBits;
  if (C10_UNLIKELY(geometry.conjugate)) keys = keys.add(c10::DispatchKey::Conjugate);
  if (C10_UNLIKELY(geometry.negative)) keys = keys.add(c10::DispatchKey::Negative);
  auto impl = c10::make_intrusive<c10::TensorImpl>(
      c10::TensorImpl::VIEW, std::move(storage), keys,
      c10::scalarTypeToTypeMeta(geometry.dtype));
  impl->set_sizes_and_strides(geometry.sizes(), geometry.strides(), geometry.offset);
  at::Tensor tensor(std::move(impl));
  return C10_LIKELY(result.symbolic == nullptr) ? tensor : with_shape(tensor, result.symbolic);
}

void Segment::rollback(uint32_t size) {
  while (bindings_.size() > size) {
    const Binding last = bindings_.back();
    bindings_.pop_back();
    if (last.storage->bound_epoch() == epoch_) last.storage->unbind();
    release(last);
  }
}

void Segment::settle() {
  scalars.clear();
  random.clear();
  for (Binding& binding : bindings_) {
    if (binding.storage->pending_in() == session_) binding.storage->set_pending_in(nullptr);
    if (!binding.strong) continue;
    c10::raw::weak_intrusive_ptr::incref(binding.storage);
    c10::raw::intrusive_ptr::decref(binding.storage);
    binding.strong = false;
  }
}

void Segment::renumber(const std::vector<int64_t>& slots, const std::vector<bool>& created,
                       uint32_t first_kept, uint64_t epoch) {
  std::vector<Binding> before;
  before.swap(bindings_);
  bindings_.resize(created.size());
  epoch_ = epoch;
  for (size_t slot = 0; slot < before.size(); ++slot) {
    if (slots[slot] < 0) {
      release(before[slot]);
      continue;
    }
    const auto number = static_cast<uint32_t>(slots[slot]);
    Binding& binding = bindings_[number];
    binding = before[slot];
    binding.created = created[number];
    binding.written = false;
    binding.fresh = binding.fresh && slot >= first_kept;
    binding.storage->bind(epoch_, number, session_id_);
  }
}

void Segment::clear() {
  for (const Binding& binding : bindings_) {
    if (binding.storage->pending_in() == session_) binding.storage->set_pending_in(nullptr);
    release(binding);
  }
  bindings_.clear();
  scalars.clear();
  random.clear();
}

}  // namespace reprise
