/// \file
/// What is behind a `LoadedModule` (reprise/package.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace reprise::detail {

class LoadedProgram {
 public:
  struct Weight {
    std::string name;  ///< with dots, as in Python
    at::Tensor tensor;  ///< undefined where the file has none
    bool is_parameter = false;
    bool named = true;  ///< by somebody, and not numbered
  };
  virtual ~LoadedProgram() = default;
  /// In the order in which `run` takes them.
  virtual std::vector<Weight> take_weights() = 0;
  virtual const std::vector<std::string>& input_names() const = 0;
  virtual std::vector<at::Tensor> run(const std::vector<at::Tensor>& weights,
                                      const std::vector<at::Tensor>& inputs,
                                      std::optional<bool> training) = 0;
};

}  // namespace reprise::detail
