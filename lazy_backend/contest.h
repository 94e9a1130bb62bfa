/// \file
/// Which of two ways to run a segment is faster: its program or the interpreter; or a program
/// for one size or that over symbols, which then takes the interpreter's turns.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace reprise {

/// Program and interpreter take turns and are compared in pairs, so that what slows
/// the machine down for a while slows both. One of them wins when it has won a certain
/// number of pairs more than the other: a clear case takes few pairs, and one that takes
/// many is close, where it costs little to ask the slower one now and then.
///
/// Not thread-safe; a segment's end has its own, and belongs to one session.
class Contest {
 public:
  enum class Runner : uint8_t { kProgram, kInterpreter };

  /// Who runs next.
  Runner next() {
    if (decided()) return Runner::kProgram;
    if (program_runs_ < kWarmUps || program_seconds_ < 0) return Runner::kProgram;
    const bool rarely = pairs_ >= kPairsInARow;
    return rarely && waited_ < kRarely ? Runner::kProgram : Runner::kInterpreter;
  }

  /// Each run's time, in seconds, in the order of the runs.
  void program_took(double seconds) {
    if (decided()) return;
    ++waited_;
    if (++program_runs_ > kWarmUps) program_seconds_ = seconds;
  }
  void interpreter_took(double seconds) {
    if (decided() || program_seconds_ < 0) return;
    lead_ += program_seconds_ <= seconds ? 1 : -1;
    last_program_seconds_ = program_seconds_;
    last_interpreter_seconds_ = seconds;
    program_seconds_ = -1;
    waited_ = 0;
    ++pairs_;
  }

  /// Afterwards no times are wanted.
  bool decided() const { return std::abs(lead_) >= kLead; }
  bool program_lost() const { return lead_ <= -kLead; }

  /// Pairs that the program won, less those it lost.
  int lead() const { return lead_; }
  int pairs() const { return pairs_; }
  int pairs_lost() const { return (pairs_ - lead_) / 2; }
  double last_program_seconds() const { return last_program_seconds_; }
  double last_interpreter_seconds() const { return last_interpreter_seconds_; }

 private:
  static constexpr int kWarmUps = 2;
  /// Where one wins three pairs in four, the other one gets this far ahead once in
  /// 6500 contests: (1/4 / 3/4)⁸.
  static constexpr int kLead = 8;
  static constexpr int kPairsInARow = 12;
  static constexpr int kRarely = 16;  // runs of the program

  int program_runs_ = 0;
  int waited_ = 0;  // runs of the program since the last pair
  int pairs_ = 0;
  int lead_ = 0;
  double program_seconds_ = -1;  // of its last run, while that waits for the interpreter's
  double last_program_seconds_ = 0;
  double last_interpreter_seconds_ = 0;
};

}  // namespace reprise
