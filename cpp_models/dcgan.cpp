#include "cpp_models/dcgan.h"

namespace cpp_models {

namespace nn = torch::nn;

namespace {

constexpr int64_t kSeedSize = 4;  // Resolution of the generator's first feature map.
constexpr double kLeak = 0.2;
constexpr double kInitialDeviation = 0.02;

/// Channels of the 4×4 feature map: each halving of the resolution doubles them.
int64_t deepest_channels(const DcganOptions& options) {
  const int64_t size = options.image_size;
  TORCH_CHECK(
      size >= 2 * kSeedSize && (size & (size - 1)) == 0,
      "Dcgan: expected an image size that is a power of two and at least 8, got ", size);
  return options.width * size / (2 * kSeedSize);
}

nn::ConvTranspose2d upsample(int64_t in, int64_t out) {
  return nn::ConvTranspose2d(
      nn::ConvTranspose2dOptions(in, out, 4).stride(2).padding(1).bias(false));
}

nn::Conv2d downsample(int64_t in, int64_t out) {
  return nn::Conv2d(nn::Conv2dOptions(in, out, 4).stride(2).padding(1).bias(false));
}

nn::LeakyReLU leaky_relu() {
  return nn::LeakyReLU(nn::LeakyReLUOptions().negative_slope(kLeak));
}

/// The paper's section 4: weights from N(0, 0.02), scales of the norms around one.
void initialize(nn::Module& module) {
  torch::NoGradGuard no_grad;
  if (auto* conv = module.as<nn::Conv2d>()) {
    conv->weight.normal_(0.0, kInitialDeviation);
  } else if (auto* transposed = module.as<nn::ConvTranspose2d>()) {
    transposed->weight.normal_(0.0, kInitialDeviation);
  } else if (auto* norm = module.as<nn::BatchNorm2d>()) {
    norm->weight.normal_(1.0, kInitialDeviation);
    norm->bias.zero_();
  }
}

}  // namespace

DcganGeneratorImpl::DcganGeneratorImpl(const DcganOptions& options) {
  layers_ = register_module("layers", nn::Sequential());
  int64_t channels = deepest_channels(options);
  layers_->push_back(nn::ConvTranspose2d(
      nn::ConvTranspose2dOptions(options.latent, channels, kSeedSize).bias(false)));
  layers_->push_back(nn::BatchNorm2d(channels));
  layers_->push_back(nn::ReLU());
  for (; channels > options.width; channels /= 2) {
    layers_->push_back(upsample(channels, channels / 2));
    layers_->push_back(nn::BatchNorm2d(channels / 2));
    layers_->push_back(nn::ReLU());
  }
  layers_->push_back(upsample(channels, options.channels));
  layers_->push_back(nn::Tanh());
  apply(initialize);
}

torch::Tensor DcganGeneratorImpl::forward(const torch::Tensor& noise) {
  return layers_->forward(noise.unsqueeze(-1).unsqueeze(-1));
}

DcganDiscriminatorImpl::DcganDiscriminatorImpl(const DcganOptions& options) {
  layers_ = register_module("layers", nn::Sequential());
  const int64_t deepest = deepest_channels(options);
  layers_->push_back(downsample(options.channels, options.width));
  layers_->push_back(leaky_relu());
  for (int64_t channels = options.width; channels < deepest; channels *= 2) {
    layers_->push_back(downsample(channels, 2 * channels));
    layers_->push_back(nn::BatchNorm2d(2 * channels));
    layers_->push_back(leaky_relu());
  }
  layers_->push_back(nn::Conv2d(nn::Conv2dOptions(deepest, 1, kSeedSize).bias(false)));
  apply(initialize);
}

torch::Tensor DcganDiscriminatorImpl::forward(const torch::Tensor& images) {
  return layers_->forward(images).flatten();
}

}  // namespace cpp_models
