/// \file
/// The storage of lazy tensors: real sizes and strides lie in the tensors; only
/// the bytes may be still to come.
///
/// A lazy tensor is a plain `c10::TensorImpl` over a `LazyStorage`, so views,
/// `set_data`, `clone` and optimizers work as on any device. A storage either
/// has a *backing* storage on the backing device, or it is *pending*: a segment
/// in flight will make it. A storage that has a backing, but that a segment in
/// flight will write, is pending too.
#pragma once

#include <ATen/core/TensorBody.h>
#include <c10/core/StorageImpl.h>

#include <atomic>
#include <cstdint>
#include <exception>

namespace reprise {

class Session;

class LazyStorage final : public c10::StorageImpl {
 public:
  /// `nbytes` is the size that eager's storage has.
  LazyStorage(size_t nbytes, c10::DeviceIndex index);
  ~LazyStorage() override;

  void release_resources() override;

  // Storages come and go with every op: recycled, not returned to malloc.
  static void* operator new(size_t size);
  static void operator delete(void* memory);

  const c10::Storage& backing() const { return backing_; }
  void set_backing(c10::Storage backing);

  /// A tensor over `backing()`, kept so that a call that takes it finds it made. Often there
  /// is none.
  at::Tensor made() const {
    c10::TensorImpl* kept = made_.load(std::memory_order_acquire);
    if (kept == nullptr) return {};
    return at::Tensor(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(kept));
  }
  /// Keeps one, from any thread. Where another is kept already, that one stays.
  void keep_made(const at::Tensor& tensor) const;

  /// The session with a segment in flight that makes or writes this storage;
  /// null when `backing()` is all there is to know.
  Session* pending_in() const { return pending_in_.load(std::memory_order_acquire); }
  void set_pending_in(Session* session) {
    pending_in_.store(session, std::memory_order_release);
  }

  /// Where a session last bound this storage: the epoch of its segment, and the
  /// slot in it. Epochs are never used twice, so a stale binding is recognised.
  /// Relaxed atomics: several sessions may bind one storage (shared parameters),
  /// which `shared()` then says, and each must look into its own slots.
  uint64_t bound_epoch() const { return epoch_.load(std::memory_order_acquire); }
  uint32_t bound_slot() const { return slot_.load(std::memory_order_relaxed); }
  bool shared() const { return shared_.load(std::memory_order_acquire); }
  void bind(uint64_t epoch, uint32_t slot, uint32_t session_id) {
    if (C10_UNLIKELY(session_.load(std::memory_order_relaxed) != session_id)) {
      const uint32_t before = session_.exchange(session_id, std::memory_order_acq_rel);
      if (before != 0) shared_.store(true, std::memory_order_release);
    }
    slot_.store(slot, std::memory_order_relaxed);
    epoch_.store(epoch, std::memory_order_release);
  }
  /// Binds a storage that no other thread can know yet.
  void bind_new(uint64_t epoch, uint32_t slot, uint32_t session_id, Session* pending_in) {
    session_.store(session_id, std::memory_order_relaxed);
    slot_.store(slot, std::memory_order_relaxed);
    epoch_.store(epoch, std::memory_order_relaxed);
    pending_in_.store(pending_in, std::memory_order_relaxed);
  }
  void unbind() { epoch_.store(0, std::memory_order_release); }

  /// Names this storage for ever; addresses are used again, names are not.
  uint64_t uid() const { return uid_; }

  /// A tensor over it was seen that requires gradients and is a leaf: a parameter.
  bool is_parameter() const { return is_parameter_.load(std::memory_order_relaxed); }
  void set_is_parameter() { is_parameter_.store(true, std::memory_order_relaxed); }

  /// An op that should have made this storage's values threw: reading it throws
  /// the same again.
  void set_error(std::exception_ptr error) { error_ = std::move(error); }
  const std::exception_ptr& error() const { return error_; }

  /// The number of lazy storages that this thread made, less those it released.
  static int64_t live_on_this_thread();
  /// By any thread of this process, until now.
  static bool any_was_made();

 private:
  void drop_made();

  c10::Storage backing_;
  mutable std::atomic<c10::TensorImpl*> made_{nullptr};
  std::atomic<Session*> pending_in_{nullptr};
  std::atomic<uint64_t> epoch_{0};
  std::atomic<uint32_t> slot_{0};
  std::atomic<uint32_t> session_{0};
  std::atomic<bool> shared_{false};
  std::atomic<bool> is_parameter_{false};
  bool released_ = false;
  uint64_t uid_;
  std::exception_ptr error_;
};

inline bool is_lazy(const c10::TensorImpl* tensor) {
  return tensor->key_set().has(c10::DispatchKey::Lazy);  // see other_layouts.h for others
}
inline bool is_lazy(const at::Tensor& tensor) {
  return tensor.defined() && is_lazy(tensor.unsafeGetTensorImpl());
}

/// The storage of a lazy tensor (no check).
inline LazyStorage* lazy_storage(const c10::TensorImpl* tensor) {
  return static_cast<LazyStorage*>(tensor->unsafe_storage().unsafeGetStorageImpl());
}
inline LazyStorage* lazy_storage(const at::Tensor& tensor) {
  return lazy_storage(tensor.unsafeGetTensorImpl());
}

/// Of a tensor's dispatch keys, those that say how its bytes are to be read.
inline constexpr c10::DispatchKeySet kViewBits({c10::DispatchKey::Conjugate, c10::DispatchKey::Negative});

/// The tensor of the backing device over the same bytes, with the same geometry
/// and conjugate and negative bits. The storage must have a backing.
at::Tensor unwrap(const at::Tensor& lazy);

/// A tensor of the backing device with the same geometry as `lazy` and no data: good
/// for being asked, not for being read.
at::Tensor stand_in(const at::Tensor& lazy);

/// A storage of the `meta` device: a size, and no bytes.
c10::Storage meta_storage(size_t nbytes);

/// A tensor of the `meta` device over `storage`, like `lazy`.
at::Tensor meta_tensor(const c10::Storage& storage, const at::Tensor& lazy);

/// Sizes, strides, offset, and the conjugate and negative bits.
bool same_geometry(const at::Tensor& a, const at::Tensor& b);
void take_geometry(const at::Tensor& from, const at::Tensor& to);

/// A lazy tensor over `storage` with the geometry of `like`, a tensor of the
/// backing device.
at::Tensor wrap(c10::intrusive_ptr<LazyStorage> storage, const at::Tensor& like);

/// As above for a view of a tensor with these dispatch keys.
at::Tensor wrap(c10::intrusive_ptr<LazyStorage> storage, const at::Tensor& like,
                c10::DispatchKeySet keys);

/// As above over a new storage whose backing is that of `backing_tensor`, or,
/// where that is sparse or quantized, a lazy tensor that stands for it.
at::Tensor wrap_new(const at::Tensor& backing_tensor, c10::DeviceIndex index);

}  // namespace reprise
