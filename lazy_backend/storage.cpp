#include "lazy_backend/storage.h"

#include <c10/core/Allocator.h>
#include <c10/core/TensorImpl.h>

#include "lazy_backend/device.h"
#include "lazy_backend/other_layouts.h"

namespace reprise {
namespace {

thread_local int64_t live_storages = 0;

/// A thread's stock of freed storage objects.
struct Stock {
  static constexpr size_t kMost = 4096;
  void* head = nullptr;
  size_t size = 0;
  ~Stock() {
    while (head != nullptr) {
      void* next = *static_cast<void**>(head);
      ::operator delete(head);
      head = next;
    }
    size = kMost;  // what is freed later on this thread goes straight back
  }
};
thread_local Stock stock;

// `StorageImpl` can be told to refuse `data_ptr()`, but only with a message that
// it allocates for each storage (c10/core/StorageImpl.h, torch 2.11:
// `get_extra_meta`). Two allocations a tensor are a tenth of what verifying an op
// costs, so all lazy storages share one message. An explicit instantiation may
// name private members ([temp.spec]/6), which is the only door there is.
template <auto kExtraMeta, auto kThrowOnRead, auto kHasCheck>
struct StorageDoor {
  friend void refuse_data_ptr(c10::StorageImpl& storage, c10::StorageExtraMeta* message) {
    (storage.*kExtraMeta).reset(message);
    storage.*kThrowOnRead = true;
    storage.*kHasCheck = true;
  }
  friend void release_message(c10::StorageImpl& storage) {
    (void)(storage.*kExtraMeta).release();
  }
};
void refuse_data_ptr(c10::StorageImpl& storage, c10::StorageExtraMeta* message);
void release_message(c10::StorageImpl& storage);
template struct StorageDoor<&c10::StorageImpl::extra_meta_,
                            &c10::StorageImpl::throw_on_immutable_data_ptr_,
                            &c10::StorageImpl::has_mutable_data_ptr_check_>;

c10::StorageExtraMeta* shared_message() {
  static auto* message = new c10::StorageExtraMeta{
      "reprise: data_ptr() of a lazy tensor: its values live on the backing device, or are "
      "still to be computed; call .cpu() (or .to(device)) and read the result"};
  return message;
}

std::atomic<uint64_t> next_uid_block{1};

}  // namespace

bool LazyStorage::any_was_made() { return next_uid_block.load(std::memory_order_relaxed) > 1; }

LazyStorage::LazyStorage(size_t nbytes, c10::DeviceIndex index)
    : c10::StorageImpl(use_byte_size_t{}, c10::SymInt(static_cast<int64_t>(nbytes)),
                       c10::DataPtr(nullptr, c10::Device(c10::kLazy, index)),
                       /*allocator=*/nullptr, /*resizable=*/false) {
  constexpr uint64_t kBlock = 1 << 16;
  thread_local uint64_t next = 0, end = 0;
  if (C10_UNLIKELY(next == end)) {
    next = next_uid_block.fetch_add(kBlock, std::memory_order_relaxed);
    end = next + kBlock;
  }
  uid_ = next++;
  ++live_storages;
  refuse_data_ptr(*this, shared_message());
}

LazyStorage::~LazyStorage() {
  drop_made();
  if (!released_) --live_storages;
  release_message(*this);
}

void LazyStorage::release_resources() {
  // The strong count is zero; a segment may still hold us weakly. The bytes go
  // now, as eager's would.
  drop_made();
  backing_ = c10::Storage();
  error_ = nullptr;
  if (!released_) {
    released_ = true;
    --live_storages;
  }
}

void* LazyStorage::operator new(size_t size) {
  if (C10_LIKELY(stock.head != nullptr)) {
    void* memory = stock.head;
    stock.head = *static_cast<void**>(memory);
    --stock.size;
    return memory;
  }
  return ::operator new(size);
}

void LazyStorage::operator delete(void* memory) {
  if (C10_UNLIKELY(stock.size >= Stock::kMost)) {
    ::operator delete(memory);
    return;
  }
  *static_cast<void**>(memory) = stock.head;
  stock.head = memory;
  ++stock.size;
}

void LazyStorage::set_backing(c10::Storage backing) {
  if (backing) unsafe_set_nbytes(backing.nbytes());
  backing_ = std::move(backing);
  drop_made();
}

void LazyStorage::keep_made(const at::Tensor& tensor) const {
  c10::TensorImpl* none = nullptr;
  c10::TensorImpl* kept = tensor.unsafeGetTensorImpl();
  if (made_.load(std::memory_order_relaxed) != nullptr) return;
  c10::raw::intrusive_ptr::incref(kept);
  if (!made_.compare_exchange_strong(none, kept, std::memory_order_acq_rel)) {
    c10::raw::intrusive_ptr::decref(kept);
  }
}

void LazyStorage::drop_made() {
  if (made_.load(std::memory_order_relaxed) == nullptr) return;
  if (c10::TensorImpl* kept = made_.exchange(nullptr, std::memory_order_acq_rel)) {
    c10::raw::intrusive_ptr::decref(kept);
  }
}

int64_t LazyStorage::live_on_this_thread() { return live_storages; }

namespace {
/// A tensor over `storage` with a lazy one's geometry and bits.
at::Tensor like_over(const c10::Storage& storage, c10::DispatchKeySet keys, const at::Tensor& lazy) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(storage),
                                                   keys | (lazy.key_set() & kViewBits), lazy.dtype());
  impl->set_sizes_and_strides(lazy.sizes(), lazy.strides(), lazy.storage_offset());
  return at::Tensor(std::move(impl));
}
}  // namespace

at::Tensor unwrap(const at::Tensor& lazy) {
  LazyStorage* storage = lazy_storage(lazy);
  if (C10_UNLIKELY(storage->error() != nullptr)) std::rethrow_exception(storage->error());
  TORCH_INTERNAL_ASSERT(storage->backing(), "reprise: a pending storage was unwrapped");
  return like_over(storage->backing(), backing_key_set(storage->backing().device()), lazy);
}

at::Tensor wrap(c10::intrusive_ptr<LazyStorage> storage, const at::Tensor& like) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(
      c10::Storage(std::move(storage)), kLazyKeys, like.dtype());
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) impl->_set_conj(true);
  if (like.is_neg()) impl->_set_neg(true);
  return at::Tensor(std::move(impl));
}

at::Tensor wrap(c10::intrusive_ptr<LazyStorage> storage, const at::Tensor& like,
                c10::DispatchKeySet keys) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(std::move(storage)),
      (keys - kViewBits) | (like.key_set() & kViewBits), like.dtype());
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return at::Tensor(std::move(impl));
}

at::Tensor wrap_new(const at::Tensor& backing_tensor, c10::DeviceIndex index) {
  if (C10_UNLIKELY(is_of_other_layout(backing_tensor))) {
    return wrap_other_layout(backing_tensor, index);
  }
  auto storage =
      c10::make_intrusive<LazyStorage>(backing_tensor.storage().nbytes(), index);
  storage->set_backing(backing_tensor.storage());
  return wrap(std::move(storage), backing_tensor);
}

at::Tensor stand_in(const at::Tensor& lazy) {
  const c10::Device device = backing_device_of(lazy.device().index());
  c10::Storage nothing(c10::Storage::use_byte_size_t(), lazy.storage().nbytes(),
                       c10::DataPtr(nullptr, device));
  auto impl = c10::make_intrusive<c10::TensorImpl>(std::move(nothing), backing_key_set(device),
                                                   lazy.dtype());
  impl->set_sizes_and_strides(lazy.sizes(), lazy.strides(), lazy.storage_offset());
  at::Tensor tensor(std::move(impl));
  if (lazy.requires_grad()) tensor.set_requires_grad(true);
  return tensor;
}

c10::Storage meta_storage(size_t nbytes) {
  return c10::Storage(c10::Storage::use_byte_size_t(), static_cast<int64_t>(nbytes),
                      c10::DataPtr(nullptr, c10::kMeta), c10::GetAllocator(c10::kMeta),
                      /*resizable=*/true);
}

at::Tensor meta_tensor(const c10::Storage& storage, const at::Tensor& lazy) {
  return like_over(storage, c10::DispatchKeySet(c10::DispatchKey::Meta), lazy);
}

bool same_geometry(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && a.strides() == b.strides() &&
         a.storage_offset() == b.storage_offset() && a.is_conj() == b.is_conj() &&
         a.is_neg() == b.is_neg();
}

void take_geometry(const at::Tensor& from, const at::Tensor& to) {
  c10::TensorImpl* impl = to.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(from.sizes(), from.strides(), from.storage_offset());
  impl->_set_conj(from.is_conj());
  impl->_set_neg(from.is_neg());
}

}  // namespace reprise
