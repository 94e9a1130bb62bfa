/// A target for libFuzzer: coverage of the library guides what programs are made.
///
///     fuzz_target -max_len=280 corpus/
#include <cstdlib>
#include <iostream>

#include "tests/fuzz/compare.h"
#include "tests/fuzz/machine.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto program = reprise::fuzz::decode(data, size);
  if (auto found = reprise::fuzz::difference_when_interpreted(program)) {
    std::cerr << *found << '\n' << reprise::fuzz::to_cpp(program);
    std::abort();
  }
  return 0;
}
