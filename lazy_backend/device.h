/// \file
/// Registers `torch::kLazy` with libtorch and says which backing device stands
/// behind each lazy one.
///
/// The registration goes through the lazy tensor core's backend registrar, which
/// gives the device its count and its guard. Nothing else of that core is on the
/// way of an op.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/DispatchKeySet.h>

namespace reprise {

/// The device of the tensors that stand behind `lazy:index`.
c10::Device backing_device_of(c10::DeviceIndex index);

/// The calling thread's current device where `index` is -1, as in `torch::kLazy`.
c10::DeviceIndex lazy_index(c10::DeviceIndex index);

/// The dispatch keys of a plain tensor on a backing device.
c10::DispatchKeySet backing_key_set(c10::Device device);

/// At this key, above autograd, an op on a lazy tensor finds out whether the user has
/// switched autocast on: see autocast.cpp.
constexpr auto kAutocastKey = c10::DispatchKey::TESTING_ONLY_GenericWrapper;

/// The dispatch keys of every lazy tensor, but for those of autograd.
constexpr c10::DispatchKeySet kLazyKeys({c10::DispatchKey::Lazy, kAutocastKey});

/// True where `device` is the lazy device or one of its backing devices' kind.
bool is_backing_kind(c10::Device device);

}  // namespace reprise
