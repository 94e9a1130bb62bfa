// Prints by how much the lazy device's result differs from the CPU's. It is not linked
// with Reprise.
#include <iostream>

#include "step.h"

int main() {
  const auto expected = step(torch::kCPU);
  double difference = 0;
  for (int k = 0; k < 10; ++k) {
    const auto difference_now = (step(torch::kLazy).cpu() - expected).abs().max();
    difference = std::max(difference, difference_now.item<double>());
  }
  std::cout << "difference " << difference << std::endl;
  return difference < 1e-5 ? 0 : 1;
}
