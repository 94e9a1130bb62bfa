/// \file
/// Runs a program in the three ways in which a step can run, each against eager
/// on the backing device: recorded; verified and interpreted; verified and
/// compiled. And not recorded, as when a program never repeats.
///
/// The counters prove that each step really ran in the way that it is compared
/// for: a step that was recorded again where it should have been verified fails
/// the test, right numbers or not. Recorded and interpreted steps must match
/// eager to the last bit, in values and in geometry; compiled ones within the
/// tolerance of their dtype.
#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <string>
#include <vector>

#include "reprise/metrics.h"

namespace reprise::test {

using Tensors = std::vector<torch::Tensor>;

/// A step. Returns what is to be compared: outputs, and the state it changed.
using Step = std::function<Tensors(int iteration)>;

/// Makes a program's state on `device` and returns its step. Called for the
/// backing device and for the lazy one, under the same seed.
using Program = std::function<Step(torch::Device device)>;

struct Ways {
  /// The first iteration that repeats one before it; those before are recorded.
  /// 2 for optimizers, which make their state in the first step.
  int repeats_at = 1;
  /// Off for what Inductor cannot compile, or does not do in eager's order.
  bool compiled = true;
  /// Times the tolerance of the dtype: for sums over many numbers.
  double tolerance = 1;
};

/// Each iteration is one marked step.
void expect_eager_three_ways(const Program& program, const Ways& ways = {});

/// As above for a function of tensors. Each step gets fresh copies of `inputs`
/// on the device, which are compared as well: they may have been written to.
void expect_eager_three_ways(const Tensors& inputs,
                             const std::function<Tensors(Tensors&)>& function,
                             const Ways& ways = {});

/// The same bits, sizes, strides and dtype. `actual` may be lazy.
void expect_same_bits(const torch::Tensor& actual, const torch::Tensor& expected);
/// The same sizes and dtype, and values within `tolerance` times the dtype's own.
void expect_close(const torch::Tensor& actual, const torch::Tensor& expected,
                  double tolerance = 1);

/// What has happened since `before`.
Statistics since(const Statistics& before);

/// Options as the tests want them, and no traces of an earlier test.
void begin_test(bool compile);

/// The device that eager runs on, and whether it is a GPU.
torch::Device eager_device();

/// Random numbers on `device`, the same for the same seed on every device.
torch::Tensor random(torch::Device device, torch::IntArrayRef sizes,
                     torch::Dtype dtype = torch::kFloat);

/// Copies of the parameters and buffers of a module, or of their gradients.
Tensors state_of(const torch::nn::Module& module);
Tensors gradients_of(const torch::nn::Module& module);
/// One list after the other.
Tensors joined(Tensors first, const Tensors& second);

/// The base of every test: no traces, no compile unless a test wants it.
class Lazy : public ::testing::Test {
 protected:
  void SetUp() override { begin_test(/*compile=*/false); }
};

}  // namespace reprise::test
