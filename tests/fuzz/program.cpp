#include "tests/fuzz/program.h"

#include <algorithm>
#include <random>

namespace reprise::fuzz {

Program random_program(uint64_t seed, size_t length) {
  std::mt19937_64 random(seed * 0x9e3779b97f4a7c15ULL + 1);
  const auto next = [&] { return static_cast<uint32_t>(random() >> 56); };
  length = length / 2 + next() % std::max<size_t>(length, 1);
  Program program;
  program.seed = seed;
  const uint32_t how = next();
  program.marked = (how & 1) != 0;
  program.read_late = (how & 6) == 6;
  program.no_grad = (how & 24) == 24;
  program.times = 3 + next() % 6;
  // The first three times are alike in most programs, so that they are verified.
  program.others = (how & 32) != 0 ? (next() << 3 | (next() & 1)) & 0xff : 0;
  const auto instructions = [&](size_t count) {
    std::vector<Instruction> code(count);
    for (Instruction& instruction : code) {
      for (uint8_t* field : {&instruction.op, &instruction.a, &instruction.b, &instruction.c,
                             &instruction.i, &instruction.j, &instruction.s}) {
        *field = static_cast<uint8_t>(next());
      }
    }
    return code;
  };
  program.turn = length == 0 ? 0 : next() % static_cast<uint32_t>(length);
  program.code = instructions(length);
  program.other = instructions(next() % 8);
  return program;
}

}  // namespace reprise::fuzz
