/// \file
/// Lazy tensors that are not strided, or quantized: sparse ones of every layout.
///
/// They have no `LazyStorage`. Each stands for a tensor of the backing device, which it
/// holds, and calls that take one run at once, between segments, with what is pending
/// completed before. Dense tensors that come out of such calls (`values()`, a product)
/// are lazy ones as any, and share memory with what they are parts of.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/util/intrusive_ptr.h>

namespace reprise {

class LazyStorage;

/// Whether a tensor of the backing device cannot be a plain lazy tensor.
bool is_of_other_layout(const at::Tensor& backing_tensor);

/// Whether a tensor is one of those that this file is about.
inline bool is_lazy_of_other_layout(const at::Tensor& tensor) {
  if (!tensor.defined()) return false;
  const c10::DispatchKeySet keys = tensor.key_set();
  return keys.has_backend(c10::BackendComponent::LazyBit) && !keys.has(c10::DispatchKey::Lazy);
}

/// A lazy tensor that stands for `backing_tensor`.
at::Tensor wrap_other_layout(const at::Tensor& backing_tensor, c10::DeviceIndex index);

/// What such a tensor stands for.
at::Tensor unwrap_other_layout(const at::Tensor& lazy);

/// Such a tensor may share the memory of `tensor`, where that is a plain lazy one: who asks
/// for its parts gets the same storage. From any thread.
void note_shared_storage(const at::Tensor& tensor);

/// The lazy storage over `backing` that was noted; null where there is none.
c10::intrusive_ptr<LazyStorage> find_shared_storage(const c10::Storage& backing);

/// Takes over what a call has changed of the tensor that `lazy` stands for.
void refresh_other_layout(const at::Tensor& lazy);

}  // namespace reprise
