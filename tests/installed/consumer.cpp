// Prints how many segments ran as compiled programs, and by how much the lazy device's
// result differs from the CPU's.
#include <reprise/reprise.h>

#include <iostream>

#include "step.h"

int main() {
  reprise::options().compile_after_ops = 1;
  reprise::options().demote_slow_programs = false;
  const auto expected = step(torch::kCPU);
  double difference = 0;
  for (int k = 0; k < 20; ++k) {
    const auto result = step(torch::kLazy);
    reprise::mark_step();
    const auto difference_now = (result.cpu() - expected).abs().max();
    difference = std::max(difference, difference_now.item<double>());
    reprise::wait_for_compiles();
  }
  const auto replayed = reprise::statistics().segments_replayed;
  std::cout << replayed << " segments replayed, difference " << difference << std::endl;
  if (replayed == 0) std::cout << reprise::explain();
  return replayed > 0 && difference < 1e-5 ? 0 : 1;
}
