/// \file
/// Programs from files, as modules: what Python exported or compiled, without Python.
///
/// ```cpp
/// auto net = reprise::load_package("resnet.pt2");     // torch.export.save, or AOTInductor
/// net->to(torch::kLazy);
/// torch::optim::SGD optimizer(net->parameters(), 0.01);  // a program of torch.export trains
/// auto loss = torch::nn::functional::cross_entropy(net->forward(images), labels);
/// ```
#pragma once

#include <torch/nn/module.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "reprise/export_macros.h"

namespace reprise {

namespace detail {
class LoadedProgram;
}

/// A program from a file. Its parameters and buffers have the names that they had in Python,
/// in submodules; values that are copied into them (or set by `set_data`) are used by the
/// next call. A parameter of several names has the first one. Calls may come from several
/// threads at once, as to any module.
class REPRISE_API LoadedModule : public torch::nn::Module {
 public:
  /// `weights_of`: see `LoadOptions`; may be null.
  LoadedModule(std::unique_ptr<detail::LoadedProgram> program, const torch::nn::Module* weights_of);
  ~LoadedModule() override;

  /// Of one tensor, the first result: for `torch::nn::Sequential` and `torch::nn::AnyModule`.
  at::Tensor forward(const at::Tensor& input);

  /// Takes the tensors among the program's arguments, in order, and gives its results: a
  /// number as a 0-dim tensor of the host, None as an undefined tensor. An integer among its
  /// arguments that may change is taken as a tensor with one element.
  ///
  /// Throws c10::ValueError, which names input and dimension, where number, rank or sizes do
  /// not fit; c10::TypeError for another dtype; c10::Error where a compiled program gets
  /// tensors of a device that it is not made for; and what its ops throw.
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs);

  /// Names of the inputs, as Python had them; `input_0` and so on where the file names none.
  const std::vector<std::string>& input_names() const;

  /// A program of torch.export does what it did when it was exported, in training or in
  /// evaluation. From the first call of this (or `eval()`) on, ops that have a flag for it
  /// (dropout, batch norm) do as they are told. A compiled program is what it is.
  void train(bool on = true) override;

 private:
  std::unique_ptr<detail::LoadedProgram> program_;
  std::vector<at::Tensor> weights_;
  std::optional<bool> training_;
};

struct LoadOptions {
  /// Which program of a file that has several; empty: the only one.
  std::string entry = "";
  /// Its parameters and buffers are used in place of the file's of the same names, as the
  /// tensors that they are: what one module writes, the other sees. The programs of one file
  /// share their weights so, and one without weights gets them.
  std::shared_ptr<torch::nn::Module> weights_of = nullptr;
  /// Of a compiled program that Python made: you vouch that a call writes none of its
  /// arguments and weights, draws no random numbers, returns new tensors only, and that their
  /// sizes follow from the arguments' sizes. It can then be one op among others on the lazy
  /// device. Reprise's packages say so themselves.
  bool functional = false;
};

/// Reads a `.pt2` file:
///
/// - A program that Python's `torch.export.save` wrote. Its ops run like those of C++ code:
///   on every device, compiled on the lazy one, with gradients. Sizes that were dynamic stay so.
/// - An AOTInductor package, made by `reprise::export_package` or by Python's
///   `torch._inductor.aoti_compile_and_package`. It runs on the device that it was compiled
///   for, and gives no gradients. On the lazy device, with the module moved there, a call is
///   an op among others, which compiled programs make as it is, where it is known to be
///   functional (`LoadOptions::functional`); other calls run at once, between two programs.
///
/// A package of a training step (`ExportOptions::training_step`) writes its parameters and
/// buffers in each call; calls may not overlap then.
///
/// Throws c10::Error, which names the file, where it is missing, damaged, of another kind or
/// version, made for a device that is not there, or has ops that are not registered; c10::ValueError
/// where weights have values neither in the file nor in `weights_of`.
REPRISE_API std::shared_ptr<LoadedModule> load_package(const std::string& path,
                                                       const LoadOptions& options = {});

}  // namespace reprise
