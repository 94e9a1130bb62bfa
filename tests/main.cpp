// Runs the tests on one kind of backing device, which REPRISE_BACKING names.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdlib>
#include <iostream>
#include <string_view>

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  constexpr int kSkipped = 77;  // CTest's SKIP_RETURN_CODE
  const char* backing = std::getenv("REPRISE_BACKING");
  if (backing != nullptr && std::string_view(backing) == "cuda" && !torch::cuda::is_available()) {
    std::cout << "skipped: REPRISE_BACKING=cuda, and this machine has no CUDA device\n";
    return kSkipped;
  }
  torch::set_num_threads(1);
  // Compiled convolutions may take another kernel of cuDNN's than eager's: tolerances here are
  // for those that compute in float32.
  at::globalContext().setAllowTF32CuDNN(false);
  return RUN_ALL_TESTS();
}
