#include "cpp_models/mlp.h"

namespace cpp_models {

namespace nn = torch::nn;

MlpImpl::MlpImpl(const MlpOptions& options) {
  layers_ = register_module("layers", nn::Sequential());
  int64_t width = options.inputs;
  for (const int64_t next : options.hidden) {
    layers_->push_back(nn::Linear(width, next));
    layers_->push_back(nn::ReLU());
    if (options.dropout > 0) {
      layers_->push_back(nn::Dropout(options.dropout));
    }
    width = next;
  }
  layers_->push_back(nn::Linear(width, options.outputs));
}

torch::Tensor MlpImpl::forward(const torch::Tensor& x) {
  return layers_->forward(x.flatten(1));
}

}  // namespace cpp_models
