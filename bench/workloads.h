/// The work that the benchmarks time: a forward pass and a training step of every
/// model of the zoo, at the sizes it is typically run (REPRISE_BENCH_BATCH=N: with batches of
/// N where a model has batches), and a chain of tiny ops.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace bench {

/// A model on a device, with its inputs. The same workload on two devices starts
/// from the same numbers and does the same steps.
struct Job {
  /// Does a step and returns its output or its loss, unread.
  std::function<torch::Tensor()> step;

  /// What else to compare after some steps: the gradients of the last one and the
  /// optimizer's moments, or the state of a simulation.
  std::function<std::vector<torch::Tensor>()> state;

  /// Sets the learning rate of a training job; empty for others. To compare two
  /// devices it is made tiny: where a gradient is nothing but rounding, Adam makes
  /// steps of the size of the learning rate of it, whose signs differ, and a few
  /// steps later the losses do. The learning rate is an input of the program, so the
  /// program is the one that is timed.
  std::function<void(double)> set_learning_rate;

  /// Whose `step()` it calls, once a step; they live as long as `step`.
  std::vector<torch::optim::Optimizer*> optimizers;

  /// What `step` reads, where it is a forward pass, for who must move it himself.
  std::shared_ptr<torch::nn::Module> model;
  std::shared_ptr<torch::Tensor> input;
};

/// Where a job runs, and from which numbers.
struct Place {
  torch::Device device;

  /// Where it is not 0, each floating-point input and parameter is changed by up to two
  /// units in its last place, differently for each number.
  uint64_t disturbance = 0;
};

struct Workload {
  std::string model;
  std::string mode;  ///< "forward", "train", or what a simulation calls its step.

  /// Makes its job.
  std::function<Job(const Place&)> make;

  bool has_batches = true;  ///< REPRISE_BENCH_BATCH says of which size

  Job on(torch::Device device, uint64_t disturbance = 0) const {
    return make({device, disturbance});
  }

  std::string name() const { return model + "/" + mode; }
  bool is_forward() const { return mode == "forward"; }
};

inline constexpr int kChainOps = 100;

/// `kChainOps` ops with next to nothing to compute, half of them products and half
/// rectifications. `x`, `factor`: [8].
torch::Tensor chain(torch::Tensor x, const torch::Tensor& factor, int ops = kChainOps);

/// All workloads, in the order of the table.
const std::vector<Workload>& workloads();

/// Beside the table: the small GPT as there, trained with SGD with momentum.
const Workload& gpt_sgd_training();

/// The one of this name, of the table or beside it. Throws std::invalid_argument where there
/// is none.
const Workload& workload_named(std::string_view name);

}  // namespace bench
