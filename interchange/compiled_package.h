/// \file
/// An AOTInductor package as a module's program.
#pragma once

#include <memory>
#include <shared_mutex>

#include "compiler_bridge/package_runner.h"
#include "interchange/loaded_program.h"
#include "interchange/program_inputs.h"

namespace reprise {

/// Safe to run from several threads at once. Weights that are set while it runs are used by
/// later calls.
class CompiledPackage final : public detail::LoadedProgram {
 public:
  /// Throws c10::Error, which names the file.
  CompiledPackage(const std::string& path, const std::string& name);
  ~CompiledPackage() override;

  std::vector<Weight> take_weights() override;
  const std::vector<std::string>& input_names() const override { return input_names_; }
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& inputs,
                              std::optional<bool> training) override;

  /// On its own device. `weights` may be empty: those that it has.
  std::vector<at::Tensor> run_here(const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& weights);

 private:
  void bind(const std::vector<at::Tensor>& weights);

  const std::string path_;
  c10::Device device_;
  std::string key_;  ///< what `reprise::run_package` knows it by
  std::shared_ptr<PackageRunner> runner_;
  std::optional<ProgramInputs> inputs_;
  std::vector<std::string> input_names_;
  std::vector<std::string> weight_names_;
  std::shared_mutex mutex_;
  std::vector<at::Tensor> bound_;  ///< by `mutex_`
};

}  // namespace reprise
