/// \file
/// The first run of a compiled program: beside the interpreter, on the same inputs.
#pragma once

#include <exception>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "lazy_backend/program.h"
#include "lazy_backend/segment.h"

namespace reprise {

/// Runs a segment with its program and again with the interpreter, whose values the user
/// gets, and compares.
///
/// Values may differ as far as rounding explains. Where they differ by more than their
/// dtype's tolerance, it is measured how far this segment magnifies roundings: the
/// interpreter runs some times more, on copies of what the segment was given, with every
/// value disturbed by units in the last place. Each of these runs is a call of its own,
/// so that they can be spread over steps of the user's program.
///
/// What both write and return is kept in between in the program's `scratch`, for the
/// most part a file: a training step would otherwise need its parameters' and its
/// optimizer's memory twice more.
///
/// Used by one thread at a time.
class ProgramCheck {
 public:
  /// Throws what an op throws. Afterwards the segment has run. `program` must outlive this.
  ProgramCheck(Program& program, Segment& segment);
  ~ProgramCheck();

  bool decided() const { return decided_; }
  /// Once decided: why the program must not be used, or empty.
  const std::string& problem() const { return problem_; }

  /// One disturbed run, where it is not decided.
  void run_disturbed();

 private:
  struct Value;
  bool run_program_first(Segment& segment);
  void take_interpreters(const Segment& segment);
  const Value* differing(bool with_noise) const;
  void keep(const Segment& segment);
  void measure_noise();
  void decide(std::string problem);
  void give_up(const std::exception& error);
  c10::ScalarType dtype_of(uint32_t slot, const Segment& segment) const;
  at::Tensor input(uint32_t slot, const Segment& segment) const;

  Program& program_;
  const bool tf32_;
  std::shared_ptr<Scratch> scratch_;
  std::unordered_map<uint32_t, c10::ScalarType> dtypes_;  ///< of inputs
  std::vector<Value> values_;
  bool decided_ = false;
  std::string problem_;

  // For the disturbed runs.
  std::unique_ptr<Scratch> kept_;
  std::vector<at::Tensor> inputs_;  ///< by slot, as they were before the segment
  std::vector<at::Tensor> random_;  ///< what the random steps drew
  ScalarValues scalars_;
  size_t working_bytes_ = 0;
  uint32_t seed_ = 0;
  int runs_ = 0;
  double largest_ = 0;  ///< number that a step has made
};

/// How much memory that takes for a program of these steps with these outputs. The
/// segment's inputs have their backing.
size_t scratch_bytes(const std::vector<StepPtr>& steps, const std::vector<uint32_t>& live,
                     const Segment& segment);

}  // namespace reprise
