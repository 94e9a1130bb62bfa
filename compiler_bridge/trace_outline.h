/// \file
/// How the trace of a segment follows from its steps: for segments that are alike but for
/// integers, it is the same.
#pragma once

#include <cstdint>
#include <vector>

#include "lazy_backend/program.h"

namespace reprise {

/// Filled by `write_trace`; immutable then. By it another size's integers, inputs and
/// outputs are found without writing its trace.
struct TraceOutline {
  /// A geometry among the steps': of a tensor argument or of a tensor result, numbered
  /// through all steps (`for_each_tensor`, `for_each_result`).
  struct Source {
    bool is_result = false;
    uint32_t index = 0;
  };
  struct Input {
    ProgramInput::Kind kind = ProgramInput::Kind::kSlot;
    uint32_t index = 0;  ///< as of `ProgramInput`
    Source geometry;     ///< not of a scalar
  };
  struct Output {
    uint32_t slot = 0;
    uint32_t result = 0;  ///< which one makes it
  };
  /// An argument that is an integer, a list of them, or an integer as a tensor.
  struct Integer {
    uint32_t step = 0, argument = 0;
  };
  /// An argument that is a float, dynamic or not.
  struct Float {
    uint32_t step = 0, argument = 0;
    bool dynamic = false;
    double value = 0;  ///< where it is not dynamic
  };
  /// Where the trace has one value for both, their geometries are the same.
  struct Same {
    Source a, b;
  };

  std::vector<Input> inputs;
  std::vector<Output> outputs;
  std::vector<Integer> integers;  ///< in their order in the trace, after those of inputs
  std::vector<Float> floats;
  std::vector<Same> same;
  bool writes_inputs = false;
  /// The trace has parts that follow from geometries in other ways.
  bool complete = true;

  /// Sets `inputs`, `outputs` and `writes_inputs` of a program whose steps are alike to
  /// those that this was made of, and returns the integers of its trace in `values`. False
  /// where its trace would not be that one but for integers, and for floats that are dynamic
  /// there: one that is a constant here is an input all the same.
  bool apply(Program& program, std::vector<int64_t>& values) const;
};

}  // namespace reprise
