/// \file
/// Composite ops of libtorch that ask a tensor's device type rather than
/// dispatch, and would take a slow or another path for lazy tensors.
///
/// Each gets a kernel at the Lazy keys that makes the backing device's choice and
/// calls the ops that eager would call, so that they are captured and their
/// gradients are eager's.
#include <ATen/Functions.h>
#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Normalization.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/batch_norm_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/gru_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/lstm_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/rnn_relu_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/rnn_tanh_compositeimplicitautograd_dispatch.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "lazy_backend/device.h"
#include "lazy_backend/storage.h"

namespace reprise {
namespace {

/// The mask that CUDA's fused kernel draws for a tensor that lies as `like`. The numbers
/// follow from the geometry alone, so they can be drawn before a program runs.
at::Tensor dropout_mask(const at::Tensor& like, double p) {
  const auto zeros = at::empty_strided(like.sizes(), like.strides(), like.options()).zero_();
  return std::get<1>(at::native_dropout(zeros, p, /*train=*/true));
}

at::Tensor draw_mask(const at::Tensor& like, double p) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reprise::dropout_mask", "")
                             .typed<at::Tensor(const at::Tensor&, double)>();
  const at::AutoDispatchBelowADInplaceOrView no_gradient;
  return op.call(like, p);
}

/// As `at::native::dropout` chooses (aten/src/ATen/native/Dropout.cpp, 2.11): on CUDA the
/// fused kernel, whose products these are (native/cuda/Dropout.cu); on CPU a mask of its own.
at::Tensor dropout(const at::Tensor& input, double p, bool train) {
  TORCH_CHECK(p >= 0 && p <= 1, "dropout probability has to be between 0 and 1, but got ", p);
  if (p == 0 || !train || input.numel() == 0) return input;
  if (p == 1) return input.mul(at::zeros({}, input.options()));
  const bool fused = backing_device_of(input.device().index()).is_cuda() &&
                     c10::isFloatingType(input.scalar_type());
  if (fused) return input.mul(draw_mask(input, p)).mul(1 / (1 - p));
  at::Tensor noise = at::empty_like(input);
  noise.bernoulli_(1 - p);
  noise.div_(1 - p);
  return input.mul(noise);
}

at::Tensor& dropout_(at::Tensor& input, double p, bool train) {
  TORCH_CHECK(p >= 0 && p <= 1, "dropout probability has to be between 0 and 1, but got ", p);
  if (p == 0 || !train || input.numel() == 0) return input;
  if (p == 1) return input.mul_(at::zeros({}, input.options()));
  at::Tensor noise = at::empty_like(input);
  noise.bernoulli_(1 - p);
  noise.div_(1 - p);
  return input.mul_(noise);
}

/// A boolean mask as the additive one that the kernels take
/// (`convert_boolean_attn_mask`, transformers/attention.cpp, 2.11).
std::optional<at::Tensor> additive_mask(const std::optional<at::Tensor>& mask,
                                        at::ScalarType dtype, double hidden) {
  if (!mask.has_value() || !mask->defined()) return std::nullopt;
  if (mask->scalar_type() != at::kBool) return mask;
  return at::where(mask->logical_not(), hidden,
                   at::scalar_tensor(0.0, at::TensorOptions().dtype(dtype).device(mask->device())));
}

/// A mask as the memory-efficient kernel wants it: of all dimensions, with rows that begin at
/// multiples of 16 elements (`preprocess_mask`, transformers/attention.cpp, 2.11).
at::Tensor for_efficient_attention(const at::Tensor& mask, const at::Tensor& query,
                                   const at::Tensor& key) {
  constexpr int64_t kMultiple = 16;
  const at::Tensor all =
      mask.expand({query.size(0), query.size(1), query.size(2), key.size(2)});
  const int64_t rest = all.size(-1) % kMultiple;
  if (rest != 0) return at::pad(all, {0, kMultiple - rest}).slice(-1, 0, all.size(-1));
  const bool aligned = std::all_of(all.strides().begin(), all.strides().end() - 1,
                                   [](int64_t stride) { return stride % kMultiple == 0; });
  return aligned ? all : all.contiguous();
}

at::Tensor scaled_dot_product_attention(const at::Tensor& query, const at::Tensor& key,
                                        const at::Tensor& value,
                                        const std::optional<at::Tensor>& mask, double dropout_p,
                                        bool is_causal, std::optional<double> scale,
                                        bool enable_gqa) {
  enum Choice : int64_t { kMath = 0, kFlash = 1, kEfficient = 2, kCudnn = 3 };  // sdp::SDPBackend
  const bool ready = is_lazy(query) && is_lazy(key) && is_lazy(value) && query.dim() >= 3 &&
                     key.dim() >= 3 && value.dim() >= 3;
  int64_t choice = kMath;
  if (ready) {
    std::optional<at::Tensor> asked;
    if (mask.has_value() && mask->defined()) {
      asked = is_lazy(*mask) ? stand_in(*mask) : *mask;
      if (asked->scalar_type() == at::kBool) {
        asked = stand_in(at::empty(mask->sizes(), query.options()));
      }
    }
    choice = at::_fused_sdp_choice(stand_in(query), stand_in(key), stand_in(value), asked,
                                   dropout_p, is_causal, scale, enable_gqa);
  }
  // cuDNN has no infinity.
  const double hidden = choice == kCudnn ? -65504.0 : -std::numeric_limits<double>::infinity();
  auto additive = additive_mask(mask, query.scalar_type(), hidden);
  const bool cpu = backing_device_of(query.device().index()).is_cpu();
  if (choice == kFlash && cpu) {
    return std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, additive, scale));
  }
  const bool needs_grad = at::GradMode::is_enabled() &&
                          (query.requires_grad() || key.requires_grad() || value.requires_grad());
  if (choice == kFlash) {
    const int64_t width = query.size(-1);
    const auto padded = [](const at::Tensor& x) {
      constexpr int64_t kMultiple = 8;
      const int64_t rest = x.size(-1) % kMultiple;
      return rest == 0 ? x : at::pad(x, {0, kMultiple - rest});
    };
    const at::Tensor out = std::get<0>(at::_scaled_dot_product_flash_attention(
        padded(query), padded(key), padded(value), dropout_p, is_causal,
        /*return_debug_mask=*/false,
        scale.has_value() ? *scale : 1.0 / std::sqrt(static_cast<double>(width))));
    return out.size(-1) == width ? out : out.slice(-1, 0, width);
  }
  if (choice == kCudnn) {
    return std::get<0>(at::_scaled_dot_product_cudnn_attention(
        query, key, value, additive, needs_grad, dropout_p, is_causal,
        /*return_debug_mask=*/false, scale));
  }
  if (choice == kEfficient) {
    if (additive.has_value()) additive = for_efficient_attention(*additive, query, key);
    return std::get<0>(at::_scaled_dot_product_efficient_attention(
        query, key, value, additive, needs_grad, dropout_p, is_causal, scale));
  }
  // Eager's math path keeps the boolean mask; so does ours.
  return std::get<0>(at::_scaled_dot_product_attention_math(
      query, key, value, additive, dropout_p, is_causal, std::nullopt, scale, enable_gqa));
}

/// cuDNN's batch norm where eager takes it (`_batch_norm_impl_index`, native/Normalization.cpp,
/// 2.11). What a program makes of it is Inductor's own.
at::Tensor batch_norm(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& mean,
                      const std::optional<at::Tensor>& variance, bool training, double momentum,
                      double eps, bool cudnn_enabled) {
  const auto asked = [](const std::optional<at::Tensor>& tensor) {
    if (!tensor.has_value() || !tensor->defined()) return at::Tensor();
    return is_lazy(*tensor) ? stand_in(*tensor) : *tensor;
  };
  const bool on_gpu =
      is_lazy(input) && input.numel() > 0 && backing_device_of(input.device().index()).is_cuda();
  const bool by_cudnn = on_gpu && at::native::_select_batch_norm_backend(
                                      asked(input), asked(weight), asked(bias), asked(mean),
                                      asked(variance), training, eps) ==
                                      at::native::BatchNormBackend::Cudnn;
  if (!by_cudnn) {
    return at::compositeimplicitautograd::batch_norm(input, weight, bias, mean, variance, training,
                                                     momentum, eps, cudnn_enabled);
  }
  const auto contiguous = [](const std::optional<at::Tensor>& tensor) {
    return tensor.has_value() && tensor->defined() ? std::optional(tensor->contiguous())
                                                   : std::nullopt;
  };
  return std::get<0>(at::cudnn_batch_norm(
      input.contiguous(input.suggest_memory_format()), weight->contiguous(), contiguous(bias),
      contiguous(mean), contiguous(variance), training, momentum, eps));
}

/// cuDNN's recurrent layers where eager takes them (`_cudnn_impl`, native/cudnn/RNN.cpp, 2.11);
/// not with dropout between them, whose state libtorch keeps to itself.
bool by_cudnn(const at::Tensor& input, const at::Tensor& state, at::TensorList params,
              double dropout_p, bool train) {
  return (dropout_p == 0 || !train) && is_lazy(input) && is_lazy(state) &&
         std::all_of(params.begin(), params.end(),
                     [](const at::Tensor& tensor) { return is_lazy(tensor); }) &&
         backing_device_of(input.device().index()).is_cuda() &&
         at::cudnn_is_acceptable(stand_in(input));
}

enum CudnnMode : int64_t { kRelu = 0, kTanh = 1, kLstm = 2, kGru = 3 };  // cudnnRNNMode_t

/// What libtorch warns of at each call, that the weights are no single chunk of memory, can
/// not be changed from a lazy module.
class NoWarnings final : public c10::WarningHandler {
 public:
  void process(const c10::Warning&) override {}
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> cudnn_rnn(
    CudnnMode mode, const at::Tensor& input, const at::Tensor& hx,
    const std::optional<at::Tensor>& cx, at::TensorList params, bool has_biases,
    int64_t num_layers, double dropout_p, bool train, bool bidirectional, bool batch_first) {
  const int64_t hidden_size = cx.has_value() ? cx->size(2) : hx.size(2);
  const int64_t proj_size = hx.size(2) == hidden_size ? 0 : hx.size(2);
  NoWarnings none;
  const c10::WarningUtils::WarningHandlerGuard quiet(&none);
  auto [output, hy, cy, reserve, weights] = at::_cudnn_rnn(
      input, params, has_biases ? 4 : 2, std::nullopt, hx, cx, mode, hidden_size, proj_size,
      num_layers, batch_first, dropout_p, train, bidirectional, at::IntArrayRef{},
      /*dropout_state=*/std::nullopt);
  return {output, hy, cy};
}

template <CudnnMode kMode, auto kComposite>
std::tuple<at::Tensor, at::Tensor> recurrent(const at::Tensor& input, const at::Tensor& hx,
                                             at::TensorList params, bool has_biases,
                                             int64_t num_layers, double dropout_p, bool train,
                                             bool bidirectional, bool batch_first) {
  if (!by_cudnn(input, hx, params, dropout_p, train)) {
    return kComposite(input, hx, params, has_biases, num_layers, dropout_p, train, bidirectional,
                      batch_first);
  }
  auto [output, hy, cy] = cudnn_rnn(kMode, input, hx, std::nullopt, params, has_biases, num_layers,
                                    dropout_p, train, bidirectional, batch_first);
  return {output, hy};
}

/// oneDNN's LSTM, layer by layer, where eager takes it on the CPU (`use_mkldnn` in
/// aten/src/ATen/native/RNN.cpp and `mkldnn_rnn` in native/mkldnn/RNN.cpp, 2.11).
std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm(const at::Tensor& input, at::TensorList hx,
                                                    at::TensorList params, bool has_biases,
                                                    int64_t num_layers, double dropout_p,
                                                    bool train, bool bidirectional,
                                                    bool batch_first) {
  if (hx.size() == 2 && is_lazy(hx[1]) && by_cudnn(input, hx[0], params, dropout_p, train)) {
    return cudnn_rnn(kLstm, input, hx[0], hx[1], params, has_biases, num_layers, dropout_p, train,
                     bidirectional, batch_first);
  }
  const auto all_lazy = [](at::TensorList tensors) {
    return std::all_of(tensors.begin(), tensors.end(),
                       [](const at::Tensor& tensor) { return is_lazy(tensor); });
  };
  const bool fused = at::globalContext().userEnabledMkldnn() && at::hasMKLDNN() &&
                     is_lazy(input) && all_lazy(params) && all_lazy(hx) && hx.size() == 2 &&
                     backing_device_of(input.device().index()).is_cpu() &&
                     input.scalar_type() == at::kFloat && input.numel() != 0 &&
                     hx[0].size(2) == hx[1].size(2);
  if (!fused) {
    return at::compositeimplicitautograd::lstm(input, hx, params, has_biases, num_layers,
                                               dropout_p, train, bidirectional, batch_first);
  }
  constexpr int64_t kMode = 2;  // ideep::rnn_kind::LSTM
  const int64_t hidden_size = hx[0].size(2);
  const size_t stride = has_biases ? 4 : 2;
  const int64_t directions = bidirectional ? 2 : 1;
  at::Tensor layer_input = (batch_first ? input.transpose(0, 1) : input).contiguous();
  const at::Tensor h = hx[0].contiguous(), c = hx[1].contiguous();
  std::vector<at::Tensor> last_h, last_c;
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    std::vector<at::Tensor> outputs;
    for (int64_t direction = 0; direction < directions; ++direction) {
      const int64_t index = layer * directions + direction;
      const at::Tensor* weights = &params[static_cast<size_t>(index) * stride];
      const auto bias = [&](size_t k) {
        return has_biases ? weights[2 + k]
                          : at::zeros(weights[k].sizes(), weights[k].options());
      };
      auto [output, next_h, next_c, workspace] = at::mkldnn_rnn_layer(
          layer_input, weights[0], weights[1], bias(0), bias(1), h[index], c[index],
          /*reverse=*/direction > 0, /*batch_sizes=*/{}, kMode, hidden_size, num_layers,
          has_biases, bidirectional, batch_first, train);
      outputs.push_back(output);
      last_h.push_back(next_h);
      last_c.push_back(next_c);
    }
    layer_input = directions == 1 ? outputs[0] : at::cat(outputs, -1);
    if (dropout_p != 0 && train && layer < num_layers - 1) {
      layer_input = at::dropout(layer_input, dropout_p, /*train=*/true);
    }
  }
  return {batch_first ? layer_input.transpose(0, 1) : layer_input, at::stack(last_h, 0),
          at::stack(last_c, 0)};
}

/// Zeros that have no storage, which derivatives return for what does not depend on
/// an input. A trace holds storages: these are zeros with one.
at::Tensor efficient_zero_tensor(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
                                 std::optional<at::Layout> layout,
                                 std::optional<at::Device> device,
                                 std::optional<bool> pin_memory) {
  return at::zeros_symint(size, dtype, layout, device, pin_memory);
}

using Recurrent = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                     at::TensorList, bool, int64_t, double, bool,
                                                     bool, bool);

void register_composites(torch::Library& m) {
  m.impl("batch_norm", batch_norm);
  m.impl("dropout", dropout);
  m.impl("dropout_", dropout_);
  m.impl("lstm.input", lstm);
  m.impl("gru.input", recurrent<kGru, static_cast<Recurrent*>(at::compositeimplicitautograd::gru)>);
  m.impl("rnn_tanh.input",
         recurrent<kTanh, static_cast<Recurrent*>(at::compositeimplicitautograd::rnn_tanh)>);
  m.impl("rnn_relu.input",
         recurrent<kRelu, static_cast<Recurrent*>(at::compositeimplicitautograd::rnn_relu)>);
  m.impl("scaled_dot_product_attention", scaled_dot_product_attention);
}

// Under autograd, and where autograd is off (inference mode).
TORCH_LIBRARY_IMPL(aten, AutogradLazy, m) { register_composites(m); }
TORCH_LIBRARY_IMPL(aten, Lazy, m) {
  register_composites(m);
  m.impl("_efficientzerotensor", efficient_zero_tensor);
}
TORCH_LIBRARY_FRAGMENT(reprise, m) { m.def("dropout_mask(Tensor like, float p) -> Tensor"); }
TORCH_LIBRARY_IMPL(reprise, CUDA, m) { m.impl("dropout_mask", dropout_mask); }
TORCH_LIBRARY_IMPL(reprise, Meta, m) {
  m.impl("dropout_mask", [](const at::Tensor& like, double) {
    return at::empty_like(like, like.options().dtype(at::kBool));
  });
}

}  // namespace
}  // namespace reprise
