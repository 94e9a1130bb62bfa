#include "tests/fuzz/helpers.h"

#include <ATen/ExpandUtils.h>

#include <array>

namespace reprise::fuzz {

torch::Tensor small(const torch::Tensor& a, int64_t n) {
  return a.numel() > 2 * n ? a.reshape({-1}).slice(0, 0, n) : a;
}

torch::Tensor like(const torch::Tensor& b, const torch::Tensor& a) {
  if (at::is_expandable_to(b.sizes(), a.sizes())) return b;
  if (b.numel() == 0) return torch::zeros(a.sizes(), b.options());
  torch::Tensor flat = b.reshape({-1});
  const int64_t n = a.numel();
  if (flat.size(0) < n) flat = flat.repeat({(n + flat.size(0) - 1) / flat.size(0)});
  return flat.slice(0, 0, n).reshape(a.sizes());
}

bool share_storage(const torch::Tensor& a, const torch::Tensor& b) {
  return a.has_storage() && b.has_storage() &&
         a.storage().unsafeGetStorageImpl() == b.storage().unsafeGetStorageImpl();
}

torch::Tensor beside(const torch::Tensor& b, const torch::Tensor& a) {
  torch::Tensor other = like(b, a);
  const bool same = other.sizes() == a.sizes() && other.strides() == a.strides() &&
                    other.storage_offset() == a.storage_offset();
  return share_storage(other, a) && !same ? other.clone() : other;
}

torch::Tensor matrix(const torch::Tensor& a) {
  const int64_t n = a.numel();
  if (n == 0) return a.reshape({1, 0});
  int64_t rows = 4;
  while (n % rows != 0) --rows;
  return a.reshape({rows, n / rows});
}

torch::Tensor floating(const torch::Tensor& a) {
  if (a.is_floating_point()) return a;
  return a.is_complex() ? torch::real(a) : a.to(torch::kFloat);
}

torch::Tensor convert(const torch::Tensor& a, int64_t k) {
  constexpr std::array kDtypes{torch::kFloat, torch::kDouble,   torch::kLong, torch::kHalf,
                               torch::kBool,  torch::kBFloat16, torch::kInt,  torch::kComplexFloat,
                               torch::kFloat, torch::kByte};
  const auto dtype = kDtypes[static_cast<size_t>(k) % kDtypes.size()];
  if (!c10::isIntegralType(dtype, /*includeBool=*/false)) return a.to(dtype);
  if (a.scalar_type() == torch::kBool) return a.to(dtype);
  const int64_t least = dtype == torch::kByte ? 0 : -100;
  const auto cut = a.is_floating_point() || a.is_complex() ? torch::nan_to_num(floating(a)) : a;
  return cut.clamp(least, 100).to(dtype);
}

int64_t dim(const torch::Tensor& a, int64_t k) { return a.dim() == 0 ? 0 : k % a.dim(); }

int64_t index(const torch::Tensor& a, int64_t d, int64_t k) {
  return a.dim() == 0 || a.size(d) == 0 ? 0 : k % a.size(d);
}

torch::Tensor indices(const torch::Tensor& a, int64_t k) {
  const int64_t n = a.dim() == 0 ? 1 : a.size(0);
  const auto options = torch::TensorOptions().dtype(torch::kLong).device(a.device());
  const auto numbers = torch::arange(k % 3 + 1, options) * (k + 1);
  return n == 0 ? numbers : numbers.remainder(n);
}

torch::Tensor leaf(const torch::Tensor& a) {
  return floating(a).detach().clone().requires_grad_(true);
}

torch::Tensor gradient_of(const torch::Tensor& a) {
  return a.is_leaf() && a.grad().defined() ? a.grad() : torch::zeros_like(a);
}

torch::Tensor gradient_by(const torch::Tensor& a, const torch::Tensor& b, bool create_graph) {
  const auto gradients = torch::autograd::grad({floating(a).sum()}, {b}, /*grad_outputs=*/{},
                                               /*retain_graph=*/true, create_graph,
                                               /*allow_unused=*/true);
  return gradients[0].defined() ? gradients[0] : torch::zeros_like(b);
}

}  // namespace reprise::fuzz
