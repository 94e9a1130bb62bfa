/// \file
/// To and from TorchScript.
#pragma once

#include <torch/csrc/jit/api/module.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "reprise/export.h"

namespace reprise {

namespace detail {
REPRISE_API torch::jit::Module export_script(Pack&& arguments,
                                             c10::function_ref<Pack(const std::vector<at::Tensor>&)> body,
                                             const NamedTensors& named,
                                             const std::vector<std::string>& input_names);
}

/// Runs a function or a module once on the example arguments, whose tensors are lazy, and
/// gives what it did as a TorchScript module: the ops as they were recorded, not optimised,
/// for `torch::jit::load` and Python's `torch.jit.load` anywhere, without Reprise.
///
/// `forward` takes the tensors among the arguments one by one and returns the tensors of the
/// result, several as a tuple. Tensors that the function uses beside its arguments are the
/// module's, on the backing device, under the names that they have; what it writes into them
/// (batch norm's statistics in training mode) it goes on writing. `input_names`: as in
/// `ExportOptions`; they must be identifiers.
///
/// Sizes that were marked (`mark_dynamic`) may be others in a call, as in `export_package`.
///
/// Throws c10::Error where the function reads a value in the middle, returns what it has not
/// made, draws random numbers, or does what TorchScript has no op for. Grad mode is off while
/// the function runs.
template <class F, class... Args>
torch::jit::Module export_torchscript(F function, const std::tuple<Args...>& example,
                                      const std::vector<std::string>& input_names = {}) {
  detail::Pack arguments;
  arguments.add(example);
  return detail::export_script(std::move(arguments), detail::on_other_tensors(function, example),
                               detail::names_of(function), input_names);
}

/// A package (`export_package`, or Python's `torch._inductor.aoti_compile_and_package`) as an
/// object for TorchScript: `package.run([x])` runs it, from a graph that is saved with the
/// package in it and loads wherever `libreprise.so` is loaded, in C++ and in Python.
///
/// ```cpp
/// torch::jit::Module module("Served");
/// module.register_attribute("package", object.type(), object);
/// module.define("def forward(self, x):\n  return self.package.run([x])[0]\n");
/// ```
///
/// Throws as `load_package`.
REPRISE_API c10::IValue package_for_script(const std::string& path);

}  // namespace reprise
