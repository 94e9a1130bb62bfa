/// \file
/// An optimizer's numbers that change from step to step, in a program that counts its steps.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "lazy_backend/optimizer_numbers.h"

namespace reprise {

/// A count of steps, a weight of the program: float64, without dimensions.
struct StepCounter {
  uint32_t group;
  double count;  ///< after the run that was traced
};

/// A trace (docs/trace_format.md) whose scalars are `numbers`, in order, as one that computes
/// them. Its counters take the places of the scalars among the inputs, and are counted up.
std::pair<std::string, std::vector<StepCounter>> with_step_counters(const std::string& trace,
                                                                    const CountedNumbers& numbers);

}  // namespace reprise
