/// \file
/// What only the CUDA runtime tells. A build against a torch without CUDA has none of it.
#pragma once

#include <c10/core/Device.h>

#include <string>

namespace reprise {

/// What programs for this device are made for: `NVIDIA H100 80GB HBM3 sm_90`. Empty for a
/// device that is no GPU.
std::string gpu_model(c10::Device device);

/// Whether the device runs machine code for this compute capability, 90 for `sm_90`: of the same
/// major version, and not of a later minor one (CUDA C++ programming guide, "Binary
/// Compatibility"). From 9.0 on of the very same: Triton compiles for `sm_90a` and the like, which
/// no other one runs. True for a device that is no GPU.
bool runs_code_for(c10::Device device, int capability);

}  // namespace reprise
