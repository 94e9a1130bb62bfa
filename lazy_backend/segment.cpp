#include "lazy_backend/segment.h"

namespace reprise {

void Segment::release(const Binding& binding) {
  if (binding.strong) {
    c10::raw::intrusive_ptr::decref(binding.storage);
  } else {
    c10::raw::weak_intrusive_ptr::decref(binding.storage);
  }
}

int64_t Segment::find_shared(const LazyStorage* storage) const {
  for (size_t k = bindings_.size(); k-- > 0;) {
    if (bindings_[k].storage == storage) return static_cast<int64_t>(k);
  }
  return -1;
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
