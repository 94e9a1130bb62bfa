/// \file
/// Lazy tensors that know their sizes in terms of symbols.
///
/// A lazy tensor is a plain `c10::TensorImpl`, whose sizes are numbers. One that is made of
/// a marked tensor (reprise/dynamic.h) is a `SymbolicTensor`: its sizes are the same numbers,
/// and `sym_sizes()` gives them as expressions.
#pragma once

#include <ATen/core/TensorBody.h>
#include <c10/core/SymInt.h>
#include <c10/core/SymIntArrayRef.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "lazy_backend/trace.h"
#include "symint/expression.h"

namespace reprise {

/// Where a tensor lies, over symbols. Immutable; shared by the tensors that lie so.
class SymbolicShape {
 public:
  /// `expressions`: sizes, strides, offset. `now`: what they are at present. `fixed`: bit k
  /// says that dimension k was marked as static.
  SymbolicShape(std::vector<Expression> expressions, const Geometry& now, uint32_t fixed = 0);

  const std::vector<Expression>& expressions() const { return expressions_; }
  uint32_t fixed() const { return fixed_; }
  /// A size, stride or offset depends on a symbol.
  bool is_symbolic() const { return symbolic_; }

  c10::SymIntArrayRef sizes() const { return c10::SymIntArrayRef(numbers_.data(), rank_); }
  c10::SymIntArrayRef strides() const {
    return c10::SymIntArrayRef(numbers_.data() + rank_, rank_);
  }
  const c10::SymInt& offset() const { return numbers_[2 * rank_]; }
  const c10::SymInt& numel() const { return numel_; }
  /// The tensor lies as the numbers say.
  bool describes(const c10::TensorImpl& tensor) const { return now_.matches(tensor); }

 private:
  std::vector<Expression> expressions_;
  std::vector<c10::SymInt> numbers_;  ///< sizes, strides, offset
  c10::SymInt numel_;
  Geometry now_;
  uint32_t rank_;
  uint32_t fixed_;
  bool symbolic_ = false;
};
using SymbolicShapePtr = std::shared_ptr<const SymbolicShape>;

class SymbolicTensor final : public c10::TensorImpl {
 public:
  /// The keys are taken as they are, those of autograd with them.
  SymbolicTensor(c10::Storage storage, c10::DispatchKeySet keys, caffe2::TypeMeta dtype,
                 SymbolicShapePtr shape);

  /// Null where an in-place op has changed how the tensor lies.
  SymbolicShapePtr shape() const { return known() ? shape_ : nullptr; }

  c10::SymIntArrayRef sym_sizes_custom() const override;
  c10::SymIntArrayRef sym_strides_custom() const override;
  c10::SymInt sym_numel_custom() const override;
  c10::SymInt sym_storage_offset_custom() const override;

  c10::intrusive_ptr<TensorImpl> shallow_copy_and_detach(
      const c10::VariableVersion& version, bool allow_metadata_change) const override;
  c10::intrusive_ptr<TensorImpl> shallow_copy_and_detach(
      c10::VariableVersion&& version, bool allow_metadata_change) const override;

 private:
  bool known() const { return shape_->describes(*this); }
  template <class Version>
  c10::intrusive_ptr<TensorImpl> copy(Version&& version, bool allow_metadata_change) const;

  SymbolicShapePtr shape_;
};

/// False until the first tensor is marked: then nobody need ask.
bool any_symbolic();

/// The shape of a tensor over symbols; null where it has none.
SymbolicShapePtr symbolic_shape(const at::Tensor& tensor);

/// Another handle of the same storage, keys, bits and version, with this shape. `tensor` is
/// lazy and takes no part in autograd.
at::Tensor with_shape(const at::Tensor& tensor, SymbolicShapePtr shape);

}  // namespace reprise
