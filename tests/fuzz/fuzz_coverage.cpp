/// The random programs of `fuzz_programs`, led by what of Reprise they run: libFuzzer's
/// target. An input is a program (`program_of`); one that differs from eager, interpreted,
/// is printed as C++ and aborts.
#include <cstdint>
#include <cstdlib>
#include <iostream>

#include "tests/fuzz/compare.h"
#include "tests/fuzz/machine.h"

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  reprise::fuzz::set_up_process();
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace reprise::fuzz;
  const Program program = program_of(data, size);
  if (const auto found = difference_when_interpreted(program)) {
    std::cerr << *found << '\n' << to_cpp(program) << std::flush;
    std::abort();
  }
  return 0;
}
