/// \file
/// For work on the backing device, whatever the calling thread has switched on.
#pragma once

#include <c10/core/DispatchKeySet.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>

namespace reprise {

/// While it lives, ops go below autograd, which has done its part when an op reaches the
/// device, and below autocast: a step that is recorded under it may be run after it, and
/// must be the same step.
class BelowUserModes {
  c10::impl::ExcludeDispatchKeyGuard guard_{c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                            c10::autocast_dispatch_keyset};
};

/// While it lives, new tensors are no inference tensors.
class NormalTensors {
 public:
  NormalTensors() {
    if (C10_UNLIKELY(c10::InferenceMode::is_enabled())) guard_.emplace(false);
  }

 private:
  std::optional<c10::InferenceMode> guard_;
};

}  // namespace reprise
