#include "lazy_backend/other_layouts.h"

#include <c10/core/TensorImpl.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "lazy_backend/capture.h"
#include "lazy_backend/device.h"
#include "lazy_backend/session.h"
#include "lazy_backend/storage.h"

namespace reprise {
namespace {

using c10::DispatchKey;

DispatchKey key_for(const at::Tensor& tensor) {
  if (tensor.is_quantized()) return DispatchKey::QuantizedLazy;
  return tensor.layout() == c10::kSparse ? DispatchKey::SparseLazy : DispatchKey::SparseCsrLazy;
}

bool is_compressed(c10::Layout layout) {
  return layout == c10::kSparseCsr || layout == c10::kSparseCsc || layout == c10::kSparseBsr ||
         layout == c10::kSparseBsc;
}

/// Without a storage: what it stands for has, or is made of, storages of its own.
class StandingFor final : public c10::TensorImpl {
 public:
  StandingFor(DispatchKey key, at::Tensor backing, c10::DeviceIndex index)
      : c10::TensorImpl(c10::DispatchKeySet(key), backing.dtype(),
                        c10::Device(c10::kLazy, index)),
        backing_(std::move(backing)) {
    set_storage_access_should_throw();
    if (backing_.layout() != c10::kStrided) {
      set_custom_sizes_strides(SizesStridesPolicy::CustomStrides);
    }
    refresh();
  }

  const at::Tensor& backing() const { return backing_; }

  void refresh() {
    if (backing_.layout() == c10::kStrided) {
      set_sizes_and_strides(backing_.sizes(), backing_.strides());
    } else {
      sizes_and_strides_.set_sizes(backing_.sizes());
      refresh_numel();
      is_non_overlapping_and_dense_ = false;
    }
  }

  c10::intrusive_ptr<TensorImpl> shallow_copy_and_detach(
      const c10::VariableVersion& version, bool allow_metadata_change) const override {
    return copy(version, allow_metadata_change);
  }
  c10::intrusive_ptr<TensorImpl> shallow_copy_and_detach(
      c10::VariableVersion&& version, bool allow_metadata_change) const override {
    return copy(version, allow_metadata_change);
  }
  void shallow_copy_from(const c10::intrusive_ptr<TensorImpl>& other) override {
    copy_tensor_metadata(other.get(), this, version_counter(), allow_tensor_metadata_change());
    backing_ = static_cast<const StandingFor*>(other.get())->backing_;
    refresh();
  }
  void release_resources() override {
    TensorImpl::release_resources();
    backing_ = at::Tensor();
  }

 private:
  c10::Layout layout_impl() const override { return backing_.layout(); }
  // Errors for the most part: eager's own.
  c10::IntArrayRef strides_custom() const override { return backing_.strides(); }
  c10::SymIntArrayRef sym_strides_custom() const override { return backing_.sym_strides(); }
  c10::SymBool sym_is_contiguous_custom(at::MemoryFormat format) const override {
    return backing_.unsafeGetTensorImpl()->sym_is_contiguous(format);
  }
  const char* tensorimpl_type_name() const override { return "reprise::StandingFor"; }

  c10::intrusive_ptr<TensorImpl> copy(const c10::VariableVersion& version,
                                      bool allow_metadata_change) const {
    auto impl = c10::make_intrusive<StandingFor>(key_for(backing_), backing_, device().index());
    copy_tensor_metadata(this, impl.get(), version, allow_metadata_change);
    return impl;
  }

  at::Tensor backing_;
};

/// Storages of the backing device that tensors of other layouts may share with lazy ones,
/// so that who asks for `values()` twice gets one storage. Any thread's.
class SharedStorages {
 public:
  c10::intrusive_ptr<LazyStorage> find(const c10::Storage& backing) {
    if (C10_LIKELY(!any_.load(std::memory_order_acquire))) return {};
    const std::lock_guard guard(mutex_);
    const auto found = storages_.find(backing.unsafeGetStorageImpl());
    if (found == storages_.end()) return {};
    auto lazy = found->second.lock();
    // Addresses are used again.
    const bool same = lazy && lazy->backing() &&
                      lazy->backing().unsafeGetStorageImpl() == backing.unsafeGetStorageImpl();
    return same ? lazy : c10::intrusive_ptr<LazyStorage>();
  }
  void add(LazyStorage* storage) {
    if (!storage->backing()) return;
    any_.store(true, std::memory_order_release);
    const std::lock_guard guard(mutex_);
    if (storages_.size() >= most_) {
      std::erase_if(storages_, [](const auto& entry) { return entry.second.expired(); });
      most_ = 2 * storages_.size() + kFew;
    }
    storages_.insert_or_assign(
        storage->backing().unsafeGetStorageImpl(),
        c10::weak_intrusive_ptr<LazyStorage>(
            c10::intrusive_ptr<LazyStorage>::reclaim_copy(storage)));
  }

 private:
  static constexpr size_t kFew = 64;
  std::atomic<bool> any_{false};
  std::mutex mutex_;
  std::unordered_map<c10::StorageImpl*, c10::weak_intrusive_ptr<LazyStorage>> storages_;
  size_t most_ = kFew;
};
SharedStorages& shared_storages() {
  static auto* instance = new SharedStorages;  // outlives every thread
  return *instance;
}

void call_at_once(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Session::current().call_at_once(op, stack);
}

void register_for(DispatchKey key, DispatchKey backing) {
  auto* library = new torch::Library(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
  for (const std::string& name : ops_with_rival_kernels(backing)) {
    library->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&call_at_once>());
  }
}

TORCH_LIBRARY_IMPL(_, SparseLazy, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&call_at_once>());
}
TORCH_LIBRARY_IMPL(_, SparseCsrLazy, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&call_at_once>());
}
TORCH_LIBRARY_IMPL(_, QuantizedLazy, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&call_at_once>());
}

struct Registration {
  Registration() {
    const bool cuda = backing_device_of(0).is_cuda();
    register_for(DispatchKey::SparseLazy,
                 cuda ? DispatchKey::SparseCUDA : DispatchKey::SparseCPU);
    register_for(DispatchKey::SparseCsrLazy,
                 cuda ? DispatchKey::SparseCsrCUDA : DispatchKey::SparseCsrCPU);
    register_for(DispatchKey::QuantizedLazy,
                 cuda ? DispatchKey::QuantizedCUDA : DispatchKey::QuantizedCPU);
  }
};
const Registration registration;

}  // namespace

bool is_of_other_layout(const at::Tensor& backing_tensor) {
  return backing_tensor.layout() != c10::kStrided || backing_tensor.is_quantized();
}

at::Tensor wrap_other_layout(const at::Tensor& backing_tensor, c10::DeviceIndex index) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      backing_tensor.is_quantized() || backing_tensor.is_sparse() ||
          is_compressed(backing_tensor.layout()),
      "reprise: an op returned a ", backing_tensor.layout(), " tensor: compute it on ",
      backing_tensor.device(), " instead");
  // An op may return its argument, which said that its gradient is wanted.
  at::Tensor plain =
      backing_tensor.requires_grad() ? backing_tensor.variable_data() : backing_tensor;
  const DispatchKey key = key_for(plain);
  return at::Tensor(c10::make_intrusive<StandingFor>(key, std::move(plain), index));
}

at::Tensor unwrap_other_layout(const at::Tensor& lazy) {
  return static_cast<const StandingFor*>(lazy.unsafeGetTensorImpl())->backing();
}

void refresh_other_layout(const at::Tensor& lazy) {
  static_cast<StandingFor*>(lazy.unsafeGetTensorImpl())->refresh();
}

void note_shared_storage(const at::Tensor& tensor) {
  if (is_lazy(tensor)) shared_storages().add(lazy_storage(tensor));
}

c10::intrusive_ptr<LazyStorage> find_shared_storage(const c10::Storage& backing) {
  return shared_storages().find(backing);
}

}  // namespace reprise
