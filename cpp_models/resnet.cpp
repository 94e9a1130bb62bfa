#include "cpp_models/resnet.h"

namespace cpp_models {

namespace nn = torch::nn;

namespace {

constexpr int kStages = 3;
constexpr int kLayersPerBlock = 2;

/// A convolution that batch normalisation follows, so without a bias.
nn::Conv2d convolution(int64_t in, int64_t out, int64_t kernel, int64_t stride) {
  nn::Conv2d conv(
      nn::Conv2dOptions(in, out, kernel).stride(stride).padding(kernel / 2).bias(false));
  nn::init::kaiming_normal_(conv->weight, 0.0, torch::kFanOut, torch::kReLU);
  return conv;
}

}  // namespace

ResidualBlockImpl::ResidualBlockImpl(int64_t in_channels, int64_t out_channels, int64_t stride) {
  conv1_ = register_module("conv1", convolution(in_channels, out_channels, 3, stride));
  norm1_ = register_module("norm1", nn::BatchNorm2d(out_channels));
  conv2_ = register_module("conv2", convolution(out_channels, out_channels, 3, 1));
  norm2_ = register_module("norm2", nn::BatchNorm2d(out_channels));
  if (stride != 1 || in_channels != out_channels) {
    shortcut_conv_ =
        register_module("shortcut_conv", convolution(in_channels, out_channels, 1, stride));
    shortcut_norm_ = register_module("shortcut_norm", nn::BatchNorm2d(out_channels));
  }
}

torch::Tensor ResidualBlockImpl::forward(const torch::Tensor& x) {
  auto residual = torch::relu(norm1_(conv1_(x)));
  residual = norm2_(conv2_(residual));
  const auto shortcut = shortcut_conv_ ? shortcut_norm_(shortcut_conv_(x)) : x;
  return torch::relu(residual + shortcut);
}

ResNetImpl::ResNetImpl(const ResNetOptions& options) {
  constexpr int64_t kLayersPerUnit = kStages * kLayersPerBlock;
  TORCH_CHECK(
      options.depth > 2 && (options.depth - 2) % kLayersPerUnit == 0,
      "ResNet: expected a depth of 6n + 2 (8, 14, 20, 32, 44, 56, 110), got ",
      options.depth);
  const int64_t blocks_per_stage = (options.depth - 2) / kLayersPerUnit;

  stem_ = register_module("stem", convolution(options.channels, options.width, 3, 1));
  stem_norm_ = register_module("stem_norm", nn::BatchNorm2d(options.width));
  blocks_ = register_module("blocks", nn::Sequential());
  int64_t channels = options.width;
  for (int stage = 0; stage < kStages; ++stage) {
    const int64_t out_channels = options.width << stage;
    for (int64_t block = 0; block < blocks_per_stage; ++block) {
      const int64_t stride = stage > 0 && block == 0 ? 2 : 1;
      blocks_->push_back(ResidualBlock(channels, out_channels, stride));
      channels = out_channels;
    }
  }
  classifier_ = register_module("classifier", nn::Linear(channels, options.classes));
}

torch::Tensor ResNetImpl::forward(const torch::Tensor& images) {
  auto features = torch::relu(stem_norm_(stem_(images)));
  features = blocks_->forward(features);
  return classifier_(features.mean({2, 3}));
}

}  // namespace cpp_models
