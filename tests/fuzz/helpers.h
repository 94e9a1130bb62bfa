/// \file
/// What the ops of random programs are written with: they bring any tensor into a
/// shape or dtype that an op takes. What they do depends on metadata alone, so that
/// it is the same on every device. A failing program that is printed as C++ is
/// compiled with this header.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <vector>

namespace reprise::fuzz {

/// `n` numbers at most, in one dimension, where there are more than twice as many.
torch::Tensor small(const torch::Tensor& a, int64_t n = 64);

/// `b` where it can be broadcast to `a`'s sizes, else its numbers, repeated or cut.
torch::Tensor like(const torch::Tensor& b, const torch::Tensor& a);

bool share_storage(const torch::Tensor& a, const torch::Tensor& b);

/// As `like`, for an op that writes `a`: a copy where it shows elements of `a` at other
/// places, of which eager reads old and new ones as its loops happen to run.
torch::Tensor beside(const torch::Tensor& b, const torch::Tensor& a);

/// Two dimensions, the first of 1 to 4.
torch::Tensor matrix(const torch::Tensor& a);

/// Of a dtype with fractions: integers become float32, complex numbers real ones.
torch::Tensor floating(const torch::Tensor& a);

/// `a` in the `k`-th of some dtypes; what an integer cannot hold is cut off.
torch::Tensor convert(const torch::Tensor& a, int64_t k);

/// A dimension of `a`.
int64_t dim(const torch::Tensor& a, int64_t k);
/// An index into dimension `d`; 0 where there is none.
int64_t index(const torch::Tensor& a, int64_t d, int64_t k);

/// Indices into the first dimension of `a`, made on its device.
torch::Tensor indices(const torch::Tensor& a, int64_t k);

/// A new leaf with `a`'s numbers.
torch::Tensor leaf(const torch::Tensor& a);
/// Its gradient; zeros where it has none.
torch::Tensor gradient_of(const torch::Tensor& a);
/// The gradient of `a`'s sum by `b`; zeros where there is none.
torch::Tensor gradient_by(const torch::Tensor& a, const torch::Tensor& b, bool create_graph);

}  // namespace reprise::fuzz
