/// Trains a DCGAN to draw handwritten digits.
#include "cpp_models/dcgan.h"
#include "digits.h"
#include "program.h"

#include <fstream>

namespace {

namespace F = torch::nn::functional;

/// Scales the digits to the size and the range of the generator's images.
torch::Tensor real_images(const examples::Digits& digits, int64_t size) {
  const auto enlarged = F::interpolate(
      digits.images,
      F::InterpolateFuncOptions()
          .size(std::vector<int64_t>{size, size})
          .mode(torch::kBilinear)
          .align_corners(false));
  return enlarged * 2 - 1;
}

/// How far logits are from calling every image real, or every image generated.
torch::Tensor verdict_loss(const torch::Tensor& logits, bool real) {
  const auto wanted = real ? torch::ones_like(logits) : torch::zeros_like(logits);
  return F::binary_cross_entropy_with_logits(logits, wanted);
}

/// Writes images [count, 1, size, size] in [-1, 1] in a row, as a portable graymap.
void write_images(const torch::Tensor& images, const std::string& path) {
  const auto row = torch::cat(images.squeeze(1).unbind(0), /*dim=*/1);
  const auto pixels = ((row + 1) * 127.5).clamp(0, 255).to(torch::kCPU, torch::kUInt8).contiguous();
  std::ofstream file(path, std::ios::binary);
  file << "P5\n" << pixels.size(1) << ' ' << pixels.size(0) << "\n255\n";
  file.write(static_cast<const char*>(pixels.const_data_ptr()), pixels.numel());
  TORCH_CHECK(file.flush(), "cannot write images to ", path);
}

void run(int argc, char** argv) {
  cpp_models::DcganOptions options;
  int64_t batch = 32;
  double learning_rate = 5e-4;
  std::string images_path;
  examples::Program program(
      "train_gan", "Trains a DCGAN, two networks with an Adam each, on handwritten digits.", 400);
  program.option("batch", batch, "Images in a step.");
  program.option("size", options.image_size, "Height and width of an image, a power of two.");
  program.option("width", options.width, "Channels of the outermost layers.");
  program.option("learning-rate", learning_rate, "Learning rate of both networks.");
  program.option("images", images_path, "File to write generated images to, as PGM.");
  program.parse(argc, argv);

  const auto device = program.device();
  const auto real = real_images(examples::load_digits(program.data_folder()), options.image_size);
  examples::BatchSampler sampler(real.size(0), batch);
  cpp_models::DcganGenerator generator(options);
  cpp_models::DcganDiscriminator discriminator(options);
  generator->to(device);
  discriminator->to(device);
  const auto adam = torch::optim::AdamOptions(learning_rate).betas({0.5, 0.999});
  torch::optim::Adam generator_optimizer(generator->parameters(), adam);
  torch::optim::Adam discriminator_optimizer(discriminator->parameters(), adam);
  const auto noise = [&](int64_t count) {
    return torch::randn({count, options.latent}, torch::device(device));
  };

  while (program.next_step()) {
    const auto images = real.index_select(0, sampler.next()).to(device);
    const auto generated = generator->forward(noise(batch));

    discriminator_optimizer.zero_grad();
    const auto discriminator_loss = verdict_loss(discriminator->forward(images), true) +
        verdict_loss(discriminator->forward(generated.detach()), false);
    discriminator_loss.backward();
    discriminator_optimizer.step();

    generator_optimizer.zero_grad();
    const auto generator_loss = verdict_loss(discriminator->forward(generated), true);
    generator_loss.backward();
    generator_optimizer.step();

    if (program.log_due()) {
      program.log(
          {{"discriminator_loss", discriminator_loss.item<double>()},
           {"generator_loss", generator_loss.item<double>()}});
    }
  }
  program.finish();
  if (!images_path.empty()) {
    torch::NoGradGuard no_grad;
    generator->eval();
    write_images(generator->forward(noise(16)), images_path);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return examples::guarded([&] { run(argc, argv); });
}
