#include "lazy_backend/shape_inference.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty_strided.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace reprise {
namespace {

// ---------------------------------------------------------------------------
// libtorch's kernels

using MetaKernels = std::unordered_map<c10::OperatorName, c10::SafeKernelFunction>;

bool makes_views(const c10::FunctionSchema& schema) {
  return std::any_of(schema.returns().begin(), schema.returns().end(), [](const auto& result) {
    return result.alias_info() != nullptr && !result.alias_info()->isWrite();
  });
}

/// Kernels that call no other op that Python replaces: the structured ones, and those of
/// views.
MetaKernels find_meta_kernels() {
  MetaKernels kernels;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    if (!name.name.starts_with("aten::")) continue;
    const auto op = dispatcher.findOp(name);
    if (!op || !op->hasSchema()) continue;
    const bool own = op->hasKernelForDispatchKey(c10::DispatchKey::Meta);
    if (!own && !makes_views(op->schema())) continue;
    if (!op->hasComputedKernelForDispatchKey(c10::DispatchKey::Meta)) continue;
    auto kernel = op->getComputedKernelForDispatchKey(c10::DispatchKey::Meta);
    if (kernel.debug().find(".py") != std::string::npos) continue;  // a Python has been here
    kernels.emplace(name, std::move(kernel));
  }
  return kernels;
}

const MetaKernels& meta_kernels() {
  static const auto* kernels = new MetaKernels(find_meta_kernels());
  return *kernels;
}

const c10::SafeKernelFunction* kernel_of(const c10::OperatorName& name) {
  const auto found = meta_kernels().find(name);
  return found == meta_kernels().end() ? nullptr : &found->second;
}

// ---------------------------------------------------------------------------
// Rules

using Sizes = c10::DimVector;

/// A call's arguments, as rules read them. What is not there throws.
class Call {
 public:
  explicit Call(c10::ArrayRef<c10::IValue> arguments) : arguments_(arguments) {}

  bool has(size_t k) const {
    return arguments_[k].isTensor() && arguments_[k].toTensor().defined();
  }
  Sizes sizes(size_t k) const { return Sizes(arguments_[k].toTensor().sizes()); }
  int64_t size(size_t k, int64_t dim) const { return arguments_[k].toTensor().size(dim); }
  int64_t rank(size_t k) const { return arguments_[k].toTensor().dim(); }
  int64_t integer(size_t k) const { return arguments_[k].toInt(); }
  bool flag(size_t k) const { return arguments_[k].toBool(); }
  bool is_none(size_t k) const { return arguments_[k].isNone(); }
  bool is_integer(size_t k) const { return arguments_[k].isInt(); }
  Sizes integers(size_t k) const {
    const auto values = arguments_[k].toIntVector();
    return Sizes(values.begin(), values.end());
  }
  c10::ArrayRef<c10::IValue> list(size_t k) const { return arguments_[k].toListRef(); }

  /// What all tensors among the arguments broadcast to.
  Sizes broadcast() const {
    Sizes all;
    for (const c10::IValue& value : arguments_) {
      if (value.isTensor() && value.toTensor().defined()) {
        all = at::infer_size_dimvector(all, value.toTensor().sizes());
      }
    }
    return all;
  }

 private:
  const c10::ArrayRef<c10::IValue> arguments_;
};

/// Of a result without elements when it was recorded: the same again. Nothing is known of one
/// that has some.
const Sizes kNoElements{-1};

/// The sizes of each result, empty ones for what is no new tensor.
using Rule = std::vector<Sizes> (*)(const Call& call);

std::vector<Sizes> all_broadcast(const Call& call) { return {call.broadcast()}; }
std::vector<Sizes> scalar(const Call&) { return {{}}; }
template <size_t k>
std::vector<Sizes> as_argument(const Call& call) {
  return {call.sizes(k)};
}
template <size_t k>
std::vector<Sizes> as_arguments(const Call& call) {
  return {call.sizes(k), call.sizes(k)};
}
template <size_t k>
std::vector<Sizes> as_told(const Call& call) {
  return {call.integers(k)};
}
/// A loss whose argument `k` says how it is reduced; 0: not at all.
template <size_t k>
std::vector<Sizes> loss(const Call& call) {
  return {call.integer(k) == 0 ? call.broadcast() : Sizes()};
}

/// Statistics over `dims`, all of them where there are none.
Sizes reduced(Sizes sizes, Sizes dims, bool keep) {
  const auto rank = static_cast<int64_t>(sizes.size());
  if (dims.empty()) {
    dims.resize(sizes.size());
    std::iota(dims.begin(), dims.end(), 0);
  }
  for (int64_t& dim : dims) dim = c10::maybe_wrap_dim(dim, rank);
  Sizes out;
  for (int64_t dim = 0; dim < rank; ++dim) {
    const bool gone = std::find(dims.begin(), dims.end(), dim) != dims.end();
    if (!gone) out.push_back(sizes[static_cast<size_t>(dim)]);
    if (gone && keep) out.push_back(1);
  }
  return out;
}
std::vector<Sizes> variance(const Call& call) {  // self, dim, correction, keepdim
  return {reduced(call.sizes(0), call.is_none(1) ? Sizes() : call.integers(1), call.flag(3))};
}

std::vector<Sizes> count_of_range(int64_t start, int64_t end, int64_t step) {
  TORCH_CHECK(step > 0 ? end >= start : step < 0 && end <= start, "reprise: no range");
  return {{(end - start + step - (step > 0 ? 1 : -1)) / step}};
}

std::vector<Sizes> convolution(const Call& call) {
  // input, weight, bias, stride, padding, dilation, transposed, output_padding, groups
  const Sizes input = call.sizes(0), weight = call.sizes(1);
  const Sizes stride = call.integers(3), padding = call.integers(4), dilation = call.integers(5);
  const bool transposed = call.flag(6);
  const Sizes output_padding = call.integers(7);
  TORCH_CHECK(input.size() == weight.size() && input.size() >= 3, "reprise: an unbatched input");
  TORCH_CHECK(input[1] == (transposed ? weight[0] : weight[1] * call.integer(8)),
              "reprise: channels do not fit");
  const auto at = [](const Sizes& each, size_t k) { return each[each.size() == 1 ? 0 : k]; };
  Sizes out{input[0], transposed ? weight[1] * call.integer(8) : weight[0]};
  for (size_t k = 0; k + 2 < input.size(); ++k) {
    const int64_t kernel = at(dilation, k) * (weight[k + 2] - 1);
    if (transposed) {
      out.push_back((input[k + 2] - 1) * at(stride, k) - 2 * at(padding, k) + kernel +
                    at(output_padding, k) + 1);
    } else {
      const int64_t span = input[k + 2] + 2 * at(padding, k) - kernel - 1;
      TORCH_CHECK(span >= 0, "reprise: a kernel larger than its input");
      out.push_back(span / at(stride, k) + 1);
    }
  }
  return {out};
}

const std::unordered_map<std::string_view, Rule>& rules() {
  // As of torch 2.11, native_functions.yaml and the kernels that it names.
  static const auto* table = new std::unordered_map<std::string_view, Rule>{
      {"aten::abs", all_broadcast},
      {"aten::_prelu_kernel", all_broadcast},
      {"aten::add.Scalar", all_broadcast},
      {"aten::sub.Scalar", all_broadcast},
      {"aten::mul.Scalar", all_broadcast},
      {"aten::div.Scalar", all_broadcast},
      {"aten::rsub.Scalar", all_broadcast},
      {"aten::rsub.Tensor", all_broadcast},
      {"aten::fmod.Scalar", all_broadcast},
      {"aten::remainder.Scalar", all_broadcast},
      {"aten::bitwise_and.Scalar", all_broadcast},
      {"aten::complex", all_broadcast},
      {"aten::polar", all_broadcast},
      {"aten::relu", all_broadcast},
      {"aten::hardswish", all_broadcast},
      {"aten::hardswish_backward", all_broadcast},
      {"aten::hardtanh", all_broadcast},
      {"aten::hardtanh_backward", all_broadcast},
      {"aten::isnan", all_broadcast},
      {"aten::logical_and", all_broadcast},
      {"aten::logical_or", all_broadcast},
      {"aten::logical_xor", all_broadcast},
      {"aten::logical_not", all_broadcast},
      {"aten::masked_fill.Scalar", all_broadcast},
      {"aten::masked_fill.Tensor", all_broadcast},
      {"aten::where.self", all_broadcast},
      {"aten::nan_to_num", all_broadcast},
      {"aten::mse_loss_backward", all_broadcast},
      {"aten::smooth_l1_loss_backward", all_broadcast},
      {"aten::huber_loss_backward", all_broadcast},
      {"aten::log_sigmoid_backward", as_argument<1>},
      {"aten::binary_cross_entropy_backward", as_argument<1>},
      {"aten::binary_cross_entropy", loss<3>},
      {"aten::binary_cross_entropy_with_logits", loss<4>},
      {"aten::huber_loss", loss<2>},

      {"aten::clone", as_argument<0>},
      {"aten::_to_copy", as_argument<0>},
      {"aten::empty_like", as_argument<0>},
      {"aten::zeros_like", as_argument<0>},
      {"aten::ones_like", as_argument<0>},
      {"aten::full_like", as_argument<0>},
      {"aten::rand_like", as_argument<0>},
      {"aten::randn_like", as_argument<0>},
      {"aten::randint_like", as_argument<0>},
      {"aten::bernoulli.p", as_argument<0>},
      {"aten::fill.Scalar", as_argument<0>},
      {"aten::flip", as_argument<0>},
      {"aten::roll", as_argument<0>},
      {"aten::sort", as_arguments<0>},
      {"aten::native_dropout", as_arguments<0>},
      {"aten::native_dropout_backward", as_argument<0>},

      {"aten::zeros", as_told<0>},
      {"aten::ones", as_told<0>},
      {"aten::full", as_told<0>},
      {"aten::rand", as_told<0>},
      {"aten::randn", as_told<0>},
      {"aten::randint", as_told<1>},
      {"aten::randint.low", as_told<2>},
      {"aten::new_empty", as_told<1>},
      {"aten::new_zeros", as_told<1>},
      {"aten::new_ones", as_told<1>},
      {"aten::new_full", as_told<1>},
      {"aten::new_empty_strided", as_told<1>},
      {"aten::select_backward", as_told<1>},
      {"aten::slice_backward", as_told<1>},
      {"aten::eye", [](const Call& c) { return std::vector<Sizes>{{c.integer(0), c.integer(0)}}; }},
      {"aten::eye.m", [](const Call& c) { return std::vector<Sizes>{{c.integer(0), c.integer(1)}}; }},
      {"aten::scalar_tensor", scalar},
      {"aten::arange", [](const Call& c) { return count_of_range(0, c.integer(0), 1); }},
      {"aten::arange.start",
       [](const Call& c) { return count_of_range(c.integer(0), c.integer(1), 1); }},
      {"aten::arange.start_step",
       [](const Call& c) { return count_of_range(c.integer(0), c.integer(1), c.integer(2)); }},

      {"aten::sum", scalar},
      {"aten::mean", scalar},
      {"aten::prod", scalar},
      {"aten::max", scalar},
      {"aten::min", scalar},
      {"aten::norm.Scalar", scalar},
      {"aten::dot",
       [](const Call& c) {
         TORCH_CHECK(c.rank(0) == 1 && c.sizes(0) == c.sizes(1), "reprise: unequal vectors");
         return std::vector<Sizes>{{}};
       }},
      {"aten::var.correction", variance},
      {"aten::std.correction", variance},
      {"aten::var_mean.correction",
       [](const Call& c) { return std::vector<Sizes>{variance(c)[0], variance(c)[0]}; }},
      {"aten::logsumexp",
       [](const Call& c) {
         return std::vector<Sizes>{reduced(c.sizes(0), c.integers(1), c.flag(2))};
       }},

      {"aten::mv",
       [](const Call& c) {
         TORCH_CHECK(c.rank(0) == 2 && c.rank(1) == 1 && c.size(0, 1) == c.size(1, 0),
                     "reprise: a vector of another length");
         return std::vector<Sizes>{{c.size(0, 0)}};
       }},
      {"aten::embedding",
       [](const Call& c) {
         Sizes sizes = c.sizes(1);
         sizes.push_back(c.size(0, 1));
         return std::vector<Sizes>{sizes};
       }},
      {"aten::embedding_dense_backward",
       [](const Call& c) { return std::vector<Sizes>{{c.integer(2), c.size(0, -1)}}; }},
      {"aten::index_select",
       [](const Call& c) {
         Sizes sizes = c.sizes(0);
         sizes.at(static_cast<size_t>(c10::maybe_wrap_dim(c.integer(1), c.rank(0)))) = c.size(2, 0);
         return std::vector<Sizes>{sizes};
       }},
      {"aten::stack",
       [](const Call& c) {
         const auto items = c.list(0);
         Sizes sizes(items.at(0).toTensor().sizes());
         for (const c10::IValue& item : items) {
           TORCH_CHECK(item.toTensor().sizes() == c10::IntArrayRef(sizes), "reprise: unequal");
         }
         const int64_t dim = c10::maybe_wrap_dim(c.integer(1), static_cast<int64_t>(sizes.size()) + 1);
         sizes.insert(sizes.begin() + dim, static_cast<int64_t>(items.size()));
         return std::vector<Sizes>{sizes};
       }},
      {"aten::constant_pad_nd",
       [](const Call& c) {
         Sizes sizes = c.sizes(0);
         const Sizes pads = c.integers(1);
         TORCH_CHECK(pads.size() % 2 == 0 && pads.size() / 2 <= sizes.size(), "reprise: pads");
         for (size_t k = 0; k < pads.size(); ++k) {
           sizes[sizes.size() - 1 - k / 2] += pads[k];
         }
         return std::vector<Sizes>{sizes};
       }},
      {"aten::repeat",
       [](const Call& c) {
         Sizes sizes = c.sizes(0), repeats = c.integers(1);
         TORCH_CHECK(repeats.size() >= sizes.size(), "reprise: too few repeats");
         const size_t more = repeats.size() - sizes.size();
         for (size_t k = 0; k < sizes.size(); ++k) repeats[more + k] *= sizes[k];
         return std::vector<Sizes>{repeats};
       }},

      {"aten::native_layer_norm",
       [](const Call& c) {
         const Sizes sizes = c.sizes(0);
         Sizes statistics = sizes;
         std::fill(statistics.end() - static_cast<std::ptrdiff_t>(c.integers(1).size()),
                   statistics.end(), 1);
         return std::vector<Sizes>{sizes, statistics, statistics};
       }},
      {"aten::native_layer_norm_backward",
       [](const Call& c) {
         return std::vector<Sizes>{c.sizes(1), c.integers(2), c.integers(2)};
       }},
      {"aten::native_batch_norm",
       [](const Call& c) {
         const Sizes statistics{c.flag(5) ? c.size(0, 1) : 0};
         return std::vector<Sizes>{c.sizes(0), statistics, statistics};
       }},
      {"aten::native_batch_norm_backward",
       [](const Call& c) {
         const Sizes channels{c.size(1, 1)};
         return std::vector<Sizes>{c.sizes(1), channels, channels};
       }},
      // cuDNN's reserve is empty but for some layouts (aten/src/ATen/native/cudnn/BatchNorm.cpp).
      {"aten::cudnn_batch_norm",
       [](const Call& c) {
         const Sizes statistics{c.flag(5) ? c.size(0, 1) : 0};
         return std::vector<Sizes>{c.sizes(0), statistics, statistics, kNoElements};
       }},
      {"aten::cudnn_batch_norm_backward",
       [](const Call& c) { return std::vector<Sizes>{c.sizes(0), c.sizes(2), c.sizes(2)}; }},
      {"aten::native_group_norm",
       [](const Call& c) {
         const Sizes statistics{c.integer(3), c.integer(6)};
         return std::vector<Sizes>{c.sizes(0), statistics, statistics};
       }},
      {"aten::native_group_norm_backward",
       [](const Call& c) {
         const Sizes channels{c.integer(6)};
         return std::vector<Sizes>{c.sizes(1), channels, channels};
       }},
      {"aten::convolution", convolution},
      {"aten::convolution_backward",
       [](const Call& c) {
         return std::vector<Sizes>{c.sizes(1), c.sizes(2), c.is_none(3) ? Sizes() : c.integers(3)};
       }},
      {"aten::_adaptive_avg_pool2d",
       [](const Call& c) {
         Sizes sizes = c.sizes(0);
         const Sizes last = c.integers(1);
         std::copy(last.begin(), last.end(), sizes.end() - static_cast<std::ptrdiff_t>(last.size()));
         return std::vector<Sizes>{sizes};
       }},
      {"aten::_adaptive_avg_pool2d_backward", as_argument<1>},
      {"aten::_scaled_dot_product_flash_attention_for_cpu",
       [](const Call& c) {  // query, key, value
         Sizes out = c.sizes(0), sums = c.sizes(0);
         out.back() = c.size(2, -1);
         sums.pop_back();
         return std::vector<Sizes>{out, sums};
       }},
      {"aten::_scaled_dot_product_flash_attention_for_cpu_backward",
       [](const Call& c) { return std::vector<Sizes>{c.sizes(1), c.sizes(2), c.sizes(3)}; }},
      // query, key, value, bias, compute_log_sumexp: the sums lie in rows of 32
      // (aten/src/ATen/native/transformers/cuda/attention.cu)
      {"aten::_scaled_dot_product_efficient_attention",
       [](const Call& c) {
         Sizes out = c.sizes(0);
         const Sizes sums{out.at(0), out.at(1), c.flag(4) ? (out.at(2) + 31) / 32 * 32 : 0};
         out.back() = c.size(2, -1);
         return std::vector<Sizes>{out, sums, {}, {}};
       }},
      {"aten::_scaled_dot_product_efficient_attention_backward",
       [](const Call& c) {
         return std::vector<Sizes>{c.sizes(1), c.sizes(2), c.sizes(3), c.has(4) ? c.sizes(4) : Sizes()};
       }},
      {"reprise::dropout_mask", as_argument<0>},
  };
  return *table;
}

/// In-place ops of which no other argument is a tensor: whatever its size, it comes back.
bool writes_one_tensor(const c10::FunctionSchema& schema) {
  if (schema.returns().size() != 1 || schema.arguments().empty()) return false;
  const auto* argument = schema.arguments()[0].alias_info();
  const auto* result = schema.returns()[0].alias_info();
  if (argument == nullptr || result == nullptr || !argument->isWrite() || !(*argument == *result)) {
    return false;
  }
  return std::none_of(schema.arguments().begin() + 1, schema.arguments().end(), [](const auto& each) {
    return each.type()->isSubtypeOf(*c10::TensorType::get()) ||
           each.type()->isSubtypeOf(*c10::OptionalType::ofTensor()) ||
           each.type()->isSubtypeOf(*c10::ListType::ofTensors());
  });
}

/// Lists of tensors (of `_foreach_` ops) whose items have the same sizes.
bool lists_fit(c10::ArrayRef<c10::IValue> arguments) {
  const c10::IValue* first = nullptr;
  for (const c10::IValue& value : arguments) {
    if (!value.isTensorList()) continue;
    if (first == nullptr) first = &value;
    const auto a = first->toListRef(), b = value.toListRef();
    const auto same = [](const c10::IValue& x, const c10::IValue& y) {
      return x.toTensor().sizes() == y.toTensor().sizes();
    };
    if (!std::equal(a.begin(), a.end(), b.begin(), b.end(), same)) return false;
  }
  return first != nullptr;
}

/// A new tensor of these sizes that lies as `like` does: densely, with its dimensions in that
/// order. Undefined where that one has gaps or overlaps.
at::Tensor lying_like(const Sizes& sizes, const Result& like) {
  const Geometry& geometry = *like.geometry;
  TORCH_CHECK(sizes.size() == geometry.rank, "reprise: another rank");
  Sizes order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  const auto strides = geometry.strides();
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return strides[static_cast<size_t>(a)] > strides[static_cast<size_t>(b)];
  });
  const auto dense = [&](c10::IntArrayRef of, bool* same) {
    Sizes out(of.size());
    int64_t stride = 1;
    for (size_t k = order.size(); k-- > 0;) {
      const auto dim = static_cast<size_t>(order[k]);
      out[dim] = stride;
      if (same != nullptr && of[dim] > 1) *same = *same && strides[dim] == stride;
      stride *= std::max<int64_t>(of[dim], 1);
    }
    return out;
  };
  bool is_dense = geometry.offset == 0;
  dense(geometry.sizes(), &is_dense);
  if (!is_dense || geometry.conjugate || geometry.negative) return {};
  return at::empty_strided(sizes, dense(sizes, nullptr),
                           at::TensorOptions().dtype(geometry.dtype).device(c10::kMeta));
}

bool ask_rule(Rule rule, const Step& like, torch::jit::Stack& stack) {
  const std::vector<Sizes> sizes = rule(Call(stack));
  torch::jit::Stack results;
  for (size_t k = 0; k < like.results.size(); ++k) {
    const Result& result = like.results[k];
    if (result.kind == Result::Kind::kNone) {
      results.emplace_back(at::Tensor());
      continue;
    }
    if (result.kind != Result::Kind::kNew || k >= sizes.size()) return false;
    const bool empty = sizes[k] == kNoElements;
    if (empty && result.geometry->nbytes() > 0) return false;
    results.emplace_back(lying_like(empty ? Sizes(result.geometry->sizes()) : sizes[k], result));
    if (!results.back().toTensor().defined()) return false;
  }
  stack = std::move(results);
  return true;
}

}  // namespace

void keep_meta_kernels() { (void)meta_kernels(); }

ShapeInference::ShapeInference(const c10::OperatorHandle& op) : op_(op) {
  const auto& name = op.operator_name();
  // An alias as `view` makes it, which autograd is not to know of.
  if (name.name == "aten::_unsafe_view") {
    op_ = c10::Dispatcher::singleton().findSchemaOrThrow("aten::view", "");
  }
  kernel_ = kernel_of(op_.operator_name());
  const auto found = rules().find(name.overload_name.empty()
                                      ? name.name
                                      : name.name + "." + name.overload_name);
  if (kernel_ != nullptr) {
    way_ = Way::kKernel;
  } else if (found != rules().end()) {
    way_ = Way::kRule;
    rule_ = &found->second;
  } else if (name.name == "aten::copy_") {
    way_ = Way::kCopy;
  } else if (writes_one_tensor(op.schema())) {
    way_ = Way::kOneTensor;
  } else if (op.schema().returns().empty()) {
    way_ = Way::kLists;
  }
}

bool ShapeInference::infer(const Step& like, torch::jit::Stack& stack) const {
  switch (way_) {
    case Way::kUnknown:
      return false;
    case Way::kKernel:
      kernel_->callBoxed(op_, c10::DispatchKeySet(c10::DispatchKey::Meta), &stack);
      return true;
    case Way::kRule:
      return ask_rule(*static_cast<const Rule*>(rule_), like, stack);
    case Way::kCopy: {
      const auto sizes = stack[0].toTensor().sizes();
      if (at::infer_size_dimvector(sizes, stack[1].toTensor().sizes()) != Sizes(sizes)) return false;
      stack.resize(1);
      return true;
    }
    case Way::kOneTensor:
      stack.resize(1);
      return true;
    case Way::kLists:
      if (!lists_fit(stack)) return false;
      stack.clear();
      return true;
  }
  return false;
}

}  // namespace reprise
