/// \file
/// Explicit compile: a function that is replayed by one call.
///
/// ```cpp
/// auto forward = reprise::compile(model);                        // a module, or
/// auto step = reprise::compile([&](const at::Tensor& x) { ... }); // any function of tensors
/// auto y = forward(x);
/// ```
///
/// The first calls run the function, and are recorded and verified as always. Once what they
/// do has a compiled program, a call runs that program and nothing of the function. What is
/// replayed belongs to a *key*: sizes, strides and dtypes of the tensors among the arguments
/// (and which of them share memory), all other arguments, 0-dim tensors of the CPU by their
/// value, grad mode, autocast, training mode and the settings that change what ops mean.
/// Another key is traced anew.
///
/// Tensors that the function uses beside its arguments are bound by their storage: what is
/// written into them is seen. Where a tensor that was bound gets another storage
/// (`set_data`, `Module::to`), is frozen or unfrozen, or has a gradient where it had none, the
/// function is traced anew. A C++ variable that is assigned
/// another tensor is not noticed: hand it in as an argument.
///
/// Results take part in autograd as eager's do. A backward pass through a compiled function is
/// compiled too: both passes are replayed once both have a program, which needs some backward
/// passes to have run. Gradients of gradients (`create_graph`) keep the function from being
/// replayed where they are asked for from the first calls on, and are an error at that backward
/// pass where they are asked for later.
///
/// A function that a program cannot stand for goes on being run and verified, and
/// `explain()` says why: it reads a value in the middle, a number in it changes from call to
/// call without being an argument, it keeps a tensor that it has made (gradients apart), an
/// argument is a tensor of another device, a tensor that gets a gradient has hooks.
///
/// ```cpp
/// auto train = reprise::compile(step, {.optimizers = {&adam}});  // forward, backward, adam.step()
/// ```
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <bit>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "reprise/export_macros.h"

namespace torch::optim {
class Optimizer;
}  // namespace torch::optim

namespace reprise {

struct CompileOptions {
  /// What `explain()` calls the function. Empty: `function-1` and so on.
  std::string name = {};
  /// What would keep the function from being replayed is an error, at the call inside the
  /// function that is the cause, or at the end of the call.
  bool fullgraph = false;
  /// Whose `step()` the function calls, once a call. What they compute in C++ (Adam's bias
  /// corrections, the learning rate that a schedule has set between two calls) is given to the
  /// program by each call, and their counters go on. SGD, Adam, AdamW, Adagrad and RMSprop, not
  /// classes derived of them. They must be there as long as the function is called.
  std::vector<torch::optim::Optimizer*> optimizers = {};
};

namespace detail {

/// The arguments of a call taken apart: tensors, and all else as numbers.
struct Pack {
  std::vector<at::Tensor> tensors;
  std::vector<int64_t> key;

  void add(const at::Tensor& tensor) { tensors.push_back(tensor); }
  template <class T>
  void add(const std::vector<T>& list) {
    key.push_back(static_cast<int64_t>(list.size()));
    for (const T& each : list) add(each);
  }
  template <class T>
  void add(const std::optional<T>& value) {
    key.push_back(value.has_value() ? 1 : 0);
    if (value.has_value()) add(*value);
  }
  template <class... T>
  void add(const std::tuple<T...>& values) {
    std::apply([this](const auto&... each) { (add(each), ...); }, values);
  }
  template <class A, class B>
  void add(const std::pair<A, B>& values) {
    add(values.first);
    add(values.second);
  }
  template <class T>
  void add(const std::map<std::string, T>& values) {
    key.push_back(static_cast<int64_t>(values.size()));
    for (const auto& [name, value] : values) {
      add(std::string_view(name));
      add(value);
    }
  }
  void add(std::string_view text) {
    key.push_back(static_cast<int64_t>(text.size()));
    for (const char c : text) key.push_back(c);
  }
  void add(double number) { key.push_back(std::bit_cast<int64_t>(number)); }
  template <class T>
    requires(std::is_integral_v<T> || std::is_enum_v<T>)
  void add(T number) {
    key.push_back(static_cast<int64_t>(number));
  }
};

/// Puts a result together again. Results hold tensors alone.
struct Unpack {
  const std::vector<at::Tensor>& tensors;
  const std::vector<int64_t>& key;
  size_t next_tensor = 0, next_key = 0;

  template <class T>
  struct As {};
  template <class T>
  T take() {
    return take(As<T>());
  }

 private:
  at::Tensor take(As<at::Tensor>) { return tensors[next_tensor++]; }
  template <class T>
  std::vector<T> take(As<std::vector<T>>) {
    std::vector<T> list(static_cast<size_t>(key[next_key++]));
    for (T& each : list) each = take<T>();
    return list;
  }
  template <class T>
  std::optional<T> take(As<std::optional<T>>) {
    return key[next_key++] != 0 ? std::optional<T>(take<T>()) : std::nullopt;
  }
  template <class... T>
  std::tuple<T...> take(As<std::tuple<T...>>) {
    return std::tuple<T...>{take<T>()...};  // braces: in this order
  }
  template <class A, class B>
  std::pair<A, B> take(As<std::pair<A, B>>) {
    return std::pair<A, B>{take<A>(), take<B>()};
  }
  template <class T>
  std::map<std::string, T> take(As<std::map<std::string, T>>) {
    std::map<std::string, T> values;
    for (auto count = key[next_key++]; count > 0; --count) {
      std::string name(static_cast<size_t>(key[next_key++]), ' ');
      for (char& c : name) c = static_cast<char>(key[next_key++]);
      values.emplace(std::move(name), take<T>());
    }
    return values;
  }
};

class Function;

/// One function and all that is known of it. Copies share it.
class REPRISE_API FunctionHandle {
 public:
  explicit FunctionHandle(const CompileOptions& options);
  /// Replays or runs `body`, which gives the result taken apart.
  Pack call(Pack&& arguments, c10::function_ref<Pack()> body) const;

 private:
  std::shared_ptr<Function> function_;
};

}  // namespace detail

/// What `compile` returns: called as the function is. Calls may come from several threads at
/// once, also within each other. Throws what the function throws, and with
/// `CompileOptions::fullgraph` a c10::Error that says what cannot be replayed.
template <class F, class Mode>
class Compiled {
 public:
  Compiled(F function, Mode mode, const CompileOptions& options)
      : function_(std::make_shared<F>(std::move(function))), mode_(std::move(mode)), handle_(options) {}

  template <class... Args>
  auto operator()(const Args&... args) const {
    using Result = std::decay_t<std::invoke_result_t<F&, const Args&...>>;
    detail::Pack arguments;
    arguments.tensors.reserve(sizeof...(Args));
    arguments.key.reserve(32);
    mode_(arguments);
    (arguments.add(args), ...);
    const auto body = [&]() -> detail::Pack {
      detail::Pack result;
      if constexpr (std::is_void_v<Result>) {
        (*function_)(args...);
      } else {
        result.add((*function_)(args...));
      }
      return result;
    };
    const detail::Pack result = handle_.call(std::move(arguments), body);
    if constexpr (!std::is_void_v<Result>) {
      return detail::Unpack{result.tensors, result.key}.template take<Result>();
    }
  }

 private:
  std::shared_ptr<F> function_;
  Mode mode_;
  detail::FunctionHandle handle_;
};

namespace detail {

struct NoMode {
  void operator()(Pack&) const {}
};

/// Which of a module's parts are in training mode.
template <class Module>
struct TrainingMode {
  std::vector<std::shared_ptr<Module>> parts;
  void operator()(Pack& key) const {
    uint64_t bits = 0;
    for (size_t k = 0; k < parts.size(); ++k) {
      bits = bits << 1 | (parts[k]->is_training() ? 1 : 0);
      if (k % 64 == 63 || k + 1 == parts.size()) key.add(std::exchange(bits, 0));
    }
  }
};

template <class F>
concept ModuleHolder = requires(F holder) {
  holder->is_training();
  holder->modules();
};
template <class F>
concept AnyModule = requires(F module) {
  module.ptr()->modules();
  module.is_empty();
};

}  // namespace detail

/// Compiles a function of tensors: its arguments and its result are tensors, vectors, tuples,
/// pairs, optionals and maps (by std::string) of them, nested at will; arguments may be
/// numbers, enumerators and strings too; the result may be void.
template <class F>
auto compile(F function, const CompileOptions& options = {}) {
  if constexpr (detail::ModuleHolder<F>) {  // torch::nn::Linear, std::shared_ptr<MyModule>
    using Module = typename std::decay_t<decltype(function->modules())>::value_type::element_type;
    detail::TrainingMode<Module> mode{function->modules()};
    auto call = [function](const auto&... args) mutable { return function->forward(args...); };
    return Compiled(std::move(call), std::move(mode), options);
  } else if constexpr (detail::AnyModule<F>) {  // torch::nn::AnyModule
    using Module = typename std::decay_t<decltype(function.ptr()->modules())>::value_type::element_type;
    detail::TrainingMode<Module> mode{function.ptr()->modules()};
    auto call = [function](const auto&... args) mutable { return function.forward(args...); };
    return Compiled(std::move(call), std::move(mode), options);
  } else {
    return Compiled(std::move(function), detail::NoMode(), options);
  }
}

}  // namespace reprise
