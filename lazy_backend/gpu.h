/// \file
/// What only the CUDA runtime tells. A build against a torch without CUDA has none of it.
#pragma once

#include <c10/core/Device.h>

#include <string>

namespace reprise {

/// What programs for this device are made for: `NVIDIA H100 80GB HBM3 sm_90`. Empty for a
/// device that is no GPU.
std::string gpu_model(c10::Device device);

}  // namespace reprise
