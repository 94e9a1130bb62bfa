/// \file
/// Types of arguments as schemas declare them.
#pragma once

#include <ATen/core/jit_type.h>

namespace reprise {

/// `T` for `T?`, and a type that is not optional as it is.
inline c10::TypePtr without_optional(c10::TypePtr type) {
  if (const auto optional = type->cast<c10::OptionalType>()) return optional->getElementType();
  return type;
}

}  // namespace reprise
