/// \file
/// Compiled packages for programs that have neither Python nor Reprise.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "reprise/compile.h"
#include "reprise/export_macros.h"

namespace reprise {

/// A device that a package is made for, and that need not be there.
struct CompileTarget {
  std::string device = "cuda";  ///< no other can be named
  /// `sm_80`, `sm_89`, `sm_90`, `sm_100`, or a GPU: `A100`, `RTX 4090`, `L4`, `H100`, `H200`,
  /// `B200`. The package runs on every GPU of the architecture, and is tuned for the one named.
  std::string architecture = "";
};

/// Tensors by their names.
using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// Parameters and buffers of a module (`*holder`), with the names that it gives them.
template <class Module>
NamedTensors named_tensors(const Module& module) {
  NamedTensors named;
  for (const auto& each : module.named_parameters()) named.emplace_back(each.key(), each.value());
  for (const auto& each : module.named_buffers()) named.emplace_back(each.key(), each.value());
  return named;
}

/// Where the weights of a package are.
enum class Weights : uint8_t {
  kInProgram,  ///< in the program's own library: any libtorch runs it as it is
  /// In the file, once for all of its programs that use the same values. `load_package` reads
  /// them, and Python's `load_pt2(path, load_weights_from_disk=True)` where all programs of the
  /// file keep theirs so and are for the CPU.
  kInFile,
  /// Nowhere: `LoadOptions::weights_of` gives them, or `load_constants` of
  /// `AOTIModelPackageLoader`.
  kNotStored,
};

struct ExportOptions {
  /// Names of the tensors among the arguments, in order; written into the package's metadata
  /// and used in messages. Empty: `input_0` and so on.
  std::vector<std::string> input_names = {};
  /// Empty: the backing device. Needs Triton, which comes with a torch that was built with
  /// CUDA; neither GPU nor driver. What has been made is not run then.
  std::optional<CompileTarget> target = std::nullopt;
  /// What the program is called in the file: `LoadOptions::entry`, and `model_name` of
  /// `AOTIModelPackageLoader` and of Python's `torch._inductor.package.load_package`.
  std::string entry = "model";
  /// Adds the program to those in a file that is there, in place of one of the same name:
  /// `prefill` and `decode` of a language model, say.
  bool add_to_file = false;
  Weights weights = Weights::kInProgram;
  /// Names of tensors that the function uses beside its arguments; needless for those of a
  /// module that is exported itself. What has no name is called `weight_` and a number.
  NamedTensors weight_names = {};
  /// The function may write tensors that are no arguments: parameters and an optimizer's
  /// state, statistics of batch norm. The package writes its weights then, in place. Grad mode
  /// is on, and the function runs until it has done the same twice in a row, two to four times,
  /// and trains so often. A number that changes with each step is an error, but for those of
  /// `optimizers`.
  bool training_step = false;
  /// libtorch's optimizers that a training step runs, once each (SGD, Adam, AdamW, Adagrad,
  /// RMSprop). The package counts their steps, in weights called `optimizer_step`, and computes
  /// from them what changes with each: Adam's bias corrections, Adagrad's decay. Options stay
  /// what they are, the learning rate with them. What an optimizer keeps for a parameter that
  /// has a name is called by it and libtorch's name: `fc.weight_exp_avg`.
  std::vector<torch::optim::Optimizer*> optimizers = {};
};

namespace detail {

/// Puts other tensors in the places of those in a value; all else stays as it is.
struct Replace {
  const std::vector<at::Tensor>& tensors;
  size_t next = 0;

  void in(at::Tensor& tensor) { tensor = tensors[next++]; }
  template <class T>
  void in(std::vector<T>& list) {
    for (T& each : list) in(each);
  }
  template <class T>
  void in(std::optional<T>& value) {
    if (value.has_value()) in(*value);
  }
  template <class... T>
  void in(std::tuple<T...>& values) {
    std::apply([this](auto&... each) { (in(each), ...); }, values);
  }
  template <class A, class B>
  void in(std::pair<A, B>& values) {
    in(values.first);
    in(values.second);
  }
  template <class T>
  void in(std::map<std::string, T>& values) {
    for (auto& [name, value] : values) in(value);
  }
  template <class T>
  void in(T&) {}
};

template <class F>
NamedTensors names_of(const F& function) {
  if constexpr (ModuleHolder<F>) {
    return named_tensors(*function);
  } else if constexpr (AnyModule<F>) {
    return named_tensors(*function.ptr());
  } else {
    return {};
  }
}

/// Calls `function` on the example with other tensors in the places of those in it.
template <class F, class... Args>
auto on_other_tensors(F& function, const std::tuple<Args...>& example) {
  return [&](const std::vector<at::Tensor>& tensors) -> Pack {
    Pack result;
    std::tuple<Args...> other = example;
    Replace{tensors}.in(other);
    const auto call = [&](const auto&... args) {
      if constexpr (ModuleHolder<F>) {
        result.add(function->forward(args...));
      } else if constexpr (AnyModule<F>) {
        result.add(function.forward(args...));
      } else {
        result.add(function(args...));
      }
    };
    std::apply(call, other);
    return result;
  };
}

/// `body` runs the function on the example with these tensors in it.
REPRISE_API void export_function(Pack&& arguments,
                                 c10::function_ref<Pack(const std::vector<at::Tensor>&)> body,
                                 const NamedTensors& named, const std::string& path,
                                 const ExportOptions& options);
REPRISE_API void export_program(Pack&& arguments,
                                c10::function_ref<Pack(const std::vector<at::Tensor>&)> body,
                                const NamedTensors& named, const std::string& path,
                                const std::vector<std::string>& input_names,
                                const NamedTensors& weight_names);

}  // namespace detail

/// Runs a function or a module once on the example arguments, whose tensors are lazy, and
/// writes what it did to `path` (`.pt2`, replaced whole or not at all) as an AOTInductor
/// package for the backing device, or for another (`options.target`). Tensors that it uses
/// beside its arguments go in as weights, with the values that they have now; those of a
/// module keep their names.
///
/// The package runs in any program that links libtorch of the same version
/// (`torch::inductor::AOTIModelPackageLoader`), in Python
/// (`torch._inductor.aoti_load_package`), and as a module (`load_package`). It takes the
/// tensors among the arguments one by one, in order, as tensors of the backing device, and
/// returns those of the result. Arguments that are no tensors are constants of it.
///
/// Sizes of the example tensors that were marked (`mark_dynamic`) may be others in a call;
/// all other sizes are fixed. To find out what follows from a marked size, the function runs
/// at a few others too, on tensors that repeat the example's elements.
///
/// Blocks for the seconds that the compile takes, then runs the package on a copy of the
/// example arguments. Throws a c10::Error where the function reads a value in the middle, writes a
/// tensor that is no argument (but see `options.training_step`), returns what it has not made,
/// draws random numbers, or needs fixed what was marked; where nothing can be compiled; and
/// where the package gives other values than the function did. Grad mode is off while the
/// function runs, but for a training step.
template <class F, class... Args>
void export_package(F function, const std::tuple<Args...>& example, const std::string& path,
                    const ExportOptions& options = {}) {
  detail::Pack arguments;
  arguments.add(example);
  detail::export_function(std::move(arguments), detail::on_other_tensors(function, example),
                          detail::names_of(function), path, options);
}

/// As `export_package`, but writes what the function did as a program of Python's
/// torch.export, not compiled: for `torch.export.load` and what builds on it, and for
/// `load_package`, which runs and trains it. Ops are those of the backing device: fused
/// attention of the CPU stays that, all else runs on every device. Parameters that require
/// gradients stay parameters, others become buffers; results are a tuple, also where there is
/// one. `input_names` and `weight_names`: as in `ExportOptions`. Grad mode is on while the
/// function runs. Throws as `export_package`, and where gradients are cut inside (`detach`,
/// `NoGradGuard`).
template <class F, class... Args>
void export_program(F function, const std::tuple<Args...>& example, const std::string& path,
                    const std::vector<std::string>& input_names = {},
                    const NamedTensors& weight_names = {}) {
  detail::Pack arguments;
  arguments.add(example);
  detail::export_program(std::move(arguments), detail::on_other_tensors(function, example),
                         detail::names_of(function), path, input_names, weight_names);
}

}  // namespace reprise
