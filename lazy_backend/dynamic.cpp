/// \file
/// The functions of reprise/dynamic.h.
#include "reprise/dynamic.h"

#include <c10/core/WrapDimMinimal.h>

#include <algorithm>
#include <mutex>

#include "lazy_backend/session.h"
#include "lazy_backend/storage.h"
#include "lazy_backend/symbolic_shape.h"
#include "symint/symbols.h"

namespace reprise {
namespace {

constexpr int64_t kMostDims = 32;  // of which `Geometry::fixed` knows

/// The dimension, counted from the first; throws for what cannot be marked.
uint32_t checked_dim(const char* function, const at::Tensor& tensor, int64_t dim) {
  TORCH_CHECK(tensor.defined(), "reprise: ", function, " of an undefined tensor");
  TORCH_CHECK(is_lazy(tensor), "reprise: ", function, " of a tensor on ", tensor.device(),
              "; mark the tensor that .to(torch::kLazy) returns");
  TORCH_CHECK(!tensor.requires_grad(), "reprise: ", function, " of a tensor that requires "
              "gradients; mark it before requires_grad_(), or mark what it is made of");
  TORCH_CHECK(tensor.dim() <= kMostDims, "reprise: ", function, " of a tensor with ",
              tensor.dim(), " dimensions; at most ", kMostDims, " are possible");
  return static_cast<uint32_t>(c10::maybe_wrap_dim(dim, tensor.dim(), /*wrap_scalar=*/false));
}

/// What is known of a tensor's integers; constants where nothing is.
std::vector<Expression> expressions_of(const at::Tensor& tensor) {
  if (const auto shape = symbolic_shape(tensor)) return shape->expressions();
  std::vector<Expression> out;
  for (const int64_t size : tensor.sizes()) out.push_back(Expression::constant(size));
  for (const int64_t stride : tensor.strides()) out.push_back(Expression::constant(stride));
  out.push_back(Expression::constant(tensor.storage_offset()));
  return out;
}

/// The strides of a dense tensor follow from its sizes, whichever dimension comes first.
void renew_strides(const at::Tensor& tensor, std::vector<Expression>& expressions) {
  const auto rank = static_cast<size_t>(tensor.dim());
  std::vector<size_t> order(rank);
  for (size_t k = 0; k < rank; ++k) order[k] = k;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return tensor.strides()[a] < tensor.strides()[b];
  });
  Expression stride = Expression::constant(1);
  int64_t value = 1;
  for (const size_t dim : order) {
    if (tensor.strides()[dim] != value) return;  // not dense: its strides stay numbers
    expressions[rank + dim] = stride;
    value *= tensor.sizes()[dim];
    const Expression& size = expressions[dim];
    if (size.kind() == Expression::Kind::kConstant && stride.kind() == Expression::Kind::kConstant) {
      stride = Expression::constant(value);
    } else if (stride.kind() == Expression::Kind::kConstant && stride.value() == 1) {
      stride = size;
    } else {
      stride = Expression::of(Expression::Kind::kMultiply, {size, stride});
    }
  }
}

void set_shape(at::Tensor& tensor, std::vector<Expression> expressions, uint32_t fixed) {
  tensor = with_shape(tensor, std::make_shared<const SymbolicShape>(
                                  std::move(expressions), Geometry(*tensor.unsafeGetTensorImpl()), fixed));
}

}  // namespace

void mark_dynamic(at::Tensor& tensor, int64_t dim, const DynamicDim& what) {
  Session::current().mark(tensor, dim, what);
}

void Session::mark(at::Tensor& tensor, int64_t dim, const DynamicDim& what) {
  const uint32_t k = checked_dim("mark_dynamic", tensor, dim);
  const int64_t size = tensor.size(k);
  TORCH_CHECK_VALUE(what.least <= what.most, "reprise: mark_dynamic of dimension ", k, " ('",
                    what.name, "'): no size is at least ", what.least, " and at most ", what.most);
  TORCH_CHECK_VALUE(size >= what.least && size <= what.most, "reprise: mark_dynamic of dimension ",
                    k, " ('", what.name, "') of a tensor of sizes ", tensor.sizes(), ": expected ",
                    what.least, " to ", what.most, ", it is ", size);
  const auto shape = symbolic_shape(tensor);
  const uint32_t fixed = shape == nullptr ? 0 : shape->fixed();
  TORCH_CHECK_VALUE(((fixed >> k) & 1) == 0, "reprise: mark_dynamic of dimension ", k, " ('",
                    what.name, "') of a tensor of sizes ", tensor.sizes(),
                    ", which mark_static has marked");
  uint32_t symbol = 0;
  {
    const std::lock_guard<SessionLock> guard(lock_);
    symbol = symbol_named(what.name.empty() ? symbolic_.next_name() : what.name);
    symbolic_.mark(symbol, size, {what.least, what.most});
  }
  std::vector<Expression> expressions = expressions_of(tensor);
  expressions[k] = Expression::symbol(symbol);
  renew_strides(tensor, expressions);
  set_shape(tensor, std::move(expressions), fixed);
}

void mark_static(at::Tensor& tensor, int64_t dim) {
  const uint32_t k = checked_dim("mark_static", tensor, dim);
  std::vector<Expression> expressions = expressions_of(tensor);
  TORCH_CHECK_VALUE(expressions[k].kind() == Expression::Kind::kConstant,
                    "reprise: mark_static of dimension ", k, " of a tensor of sizes ",
                    tensor.sizes(), ", which mark_dynamic has marked as '",
                    expressions[k].named_text(), "'");
  const auto shape = symbolic_shape(tensor);
  set_shape(tensor, std::move(expressions), (shape == nullptr ? 0 : shape->fixed()) | (1u << k));
}

}  // namespace reprise
