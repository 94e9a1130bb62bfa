// A program as people have it: it names nothing of Reprise, and is linked with it.
//
//     plain_program train STEPS [MILLISECONDS EXIT_STATUS]
//
// trains a small model on the lazy device and on the CPU, prints the largest
// difference between the two, and ends with EXIT_STATUS after MILLISECONDS.
// While it has time left it goes on training; with UNTIL_A_FILE_IN set to a folder,
// only until half a second after a compiled program has come to lie there.
#include <torch/torch.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <string>

namespace {

struct Training {
  explicit Training(torch::Device device) {
    torch::manual_seed(1);
    model->push_back(torch::nn::Linear(8, 16));
    model->push_back(torch::nn::Tanh());
    model->push_back(torch::nn::Linear(16, 1));
    input = torch::randn({4, 8}).to(device);
    model->to(device);
    optimizer = std::make_unique<torch::optim::SGD>(model->parameters(), 0.05);
  }
  torch::Tensor step() {
    optimizer->zero_grad();
    auto loss = model->forward(input).square().mean();
    loss.backward();
    optimizer->step();
    return loss.detach();
  }
  torch::nn::Sequential model;
  torch::Tensor input;
  std::unique_ptr<torch::optim::SGD> optimizer;
};

bool has_program(const char* folder) {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    if (entry.path().extension() == ".pt2") return true;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const int steps = argc > 2 ? std::atoi(argv[2]) : 10;
  int milliseconds = argc > 3 ? std::atoi(argv[3]) : 0;
  const int status = argc > 4 ? std::atoi(argv[4]) : 0;
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() -
                                                                 start)
        .count();
  };
  torch::set_num_threads(1);
  Training lazy(torch::kLazy), host(torch::kCPU);
  torch::Tensor lazy_loss, host_loss;
  const char* folder = std::getenv("UNTIL_A_FILE_IN");
  for (int k = 0; k < steps || elapsed() < milliseconds; ++k) {
    if (folder != nullptr && k % 500 == 0 && has_program(folder)) {
      milliseconds = static_cast<int>(elapsed()) + 500;
      folder = nullptr;
    }
    lazy_loss = lazy.step();
    host_loss = host.step();
    if (k % 5 == 4) (void)lazy_loss.item<float>();
  }
  std::cout << "device " << lazy_loss.device() << "\n"
            << "difference " << (lazy_loss.cpu() - host_loss).abs().item<float>() << std::endl;
  std::exit(status);
}
