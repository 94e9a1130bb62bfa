#include "tests/fuzz/program.h"

#include <algorithm>
#include <random>

namespace reprise::fuzz {

namespace {

/// `next` gives bytes.
template <class Next>
std::vector<Instruction> instructions(size_t count, const Next& next) {
  std::vector<Instruction> code(count);
  for (Instruction& instruction : code) {
    for (uint8_t* field : {&instruction.op, &instruction.a, &instruction.b, &instruction.c,
                           &instruction.i, &instruction.j, &instruction.s}) {
      *field = static_cast<uint8_t>(next());
    }
  }
  return code;
}

/// All but the code.
template <class Next>
void set_frame(Program& program, const Next& next) {
  const uint32_t how = next();
  program.marked = (how & 1) != 0;
  program.read_late = (how & 6) == 6;
  program.no_grad = (how & 24) == 24;
  program.sizes_change = (how & 0xc0) == 0x40;
  program.numbers_change = (how & 0xc0) == 0x80;
  program.times = 3 + next() % 6;
  // The first three times are alike in most programs, so that they are verified.
  program.others = (how & 32) != 0 ? (next() << 3 | (next() & 1)) & 0xff : 0;
}

}  // namespace

Program random_program(uint64_t seed, size_t length) {
  std::mt19937_64 random(seed * 0x9e3779b97f4a7c15ULL + 1);
  const auto next = [&] { return static_cast<uint32_t>(random() >> 56); };
  length = length / 2 + next() % std::max<size_t>(length, 1);
  Program program;
  program.seed = seed;
  set_frame(program, next);
  program.turn = length == 0 ? 0 : next() % static_cast<uint32_t>(length);
  program.code = instructions(length, next);
  program.other = instructions(next() % 8, next);
  // One in four has a loop.
  if (length > 0 && next() % 4 == 0) {
    program.loop_begin = next() % static_cast<uint32_t>(length);
    program.loop_length = 1 + next() % static_cast<uint32_t>(length - program.loop_begin);
    program.loop_times = 2 + next() % 4;
    program.loop_changes = next() % 4 != 0;
    // Each time works on what the time before has left.
    for (uint32_t k = 0; k < program.loop_length; ++k) {
      Instruction& instruction = program.code[program.loop_begin + k];
      for (uint8_t* operand : {&instruction.a, &instruction.b, &instruction.c}) *operand &= 3;
    }
  }
  return program;
}

Program program_of(const uint8_t* data, size_t size) {
  const uint8_t* const end = data + size;
  const auto next = [&] { return static_cast<uint32_t>(data == end ? 0 : *data++); };
  Program program;
  set_frame(program, next);
  program.turn = next();
  program.other = instructions(next() % 8, next);
  const uint32_t loop = next();
  program.loop_times = 1 + (loop & 3);
  program.loop_changes = (loop & 4) != 0;
  program.loop_begin = loop >> 3;
  program.loop_length = next();
  program.code = instructions(static_cast<size_t>(end - data) / 7, next);
  return program;
}

}  // namespace reprise::fuzz
