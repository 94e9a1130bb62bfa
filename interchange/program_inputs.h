/// \file
/// What a program from a file wants of its inputs.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "symint/expression.h"

namespace reprise {

struct ProgramInputs {
  struct Input {
    std::string name;
    bool is_tensor = true;  ///< else an integer, in a tensor with one element
    c10::ScalarType dtype = c10::ScalarType::Undefined;
    /// Over `symbols`; nothing where it is not known, and not checked.
    std::vector<std::optional<Expression>> sizes;
  };
  struct Symbol {
    std::string name;  ///< what the user called it; may be empty
    int64_t least = 0;
    int64_t most = std::numeric_limits<int64_t>::max();
  };
  std::vector<Input> inputs;
  std::vector<Symbol> symbols;

  std::vector<std::string> names() const;
  /// Throws c10::ValueError, which names input, dimension, what was expected and what came,
  /// or c10::TypeError for another dtype.
  void check(const std::vector<at::Tensor>& given) const;
};

}  // namespace reprise
