// A program as people have it: it names nothing of Reprise, and is linked with it.
//
//     plain_program train STEPS [MILLISECONDS EXIT_STATUS]
//
// trains a small model on the lazy device and on the CPU, prints the largest
// difference between the two, and ends with EXIT_STATUS after MILLISECONDS.
// While it has time left it goes on training.
//
//     plain_program scale STEPS FACTOR
//
// computes with a constant factor on both, and prints the largest difference.
//
//     plain_program fork STEPS
//
// forks, and trains in the child and then in the parent.
//
//     plain_program global STEPS
//
// keeps tensors and a model in objects that are destroyed after main; one of them prints the sum
// of four numbers, 6, then.
//
// With WAIT_FOR_COMPILES set it waits for all compiles every ten steps.
#include <ATen/core/dispatch/Dispatcher.h>
#include <sys/wait.h>
#include <torch/torch.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <iostream>
#include <memory>
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

/// As a script would: by the name of an op, without a header of Reprise.
void wait_for_compiles() {
  c10::Dispatcher::singleton()
      .findSchemaOrThrow("reprise::wait_for_compiles", "")
      .typed<void()>()
      .call();
}

void print(const torch::Tensor& lazy, const torch::Tensor& host) {
  std::cout << "device " << lazy.device() << "\n"
            << "difference " << (lazy.cpu() - host).abs().max().item<float>() << std::endl;
}

int scale(int steps, double factor) {
  const auto host = torch::arange(64).to(torch::kFloat), lazy = host.to(torch::kLazy);
  torch::Tensor sum;
  for (int k = 0; k < steps; ++k) {
    if (k % 10 == 9) wait_for_compiles();
    sum = (torch::tanh(lazy * factor) + lazy).sum();
    (void)sum.item<float>();
  }
  print(sum, (torch::tanh(host * factor) + host).sum());
  return 0;
}

/// Trains and returns the last loss.
torch::Tensor train(Training& lazy, int steps) {
  Training host(torch::kCPU);
  torch::Tensor lazy_loss, host_loss;
  for (int k = 0; k < steps; ++k) {
    lazy_loss = lazy.step();
    host_loss = host.step();
  }
  print(lazy_loss, host_loss);
  return lazy_loss;
}

int train(int steps) {
  Training lazy(torch::kLazy);
  train(lazy, steps);
  return 0;
}

int fork_first(int steps) {
  const pid_t child = ::fork();
  if (child == 0) return train(steps);
  int status = 0;
  ::waitpid(child, &status, 0);
  train(steps);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 100;
}

/// Computes when libtorch's own static objects, but for its kernels, are gone.
struct Last {
  torch::Tensor x;
  ~Last() {
    if (x.defined()) std::cout << "last " << (x + 1).sum().item<float>() << std::endl;
  }
} last;

/// Both destroyed after main, one before and one after what libreprise has.
torch::Tensor global_tensor;
std::unique_ptr<Training> global_training;

int keep_globals(int steps) {
  static torch::Tensor late;
  global_training = std::make_unique<Training>(torch::kLazy);
  const auto lazy_loss = train(*global_training, steps);
  global_tensor = lazy_loss * 2;  // pending at the end
  late = global_tensor + 1;
  last.x = torch::ones({4}, torch::kLazy) * 0.5;
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 4 && std::string(argv[1]) == "scale") return scale(std::atoi(argv[2]), std::atof(argv[3]));
  const int steps = argc > 2 ? std::atoi(argv[2]) : 10;
  if (argc == 3 && std::string(argv[1]) == "fork") return fork_first(steps);
  if (argc == 3 && std::string(argv[1]) == "global") return keep_globals(steps);
  const int milliseconds = argc > 3 ? std::atoi(argv[3]) : 0;
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
  const bool patient = std::getenv("WAIT_FOR_COMPILES") != nullptr;
  for (int k = 0; k < steps || elapsed() < milliseconds; ++k) {
    if (patient && k % 10 == 9) wait_for_compiles();
    lazy_loss = lazy.step();
    host_loss = host.step();
    if (k % 5 == 4) (void)lazy_loss.item<float>();
  }
  print(lazy_loss, host_loss);
  std::exit(status);
}
