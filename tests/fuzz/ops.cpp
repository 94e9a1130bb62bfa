#include "tests/fuzz/ops.h"

#include <sstream>

#include "tests/fuzz/helpers.h"

namespace reprise::fuzz {
namespace {

using torch::indexing::Slice;
using Tensors = std::vector<torch::Tensor>;

#define NAMES                                         \
  [[maybe_unused]] const auto& [a, b, c, i, j, s] = operands
#define TENSOR(...)                                                           \
  Op {                                                                        \
    .kind = Op::Kind::kTensor, .text = #__VA_ARGS__,                          \
    .tensor = [](const Operands& operands) -> torch::Tensor { NAMES; return __VA_ARGS__; } \
  }
#define TENSORS(...)                                                          \
  Op {                                                                        \
    .kind = Op::Kind::kTensors, .text = #__VA_ARGS__,                         \
    .tensors = [](const Operands& operands) -> Tensors { NAMES; return __VA_ARGS__; } \
  }
#define DO(...)                                                               \
  Op {                                                                        \
    .kind = Op::Kind::kDo, .text = #__VA_ARGS__,                              \
    .act = [](const Operands& operands) { NAMES; __VA_ARGS__; }               \
  }
#define READ(...)                                                             \
  Op {                                                                        \
    .kind = Op::Kind::kRead, .text = #__VA_ARGS__,                            \
    .read = [](const Operands& operands) -> std::string { NAMES; return text_of(__VA_ARGS__); } \
  }

template <class Value>
std::string text_of(const Value& value) {
  std::ostringstream out;
  out.precision(17);
  out << value;
  return out.str();
}

std::vector<Op> make_ops() {
  return {
      // Arithmetic, with broadcasting and type promotion.
      TENSOR(a + like(b, a)),
      TENSOR(a - like(b, a) * s),
      TENSOR(a * like(b, a)),
      TENSOR(torch::div(a, like(b, a).abs() + 1)),
      TENSOR(torch::add(a, like(b, a), s)),
      TENSOR(a + s),
      TENSOR(a * s),
      TENSOR(a - i),
      TENSOR(1.5 - a),
      TENSOR(-a),
      TENSOR(torch::maximum(a, like(b, a))),
      TENSOR(torch::lerp(floating(a), like(floating(b), a).to(floating(a)), 0.25)),
      TENSOR(torch::addcmul(a, like(b, a), like(c, a), s)),
      TENSOR(torch::remainder(a, 3)),
      TENSOR(torch::div(a, 2, "floor")),
      // Elementwise functions.
      TENSOR(torch::relu(a)),
      TENSOR(torch::sigmoid(a)),
      TENSOR(torch::tanh(a)),
      TENSOR(torch::sin(a)),
      TENSOR(torch::exp(a.clamp(-3, 3))),
      TENSOR(torch::log1p(a.abs())),
      TENSOR(torch::rsqrt(a.abs() + 1)),
      TENSOR(torch::sqrt(a.abs())),
      TENSOR(torch::gelu(a)),
      TENSOR(torch::silu(a)),
      TENSOR(torch::leaky_relu(a, 0.1)),
      TENSOR(torch::erf(a)),
      TENSOR(a.pow(2)),
      TENSOR(a.pow(3).clamp(-9, 9)),
      TENSOR(torch::floor(a)),
      TENSOR(torch::sign(a)),
      TENSOR(a.abs()),
      TENSOR(a.clamp(-1, s)),
      TENSOR(torch::nan_to_num(a)),
      // Comparisons and choices.
      TENSOR(a > like(b, a)),
      TENSOR(a == i),
      TENSOR(a.logical_not()),
      TENSOR(torch::where(a > 0, a, like(b, a))),
      TENSOR(a.masked_fill(a > s, j)),
      TENSOR(torch::bitwise_and(convert(a, 2), i)),
      // Reductions and scans.
      TENSOR(a.sum()),
      TENSOR(a.sum(dim(a, i))),
      TENSOR(floating(a).mean(dim(a, i), j > 3)),
      TENSOR(a.amax(dim(a, i), j > 3)),
      TENSOR(a.argmax(dim(a, i))),
      TENSOR(a.cumsum(dim(a, i))),
      TENSOR(torch::any(a > 0)),
      TENSOR(floating(a).norm()),
      TENSOR(floating(a).var(dim(a, i), false)),
      TENSOR(torch::softmax(a, dim(a, i))),
      TENSOR(torch::log_softmax(a, dim(a, i))),
      TENSOR(torch::logsumexp(floating(a), dim(a, i))),
      TENSOR(std::get<0>(torch::sort(a, dim(a, i)))),
      TENSOR(std::get<0>(torch::max(a, dim(a, i)))),
      // Matrices and layers.
      TENSOR(torch::mm(matrix(a), matrix(a).t())),
      TENSOR(torch::mm(matrix(a), like(b.to(a.scalar_type()), matrix(a)).expand_as(matrix(a)).t())),
      TENSOR(torch::bmm(matrix(a).unsqueeze(0), matrix(a).t().unsqueeze(0))),
      TENSOR(torch::addmm(b.to(a.scalar_type()).sum(), matrix(a), matrix(a).t(), s, 0.5)),
      TENSOR(small(torch::outer(small(a, 8).reshape({-1}), small(b, 8).reshape({-1})))),
      // With a small epsilon, the rounding of one element's mean would be a large difference.
      TENSOR(torch::layer_norm(floating(a), {a.size(-1)}, {}, {}, 0.1)),
      TENSOR(torch::conv1d(matrix(floating(a)).unsqueeze(0), torch::ones({2, matrix(a).size(0), 1}, floating(a).options()))),
      TENSOR(torch::batch_norm(matrix(floating(a)), {}, {}, {}, {}, true, 0.1, 0.1, false)),
      TENSOR(torch::nll_loss(torch::log_softmax(matrix(floating(a)), 1), torch::zeros({matrix(a).size(0)}, a.options().dtype(torch::kLong).requires_grad(false)))),
      TENSOR(torch::mse_loss(floating(a), like(floating(b), a).expand_as(a))),
      // Views.
      TENSOR(a.reshape({-1})),
      TENSOR(matrix(a).t()),
      TENSOR(matrix(a)),
      TENSOR(a.unsqueeze(dim(a, i))),
      TENSOR(a.squeeze()),
      TENSOR(a.select(dim(a, i), index(a, dim(a, i), j))),
      TENSOR(a.slice(dim(a, i), index(a, dim(a, i), j))),
      TENSOR(a.slice(dim(a, i), 0, 4, 2)),
      TENSOR(a.transpose(0, -1)),
      TENSOR(small(a, 16).unsqueeze(0).expand({2, -1})),
      TENSOR(a.flip(dim(a, i))),
      TENSOR(matrix(a).diagonal()),
      TENSOR((a.numel() > 2 ? a : a.reshape({-1}).repeat({3})).as_strided({2, 2}, {1, 1})),
      TENSOR(a.view(torch::kInt)),
      TENSOR(torch::view_as_real(a)),
      TENSOR(torch::conj(a)),
      TENSOR(torch::imag(a)),
      TENSOR(a.view({-1})),
      TENSOR(a),
      TENSOR(a.detach()),
      TENSOR(a.contiguous()),
      TENSOR(a.clone()),
      TENSOR(convert(a, i)),
      TENSOR(a.to(b.scalar_type())),
      // Indexing and joining.
      TENSOR(a.index_select(0, indices(a, i))),
      TENSOR(a.index({indices(a, i)})),
      TENSOR(a.gather(0, torch::zeros_like(a, torch::kLong))),
      TENSOR(a.index({Slice(i % 2, c10::nullopt, 2)})),
      TENSOR(small(a.masked_select(a > 0))),
      TENSOR(torch::nonzero(a).slice(0, 0, 5)),
      TENSOR(small(torch::cat({a.reshape({-1}), b.reshape({-1})}))),
      TENSOR(small(torch::stack({a, like(b, a).expand_as(a)}))),
      TENSOR(small(a.repeat({2, 1}))),
      TENSOR(torch::constant_pad_nd(a.reshape({-1}), {1, i % 3}, s)),
      TENSOR(torch::roll(a, i, dim(a, j))),
      TENSOR(torch::tril(matrix(a))),
      TENSOR(torch::embedding(matrix(floating(a)), indices(matrix(a), i))),
      TENSORS(a.split(i % 3 + 1, dim(a, j))),
      TENSORS(a.chunk(2, dim(a, j))),
      TENSORS(small(a, 4).unbind()),
      TENSORS(torch::_foreach_add({a, b}, s)),
      TENSORS(torch::broadcast_tensors({a, like(b, a)})),
      // New tensors.
      TENSOR(torch::zeros_like(a)),
      TENSOR(torch::full({3}, s, a.options().requires_grad(false))),
      TENSOR(torch::ones({2, 3}, torch::TensorOptions().device(a.device()))),
      TENSOR(torch::arange(i, torch::TensorOptions().device(a.device()))),
      TENSOR(torch::empty_like(a).fill_(i)),
      TENSOR(torch::tensor({0.5, 1.5, -1.0}).to(a.device())),
      TENSOR(torch::zeros({0, 3}, torch::TensorOptions().device(a.device()))),
      TENSOR(torch::scalar_tensor(s, torch::TensorOptions().device(a.device()))),
      TENSOR(torch::randn({2, 3}, torch::TensorOptions().device(a.device()))),
      TENSOR(torch::rand_like(floating(a))),
      TENSOR(torch::dropout(floating(a), 0.5, true)),
      TENSOR(torch::bernoulli(torch::sigmoid(floating(a)))),
      TENSOR(torch::randint(8, {4}, torch::TensorOptions().device(a.device()))),
      // Writes, also through views, and what changes a tensor's metadata.
      DO(a.add_(beside(b, a))),
      DO(a.mul_(s)),
      DO(a.sub_(i)),
      DO(a.clamp_(-2, 2)),
      DO(a.zero_()),
      DO(a.fill_(s)),
      DO(a.copy_(beside(b, a))),
      DO(a.tanh_()),
      DO(a.select(dim(a, i), index(a, dim(a, i), j)).zero_()),
      DO(a.slice(dim(a, i), 0, 2).add_(1)),
      DO(a.view({-1}).slice(0, 0, 3).mul_(0.5)),
      DO(a.masked_fill_(a > s, i)),
      DO(a.index_put_({indices(a, i)}, b.reshape({-1}).slice(0, 0, 1).clone().to(a.scalar_type()))),
      DO(a.index_add_(0, indices(a, i), torch::ones_like(a.index_select(0, indices(a, i))))),
      DO(a.addcmul_(beside(b, a), beside(c, a), s)),
      DO(a.t_()),
      DO(a.unsqueeze_(0)),
      DO(a.squeeze_()),
      DO(a.resize_({2, i % 3}).fill_(s)),
      DO({ torch::Tensor out = a; torch::add_out(out, beside(b, a), beside(c, a)); }),
      DO(if (!share_storage(a, b)) torch::_foreach_mul_({a, b}, s)),
      DO(torch::Tensor(a).set_data(b.detach().clone())),
      DO(torch::swapaxes(a, 0, -1).add_(s)),
      DO(a.uniform_(-1, 1)),
      DO(a.normal_()),
      // Autograd.
      TENSOR(leaf(a)),
      TENSOR(gradient_of(a)),
      TENSOR(gradient_by(a, b, false)),
      TENSOR(gradient_by(a, b, true)),
      TENSOR([&] { torch::NoGradGuard no_grad; return a * s; }()),
      DO(floating(a).sum().backward()),
      DO(floating(a).pow(2).mean().backward({}, true)),
      DO({ torch::NoGradGuard no_grad; a.sub_(gradient_of(a) * 0.1); }),
      // Not a view, nor off again: after an update in place libtorch cannot make the history
      // of such views anew on a lazy device (README).
      DO(if (!a.is_view() && i > 3) a.requires_grad_()),
      DO(a.mutable_grad().reset()),
      // What the host sees.
      READ(a.sum().item().toComplexDouble()),
      READ(floating(a).max().item<double>()),
      READ(torch::equal(a, like(b, a))),
      READ(a.is_nonzero()),
      READ(a.cpu().reshape({-1}).slice(0, 0, 4)),
      READ(c10::str(a.sizes(), " ", a.strides())),
      READ(a.is_contiguous()),
      Op{.kind = Op::Kind::kDrop, .text = ""},
      Op{.kind = Op::Kind::kDrop, .text = ""},
      Op{.kind = Op::Kind::kDrop, .text = ""},
      Op{.kind = Op::Kind::kBranch, .text = ""},
      Op{.kind = Op::Kind::kMark, .text = ""},
  };
}

}  // namespace

const std::vector<Op>& ops() {
  static const std::vector<Op> all = make_ops();
  return all;
}

}  // namespace reprise::fuzz
