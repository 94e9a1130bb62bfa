/// \file
/// One segment in flight: which storage stands in which slot.
///
/// Slots of external storages hold them strongly, since the program runs after
/// the user may have dropped them. Slots of created storages hold them weakly,
/// so that at the end a slot is an output exactly when somebody still holds its
/// storage. A weakly held object keeps its address, so a pointer names a storage
/// without doubt as long as the segment lives.
#pragma once

#include <c10/util/SmallVector.h>

#include <cstdint>
#include <vector>

#include "lazy_backend/storage.h"
#include "lazy_backend/trace.h"

namespace reprise {

/// Dynamic scalars as 0-dim float64 tensors. On a GPU they lie in one buffer.
struct ScalarTensors {
  std::vector<at::Tensor> each;
  at::Tensor host, device;   ///< the buffer, and what it is filled from
  ScalarValues values;       ///< that are there
  c10::StreamId stream = 0;  ///< on which they were brought there
};

class Segment {
 public:
  Segment() = default;
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  ~Segment() { clear(); }

  void begin(uint64_t epoch, uint32_t session_id, Session* session, uint64_t environment) {
    epoch_ = epoch;
    environment_ = environment;
    session_id_ = session_id;
    session_ = session;
  }
  uint64_t epoch() const { return epoch_; }
  /// In which its ops were called (`environment_key`).
  uint64_t environment() const { return environment_; }
  uint32_t size() const { return static_cast<uint32_t>(bindings_.size()); }
  bool empty() const { return bindings_.empty(); }

  /// The slot in which `storage` stands, or -1.
  int64_t find(const LazyStorage* storage) const {
    const uint64_t epoch = storage->bound_epoch();
    if (epoch == epoch_) return storage->bound_slot();
    if (C10_LIKELY(!storage->shared())) return -1;
    return find_shared(storage);
  }

  LazyStorage* at(uint32_t slot) const { return bindings_[slot].storage; }
  bool is_created(uint32_t slot) const { return bindings_[slot].created; }
  /// Somebody but this segment holds the storage of a created slot.
  bool is_alive(uint32_t slot) const {
    return c10::raw::weak_intrusive_ptr::use_count(bindings_[slot].storage) > 0;
  }
  /// Those of the first `count` slots that are created and alive.
  std::vector<uint32_t> live_slots(uint32_t count) const;
  /// A strong reference to a created slot's storage, null where nobody holds it.
  c10::intrusive_ptr<LazyStorage> lock(uint32_t slot) const {
    return c10::intrusive_ptr<LazyStorage>::reclaim(static_cast<LazyStorage*>(
        c10::raw::weak_intrusive_ptr::lock(bindings_[slot].storage)));
  }
  /// No step made the storage, and none used it before this segment: a batch
  /// from the host, say.
  bool is_fresh(uint32_t slot) const { return bindings_[slot].fresh; }
  /// A step has written the storage in this slot.
  bool is_written(uint32_t slot) const { return bindings_[slot].written; }
  void set_written(uint32_t slot, bool written = true) { bindings_[slot].written = written; }

  /// Adds the next slot, for a storage that was there before.
  uint32_t add_input(LazyStorage* storage) {
    c10::raw::intrusive_ptr::incref(storage);
    return add({storage, /*strong=*/true, /*created=*/false});
  }
  /// Adds the next slot, for a storage made by the current step.
  uint32_t add_created(LazyStorage* storage) {
    c10::raw::weak_intrusive_ptr::incref(storage);
    return add({storage, /*strong=*/false, /*created=*/true});
  }
  /// As above for a storage that no other thread knows yet; it becomes pending.
  void add_pending(LazyStorage* storage) {
    c10::raw::weak_intrusive_ptr::incref(storage);
    storage->bind_new(epoch_, size(), session_id_, session_);
    bindings_.push_back({storage, /*strong=*/false, /*created=*/true});
  }

  /// A new tensor over a pending storage, in the next slot.
  at::Tensor make_new(const Result& result);
  /// A tensor over the storage in the result's slot, for a view of a tensor with these
  /// dispatch keys; none where it is no view of one.
  at::Tensor make_alias(const Result& result, c10::DispatchKeySet keys) const;

  /// Forgets the slots from `size` on: a step that was not taken in the end.
  void rollback(uint32_t size);
  /// Makes the numbers of a random step, which has matched and will be taken. Where they
  /// cannot be made, it is as if it had not matched: back to so many slots and scalars.
  void draw_random(const Step& step, uint32_t size, size_t scalars_before);

  /// What `random` takes.
  size_t random_bytes() const;
  /// A storage that was there before it is pending here.
  bool writes_inputs() const;

  /// The steps so far have been run: nothing is pending any more, and inputs are
  /// kept no longer than eager would keep them.
  void settle();

  /// Numbers the slots anew: slot `s` becomes `slots[s]`, or is forgotten where
  /// that is -1. `created` tells which of the new ones the segment creates;
  /// slots before `first_kept` were met before the segment's new start.
  void renumber(const std::vector<int64_t>& slots, const std::vector<bool>& created,
                uint32_t first_kept, uint64_t epoch);

  void swap(Segment& other) {
    bindings_.swap(other.bindings_);
    scalars.swap(other.scalars);
    random.swap(other.random);
    std::swap(scalar_tensors, other.scalar_tensors);
    std::swap(epoch_, other.epoch_);
    std::swap(environment_, other.environment_);
    std::swap(session_id_, other.session_id_);
    std::swap(session_, other.session_);
  }

  /// Lets go of everything. Storages that are still marked as pending here are
  /// marked so no longer.
  void clear();

  ScalarValues scalars;
  /// What the random steps made, in their order. Numbers are drawn when an op is
  /// called, not when the segment runs, so that they are eager's also where the
  /// host draws from the same generator in between.
  std::vector<at::Tensor> random;
  /// By which programs are given the scalars; kept from launch to launch.
  ScalarTensors scalar_tensors;

 private:
  struct Binding {
    LazyStorage* storage = nullptr;
    bool strong = false;
    bool created = false;
    bool written = false;
    bool fresh = false;
  };
  uint32_t add(Binding binding) {
    const uint32_t slot = size();
    binding.fresh = !binding.created && binding.storage->bound_epoch() == 0;
    binding.storage->bind(epoch_, slot, session_id_);
    bindings_.push_back(binding);
    return slot;
  }
  static void release(const Binding& binding);
  int64_t find_shared(const LazyStorage* storage) const;

  std::vector<Binding> bindings_;
  uint64_t epoch_ = 0;
  uint64_t environment_ = 0;
  uint32_t session_id_ = 0;
  Session* session_ = nullptr;
};

}  // namespace reprise
