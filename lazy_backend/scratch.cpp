#include "lazy_backend/scratch.h"

#include <ATen/Functions.h>
#include <c10/util/strides.h>
#include <fcntl.h>
#include <unistd.h>

#include <string>

#include "compiler_bridge/artifact_store.h"

namespace reprise {
namespace {

/// Below this, a file's pages cost more than their memory.
constexpr size_t kFewBytes = size_t{16} << 20;

}  // namespace

Scratch::Scratch(size_t nbytes) : size_(nbytes) {
  if (nbytes == 0) return;
  if (nbytes <= kFewBytes) {
    memory_ = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    return;
  }
  std::string name = ArtifactStore::get().folder() + "/scratch-XXXXXX";
  const int file = ::mkstemp(name.data());
  if (file < 0) return;
  ::unlink(name.c_str());
  // Without the blocks in advance, a full disk would be a signal later.
  if (::posix_fallocate(file, 0, static_cast<off_t>(nbytes)) == 0) {
    memory_ = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  ::close(file);
}

Scratch::~Scratch() {
  if (memory_ != MAP_FAILED) ::munmap(memory_, size_);
}

at::Tensor Scratch::park(const at::Tensor& tensor) {
  const size_t nbytes = needs(static_cast<size_t>(tensor.numel()) * tensor.itemsize());
  const auto options = at::TensorOptions().dtype(tensor.scalar_type());
  const bool fits = memory_ != MAP_FAILED && used_ + nbytes <= size_ && nbytes > 0;
  if (!fits) return at::empty_like(tensor, options).copy_(tensor);
  const auto contiguous = c10::contiguous_strides(tensor.sizes());
  const auto strides = tensor.is_non_overlapping_and_dense() ? tensor.strides()
                                                             : at::IntArrayRef(contiguous);
  at::Tensor copy =
      at::from_blob(static_cast<char*>(memory_) + used_, tensor.sizes(), strides, options);
  used_ += nbytes;
  return copy.copy_(tensor);
}

}  // namespace reprise
