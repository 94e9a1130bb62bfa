/// \file
/// Composite ops of libtorch that ask a tensor's device type rather than
/// dispatch, and would take a slow or another path for lazy tensors.
///
/// Each gets a kernel at the Lazy keys that makes the backing device's choice and
/// calls the ops that eager would call, so that they are captured and their
/// gradients are eager's.
#include <ATen/Functions.h>
#include <ATen/Context.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/lstm_compositeimplicitautograd_dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "lazy_backend/device.h"
#include "lazy_backend/storage.h"

namespace reprise {
namespace {

/// As `at::native::dropout` chooses (aten/src/ATen/native/Dropout.cpp, 2.11): the
/// fused kernel on CUDA; on CPU a mask of its own.
at::Tensor dropout(const at::Tensor& input, double p, bool train) {
  TORCH_CHECK(p >= 0 && p <= 1, "dropout probability has to be between 0 and 1, but got ", p);
  if (p == 0 || !train || input.numel() == 0) return input;
  if (p == 1) return input.mul(at::zeros({}, input.options()));
  if (backing_device_of(input.device().index()).is_cuda()) {
    return std::get<0>(at::native_dropout(input, p, train));
  }
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
                                        at::ScalarType dtype) {
  if (!mask.has_value() || !mask->defined()) return std::nullopt;
  if (mask->scalar_type() != at::kBool) return mask;
  return at::where(mask->logical_not(), -std::numeric_limits<double>::infinity(),
                   at::scalar_tensor(0.0, at::TensorOptions().dtype(dtype).device(mask->device())));
}

at::Tensor scaled_dot_product_attention(const at::Tensor& query, const at::Tensor& key,
                                        const at::Tensor& value,
                                        const std::optional<at::Tensor>& mask, double dropout_p,
                                        bool is_causal, std::optional<double> scale,
                                        bool enable_gqa) {
  enum Choice : int64_t { kMath = 0, kFlash = 1, kEfficient = 2, kCudnn = 3 };
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
  const auto additive = additive_mask(mask, query.scalar_type());
  const bool cpu = backing_device_of(query.device().index()).is_cpu();
  if (choice == kFlash && cpu) {
    return std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, additive, scale));
  }
  const bool needs_grad = at::GradMode::is_enabled() &&
                          (query.requires_grad() || key.requires_grad() || value.requires_grad());
  if (choice == kFlash && query.size(-1) % 8 == 0) {
    return std::get<0>(at::_scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, /*return_debug_mask=*/false,
        scale.has_value() ? *scale : 1.0 / std::sqrt(static_cast<double>(query.size(-1)))));
  }
  if (choice == kEfficient && !additive.has_value()) {
    return std::get<0>(at::_scaled_dot_product_efficient_attention(
        query, key, value, additive, needs_grad, dropout_p, is_causal, scale));
  }
  // Eager's math path keeps the boolean mask; so does ours.
  return std::get<0>(at::_scaled_dot_product_attention_math(
      query, key, value, additive, dropout_p, is_causal, std::nullopt, scale, enable_gqa));
}

/// oneDNN's LSTM, layer by layer, where eager takes it on the CPU (`use_mkldnn` in
/// aten/src/ATen/native/RNN.cpp and `mkldnn_rnn` in native/mkldnn/RNN.cpp, 2.11).
std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm(const at::Tensor& input, at::TensorList hx,
                                                    at::TensorList params, bool has_biases,
                                                    int64_t num_layers, double dropout_p,
                                                    bool train, bool bidirectional,
                                                    bool batch_first) {
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
  constexpr int64_t kLstm = 2;  // ideep::rnn_kind::LSTM
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
          /*reverse=*/direction > 0, /*batch_sizes=*/{}, kLstm, hidden_size, num_layers,
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

void register_composites(torch::Library& m) {
  m.impl("dropout", dropout);
  m.impl("dropout_", dropout_);
  m.impl("lstm.input", lstm);
  m.impl("scaled_dot_product_attention", scaled_dot_product_attention);
}

// Under autograd, and where autograd is off (inference mode).
TORCH_LIBRARY_IMPL(aten, AutogradLazy, m) { register_composites(m); }
TORCH_LIBRARY_IMPL(aten, Lazy, m) {
  register_composites(m);
  m.impl("_efficientzerotensor", efficient_zero_tensor);
}

}  // namespace
}  // namespace reprise
