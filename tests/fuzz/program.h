/// \file
/// Random programs as data: made from a seed, shrunk, printed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace reprise::fuzz {

/// One instruction. Any bytes are one: operands are taken modulo what there is.
struct Instruction {
  uint8_t op = 0;
  uint8_t a = 0, b = 0, c = 0;  ///< values, the last made first
  uint8_t i = 0, j = 0, s = 0;
};

/// A step of a program, run several times on state that is carried from one time to
/// the next. Some of the times it takes another way from some instruction on.
struct Program {
  uint64_t seed = 0;  ///< of its inputs and of the generator
  std::vector<Instruction> code;
  std::vector<Instruction> other;  ///< instead of the code from `turn` on
  uint32_t turn = 0;
  uint32_t times = 6;
  uint32_t others = 0;     ///< bit k: the k-th time takes the other way
  /// A loop: so many instructions from the first one on, which are run more than once.
  uint32_t loop_begin = 0, loop_length = 0;
  uint32_t loop_times = 1;  ///< one more each time, up to twice as many, where `loop_changes`
  bool loop_changes = false;
  bool marked = true;      ///< mark_step() after each time
  bool read_late = false;  ///< values are compared at the end, not after each time
  bool no_grad = false;
  bool sizes_change = false;    ///< each time has one more input, of another size
  bool numbers_change = false;  ///< `i` and `s` of each instruction are others each time

  bool changes() const { return sizes_change || numbers_change; }
  /// How often the loop runs in the k-th step.
  uint32_t loop_times_at(uint32_t k) const {
    return loop_changes ? loop_times + k * 3 % (loop_times + 1) : loop_times;
  }
  /// So many instructions from the `at`-th one on are gone: what is counted in them moves.
  void close_gap(size_t at, size_t size) {
    const auto moved = [&](uint32_t place) {
      return place <= at ? place : place - static_cast<uint32_t>(std::min<size_t>(size, place - at));
    };
    const uint32_t end = moved(loop_begin + loop_length);
    turn = moved(turn);
    loop_begin = moved(loop_begin);
    loop_length = end - loop_begin;
  }
};

/// The same for the same seed, on every machine.
Program random_program(uint64_t seed, size_t length);

/// The program that these bytes are: of any bytes, and each changes little of it.
Program program_of(const uint8_t* data, size_t size);

/// The program with least instructions found, of those that still fail. `fails` is
/// called some hundred times.
template <class Fails>
Program shrink(Program program, const Fails& fails) {
  const auto attempt = [&](Program candidate) {
    if (!fails(candidate)) return false;
    program = std::move(candidate);
    return true;
  };
  const auto shorten = [&](std::vector<Instruction> Program::*part) {
    for (size_t size = std::max<size_t>((program.*part).size() / 2, 1);; size /= 2) {
      for (size_t at = 0; at < (program.*part).size();) {
        Program candidate = program;
        auto& code = candidate.*part;
        code.erase(code.begin() + static_cast<std::ptrdiff_t>(at),
                   code.begin() + static_cast<std::ptrdiff_t>(std::min(at + size, code.size())));
        if (part == &Program::code) candidate.close_gap(at, size);
        if (!attempt(candidate)) at += size;
      }
      if (size <= 1) break;
    }
  };
  {
    Program candidate = program;
    candidate.others = 0;
    candidate.other.clear();
    attempt(candidate);
  }
  for (bool Program::*change :
       {&Program::sizes_change, &Program::numbers_change, &Program::loop_changes}) {
    Program candidate = program;
    candidate.*change = false;
    attempt(candidate);
  }
  while (program.loop_times > 1) {
    Program candidate = program;
    --candidate.loop_times;
    if (!attempt(candidate)) break;
  }
  while (program.times > 1) {
    Program candidate = program;
    --candidate.times;
    if (!attempt(candidate)) break;
  }
  shorten(&Program::code);
  shorten(&Program::other);
  shorten(&Program::code);
  return program;
}

}  // namespace reprise::fuzz
