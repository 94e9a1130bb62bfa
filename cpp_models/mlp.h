/// Multilayer perceptron: linear layers with ReLU between them.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <vector>

namespace cpp_models {

struct MlpOptions {
  int64_t inputs = 64;
  std::vector<int64_t> hidden = {256, 256};
  int64_t outputs = 10;
  double dropout = 0.0;  ///< Probability of zeroing a hidden activation in training.
};

class MlpImpl : public torch::nn::Module {
 public:
  explicit MlpImpl(const MlpOptions& options);

  /// `x`: [batch, ...], flattened to [batch, inputs]. Returns logits [batch, outputs].
  torch::Tensor forward(const torch::Tensor& x);

 private:
  torch::nn::Sequential layers_{nullptr};
};

TORCH_MODULE(Mlp);

}  // namespace cpp_models
