/// Residual network for small images, after He et al., "Deep Residual Learning
/// for Image Recognition" (2015), section 4.2: a 3×3 stem and three stages of
/// basic blocks, each stage with half the resolution and twice the channels of
/// the one before, then global average pooling and a linear classifier.
#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace cpp_models {

struct ResNetOptions {
  int64_t channels = 3;  ///< Channels of the images.
  int64_t classes = 10;
  int64_t depth = 20;    ///< Weighted layers, 6n + 2: 8, 14, 20, 32, 44, 56, 110.
  int64_t width = 16;    ///< Channels of the first stage.
};

/// Two 3×3 convolutions with batch normalisation and a shortcut around them. The
/// shortcut is a 1×1 convolution where the shape changes (option B in the paper).
class ResidualBlockImpl : public torch::nn::Module {
 public:
  ResidualBlockImpl(int64_t in_channels, int64_t out_channels, int64_t stride);

  /// `x`: [batch, in_channels, h, w]. Returns [batch, out_channels, ⌈h/stride⌉, ⌈w/stride⌉].
  torch::Tensor forward(const torch::Tensor& x);

 private:
  torch::nn::Conv2d conv1_{nullptr}, conv2_{nullptr}, shortcut_conv_{nullptr};
  torch::nn::BatchNorm2d norm1_{nullptr}, norm2_{nullptr}, shortcut_norm_{nullptr};
};

TORCH_MODULE(ResidualBlock);

class ResNetImpl : public torch::nn::Module {
 public:
  /// Throws c10::Error unless `options.depth` is 6n + 2.
  explicit ResNetImpl(const ResNetOptions& options);

  /// `images`: [batch, channels, h, w], of any size; 32×32 in the paper.
  /// Returns logits [batch, classes].
  torch::Tensor forward(const torch::Tensor& images);

 private:
  torch::nn::Conv2d stem_{nullptr};
  torch::nn::BatchNorm2d stem_norm_{nullptr};
  torch::nn::Sequential blocks_{nullptr};
  torch::nn::Linear classifier_{nullptr};
};

TORCH_MODULE(ResNet);

}  // namespace cpp_models
