/// \file
/// What tests of changing sizes share.
#pragma once

#include <gtest/gtest.h>

#include "reprise/reprise.h"
#include "tests/three_ways.h"

namespace reprise::test {

/// Sizes share programs, which are compiled.
class LazySizes : public Lazy {
 protected:
  void SetUp() override {
    begin_test(/*compile=*/true);
    options().dynamic_shapes = true;
  }
};

/// The same numbers on every device.
inline torch::Tensor given(torch::Device device, torch::IntArrayRef sizes, uint64_t seed) {
  torch::manual_seed(seed);
  return torch::randn(sizes).to(device);
}

/// The same strides, and all that `expect_close` asks.
inline void expect_all_close(const Tensors& actual, const Tensors& expected, double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t k = 0; k < actual.size(); ++k) {
    SCOPED_TRACE(c10::str("output ", k));
    EXPECT_EQ(actual[k].strides(), expected[k].strides());
    expect_close(actual[k], expected[k], tolerance);
  }
}

}  // namespace reprise::test
