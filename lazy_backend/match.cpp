#include "lazy_backend/match.h"

#include <ATen/core/Tensor.h>

namespace reprise {

void CallHash::add(const c10::IValue& value) {
  if (value.isTensor()) {
    add(value.toTensor());
  } else if (value.isInt()) {
    add(value.toInt());
  } else if (value.isIntList()) {
    const auto numbers = value.toIntList();
    for (size_t k = 0; k < numbers.size(); ++k) add(numbers.get(k));
  } else if (value.isTensorList() || value.isOptionalTensorList()) {
    for (const c10::IValue& item : value.toListRef()) add(item);
  }
}

void CallHash::add(const Arg& arg) {
  switch (arg.kind) {
    case Arg::Kind::kTensor:
      add(arg.geometry().sizes());
      add(arg.geometry().offset);
      break;
    case Arg::Kind::kInt:
      add(arg.i);
      break;
    case Arg::Kind::kIntList:
      add(arg.ints());
      break;
    case Arg::Kind::kList:
      for (const Arg& item : arg.list()) add(item);
      break;
    default:
      break;
  }
}

bool Matcher::match_number(const Arg& arg, const at::Tensor& tensor) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  const c10::TensorImpl* recorded = arg.constant().toTensor().unsafeGetTensorImpl();
  if (!impl->key_set().has_backend(c10::BackendComponent::CPUBit) || impl->dim() != 0 ||
      impl->dtype() != recorded->dtype() ||
      impl->is_wrapped_number() != recorded->is_wrapped_number()) {
    return false;
  }
  const void* value = impl->data();
  if (impl->dtype() == caffe2::TypeMeta::Make<double>()) {
    return match_float(arg, *static_cast<const double*>(recorded->data()),
                       *static_cast<const double*>(value));
  }
  return std::memcmp(value, recorded->data(), impl->itemsize()) == 0;
}

bool Matcher::match_constant(const Arg& arg, const c10::IValue& value) {
  Arg other;
  other.kind = Arg::Kind::kConstant;
  other.set_constant(value);
  return arg.same(other, /*floats_may_differ=*/false);
}

bool Matcher::match(const Arg& arg, const c10::IValue& value) {
  switch (arg.kind) {
    case Arg::Kind::kNone:
      return value.isNone();
    case Arg::Kind::kUndefined:
    case Arg::Kind::kTensor:
    case Arg::Kind::kNumber:
      return value.isTensor() && match(arg, value.toTensor());
    case Arg::Kind::kInt:
      return value.isInt() && arg.i == value.toInt();
    case Arg::Kind::kBool:
      return value.isBool() && arg.b == value.toBool();
    case Arg::Kind::kDouble:
      return value.isDouble() && match_float(arg, arg.d, value.toDouble());
    case Arg::Kind::kIntList: {
      if (!value.isIntList()) return false;
      const auto list = value.toIntList();
      const auto recorded = arg.ints();
      if (list.size() != recorded.size()) return false;
      for (size_t k = 0; k < recorded.size(); ++k) {
        if (list.get(k) != recorded[k]) return false;
      }
      return true;
    }
    case Arg::Kind::kList: {
      if (!value.isList()) return false;
      const auto items = value.toListRef();
      if (items.size() != arg.list().size()) return false;
      for (size_t k = 0; k < items.size(); ++k) {
        if (!match(arg.list()[k], items[k])) return false;
      }
      return true;
    }
    case Arg::Kind::kDevice:
      return value.isDevice() && value.toDevice() == arg.constant().toDevice();
    case Arg::Kind::kConstant:
      return match_constant(arg, value);
    case Arg::Kind::kOpaque:
      return false;
  }
  return false;
}

}  // namespace reprise
