/// \file
/// Sizes that change, said in advance.
///
/// Sizes that change from step to step are found without a word, once three of them have
/// been met. A program that says which they are gets one program for all of them from its
/// first trace:
///
/// ```cpp
/// reprise::mark_dynamic(x, 0, {.name = "batch", .most = 512});
/// auto h = embed->forward(x).view_symint({x.sym_size(0), 4, -1});
/// ```
///
/// What is made of a marked tensor knows its sizes in these terms: `sym_size`, `sym_sizes`,
/// `sym_strides` and `sym_numel` give symbolic `c10::SymInt`s, which `*_symint` calls take,
/// and libtorch's own formulas for gradients use. `size()` and `sizes()` give the plain
/// numbers, as ever; a call that is told a size by a plain number holds for that number
/// alone, and `explain()` says which call it was.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <string>

#include "reprise/export_macros.h"

namespace reprise {

/// What is known of a size that changes. In elements.
struct DynamicDim {
  /// Sizes of one name are the same size, in every tensor of a step. Empty: one of its own.
  std::string name;
  int64_t least = 0;
  int64_t most = std::numeric_limits<int64_t>::max();
};

/// The size of `tensor`, a lazy one, in dimension `dim` (negative: from the last one) may be
/// another in the next step. `tensor` becomes another handle to the same storage, so mark it
/// before it is handed on. To be called in every step, of every new tensor: a mark belongs
/// to the tensor.
///
/// Throws c10::Error for a tensor that is not lazy, is undefined or requires gradients;
/// c10::IndexError for a dimension that is not there; c10::ValueError for a size outside the
/// range, a range without a size, another range than the name has, and a dimension that was
/// marked as static. Works on the calling thread's session.
REPRISE_API void mark_dynamic(at::Tensor& tensor, int64_t dim, const DynamicDim& what = {});

/// The size of `tensor` in dimension `dim` never becomes a symbol: other sizes have programs
/// of their own. Errors and handles as for `mark_dynamic`.
REPRISE_API void mark_static(at::Tensor& tensor, int64_t dim);

}  // namespace reprise
