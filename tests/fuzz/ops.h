/// \file
/// The instructions of random programs: one table.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <vector>

namespace reprise::fuzz {

/// What an instruction works on. The names are those of the table's expressions.
struct Operands {
  const torch::Tensor& a;
  const torch::Tensor& b;
  const torch::Tensor& c;
  int64_t i, j;  ///< 0 to 7
  double s;      ///< a multiple of 1/4 between -2 and 2
};

struct Op {
  enum class Kind : uint8_t {
    kTensor,   ///< makes a value
    kTensors,  ///< makes several
    kDo,       ///< writes, or changes what a tensor is
    kRead,     ///< lets the host see numbers
    kDrop,     ///< lets go of `a`
    kBranch,   ///< skips the next instruction where the first number of `a` is not positive
    kMark,     ///< ends a step in the middle of one
  };
  Kind kind;
  const char* text;  ///< the expression; identifiers a, b, c, i, j, s are the operands
  torch::Tensor (*tensor)(const Operands&) = nullptr;
  std::vector<torch::Tensor> (*tensors)(const Operands&) = nullptr;
  void (*act)(const Operands&) = nullptr;
  std::string (*read)(const Operands&) = nullptr;
};

const std::vector<Op>& ops();

}  // namespace reprise::fuzz
