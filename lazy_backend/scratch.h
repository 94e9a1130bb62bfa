/// \file
/// Host memory for copies that are needed once, for a moment.
#pragma once

#include <ATen/core/Tensor.h>
#include <sys/mman.h>

#include <cstddef>

namespace reprise {

/// A file without a name in the artifact store's folder, mapped, which the system can
/// write to disk; ordinary memory for few bytes, and where there is no room for a file.
/// Not thread-safe.
class Scratch {
 public:
  explicit Scratch(size_t nbytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  /// What a tensor of `nbytes` takes.
  static size_t needs(size_t nbytes) { return (nbytes + 63) / 64 * 64; }
  size_t nbytes() const { return size_; }

  /// A copy of a tensor's elements, with its own strides where it is dense, contiguous
  /// elsewhere. It must not outlive the memory, but where that is full.
  at::Tensor park(const at::Tensor& tensor);

 private:
  void* memory_ = MAP_FAILED;
  size_t size_ = 0, used_ = 0;
};

}  // namespace reprise
