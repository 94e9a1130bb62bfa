/// \file
/// Nodes of autograd's graph: shared pointers in torch 2.11, intrusive ones in 2.15.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace reprise {

using AutogradNodePtr = std::remove_cvref_t<decltype(std::declval<const at::Tensor&>().grad_fn())>;

template <class T, class... Args>
auto make_autograd_node(Args&&... args) {
  if constexpr (std::is_same_v<AutogradNodePtr, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<T>(std::forward<Args>(args)...);
  } else {
    return c10::make_intrusive<T>(std::forward<Args>(args)...);
  }
}

}  // namespace reprise
