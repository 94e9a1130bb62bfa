/// \file
/// An AOTInductor package as a module's program.
#pragma once

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <shared_mutex>

#include "compiler_bridge/package_runner.h"
#include "interchange/loaded_program.h"
#include "interchange/package_metadata.h"
#include "interchange/pt2_archive.h"

namespace reprise {

/// The tensor with these strides, a copy where it has others: compiled code reads a weight as
/// it lay when it was compiled.
at::Tensor with_strides(const at::Tensor& tensor, c10::IntArrayRef strides);

/// The op that is a step of a trace: a call of a package that is functional.
inline constexpr const char* kPackageCall = "reprise::call_package";

/// Safe to run from several threads at once. Weights that are set while it runs are used by
/// later calls.
class CompiledPackage final : public detail::LoadedProgram {
 public:
  /// `functional`: see `LoadOptions`. Throws c10::Error, which names the file.
  CompiledPackage(Pt2Archive& archive, const std::string& name, bool functional);
  ~CompiledPackage() override;

  std::vector<Weight> take_weights() override;
  const std::vector<std::string>& input_names() const override { return input_names_; }
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& inputs,
                              std::optional<bool> training) override;

  /// On its own device. `read` are the weights that it only reads, and `written` the others.
  std::vector<at::Tensor> run_here(const std::vector<at::Tensor>& inputs, at::TensorList read,
                                   at::TensorList written);

 private:
  bool are_bound(const std::vector<at::Tensor>& weights) const;  // under `mutex_`, as `bind`
  void bind(const std::vector<at::Tensor>& weights);
  bool writes() const { return std::find(written_.begin(), written_.end(), true) != written_.end(); }

  const std::string path_;
  c10::Device device_;
  std::string key_;  ///< what `reprise::run_package` and `call_package` know it by
  std::shared_ptr<PackageRunner> runner_;
  std::optional<ProgramInputs> inputs_;
  bool functional_ = false;  ///< a call can be recorded now and run later
  std::atomic<bool> was_step_{false};
  std::vector<std::string> input_names_;
  PackagedWeights described_;  ///< its weights, as far as the file says
  std::map<std::string, at::Tensor> stored_;  ///< beside it, until they are taken
  std::vector<std::string> weight_names_;
  std::vector<bool> written_;  ///< by a call, by weight
  std::shared_mutex mutex_;
  std::vector<at::Tensor> bound_;  ///< by `mutex_`
};

}  // namespace reprise
