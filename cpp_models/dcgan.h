/// Deep convolutional generative adversarial network: a generator that turns noise
/// into images and a discriminator that tells them from real ones, after Radford,
/// Metz and Chintala, "Unsupervised Representation Learning with Deep Convolutional
/// Generative Adversarial Networks" (2015).
#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace cpp_models {

struct DcganOptions {
  int64_t image_size = 32;  ///< Height and width: a power of two, at least 8.
  int64_t channels = 1;
  int64_t latent = 64;      ///< Length of a noise vector.
  int64_t width = 16;       ///< Channels at half the image's resolution.
};

class DcganGeneratorImpl : public torch::nn::Module {
 public:
  /// Throws c10::Error for an image size that is no power of two or below 8.
  explicit DcganGeneratorImpl(const DcganOptions& options);

  /// `noise`: [batch, latent], standard normal.
  /// Returns images [batch, channels, image_size, image_size] in (-1, 1).
  torch::Tensor forward(const torch::Tensor& noise);

 private:
  torch::nn::Sequential layers_{nullptr};
};

TORCH_MODULE(DcganGenerator);

class DcganDiscriminatorImpl : public torch::nn::Module {
 public:
  /// Throws c10::Error for an image size that is no power of two or below 8.
  explicit DcganDiscriminatorImpl(const DcganOptions& options);

  /// `images`: [batch, channels, image_size, image_size] in [-1, 1].
  /// Returns the logit of each being real, [batch].
  torch::Tensor forward(const torch::Tensor& images);

 private:
  torch::nn::Sequential layers_{nullptr};
};

TORCH_MODULE(DcganDiscriminator);

}  // namespace cpp_models
