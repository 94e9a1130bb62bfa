#include "lazy_backend/gpu.h"

#ifdef REPRISE_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <c10/util/StringUtil.h>
#endif

namespace reprise {

#ifdef REPRISE_WITH_CUDA

std::string gpu_model(c10::Device device) {
  if (!device.is_cuda()) return "";
  const cudaDeviceProp& gpu = *at::cuda::getDeviceProperties(device.index());
  return c10::str(gpu.name, " sm_", gpu.major, gpu.minor);
}

bool runs_code_for(c10::Device device, int capability) {
  if (!device.is_cuda()) return true;
  const cudaDeviceProp& gpu = *at::cuda::getDeviceProperties(device.index());
  const int major = capability / 10, minor = capability % 10;
  return major == gpu.major && (major < 9 ? minor <= gpu.minor : minor == gpu.minor);
}

#else

std::string gpu_model(c10::Device) { return ""; }
bool runs_code_for(c10::Device, int) { return true; }

#endif

}  // namespace reprise
