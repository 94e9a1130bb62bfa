/// Runs what export_gpt has written, with libtorch alone: `plain_libtorch_runner PATH`.
/// Prints the text that it generates, then the tokens and the largest difference of a logit
/// from those of the exporting program.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <iostream>

int main(int argc, char** argv) try {
  if (argc != 2) {
    std::cerr << "usage: plain_libtorch_runner PATH\n";
    return 2;
  }
  const std::string path = argv[1];
  std::vector<torch::Tensor> expected;  // prompt, tokens, logits, characters
  torch::load(expected, path + ".expected");
  torch::inductor::AOTIModelPackageLoader package(path);
  const auto metadata = package.get_metadata();
  const torch::Device device(metadata.at("AOTI_DEVICE_KEY"));

  torch::NoGradGuard no_grad;
  auto tokens = expected[0];
  double largest = 0;
  const int64_t length = expected[1].size(1) - tokens.size(1);
  for (int64_t k = 0; k < length; ++k) {
    const auto logits = package.run({tokens.to(device)}).at(0).select(/*dim=*/1, -1).cpu();
    largest = std::max(largest, (logits - expected[2].slice(0, k, k + 1)).abs().max().item<double>());
    tokens = torch::cat({tokens, logits.argmax(-1, /*keepdim=*/true)}, 1);
  }
  for (int64_t k = 0; k < tokens.size(1); ++k) {
    std::cout << static_cast<char>(expected[3][tokens[0][k]].item<int64_t>());
  }
  std::cout << '\n';
  for (int64_t k = 0; k < tokens.size(1); ++k) std::cout << tokens[0][k].item<int64_t>() << ' ';
  std::cout << (torch::equal(tokens, expected[1]) ? "the same tokens" : "other tokens")
            << ", largest difference " << largest << std::endl;
  return 0;
} catch (const std::exception& error) {
  std::cerr << "plain_libtorch_runner: " << error.what() << '\n';
  return 1;
}
