/// \file
/// Runs a random program on a device.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "tests/fuzz/program.h"

namespace reprise::fuzz {

/// What a step left: its values, and what it let the host see, in order: numbers that
/// were read, metadata, the first lines of errors.
struct Outcome {
  std::vector<torch::Tensor> values;
  std::vector<std::string> names;  ///< of the values
  std::vector<std::string> said;
  std::vector<size_t> threw;  ///< instructions, counted in the order in which they ran
};

class Machine {
 public:
  struct Settings {
    /// Off: instructions that read are left out, so that a step is one segment.
    bool reads = true;
    /// Instructions that are not run, in increasing order; counted as in `Outcome::threw`.
    std::vector<size_t> left_out;
    /// Values that a step returns, at most, besides its state.
    size_t returned = 100;
    /// Every value gets a relative error of up to so many units in the last place of
    /// its dtype, as different orders of summation would give. Eager's device only.
    double noise = 0;
    uint64_t noise_seed = 0;
    /// Called with each instruction as C++.
    std::function<void(const std::string&)> list;
  };

  Machine(const Program& program, torch::Device device, Settings settings);

  /// Runs the step for the `k`-th time.
  Outcome step(uint32_t k);

 private:
  struct Value {
    torch::Tensor tensor;
    std::string name;
  };

  void run(const Instruction& instruction, uint32_t k, Outcome& outcome);
  torch::Tensor sized_input(uint32_t k) const;
  void keep(torch::Tensor tensor, std::string name);
  void disturb(const torch::Tensor& tensor);
  const Value& pick(uint8_t operand) const;

  const Program program_;
  const torch::Device device_;
  const Settings settings_;
  std::vector<Value> state_;
  std::vector<Value> values_;
  bool skip_ = false;
  size_t count_ = 0;  ///< instructions of this step so far
  int next_name_ = 0;
  std::mt19937_64 noise_;
};

/// The program as C++ that can be compiled with `tests/fuzz/helpers.h`. `times`: the
/// step as it is the first time, and as it is where it takes the other way.
std::string to_cpp(const Program& program);

}  // namespace reprise::fuzz
