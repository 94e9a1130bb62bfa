#include "lazy_backend/device.h"

#include <ATen/Context.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/lazy/backend/backend_interface.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string_view>

#include "lazy_backend/storage.h"
#include "reprise/device.h"

namespace reprise {
namespace {

using torch::lazy::BackendDataPtr;
using torch::lazy::BackendDevice;
using torch::lazy::BackendDeviceType;
using torch::lazy::ComputationPtr;
using torch::lazy::Shape;

struct DeviceType final : BackendDeviceType {
  explicit DeviceType(c10::DeviceType backing) { type = static_cast<int8_t>(backing); }
  std::string toString() const override {
    return std::string("REPRISE_") + c10::DeviceTypeName(static_cast<c10::DeviceType>(type));
  }
};

int cuda_devices() { return at::hasCUDA() ? static_cast<int>(at::detail::getCUDAHooks().deviceCount()) : 0; }

c10::Device choose_backing() {
  if (const char* wanted = std::getenv("REPRISE_BACKING")) return c10::Device(std::string(wanted));
  return cuda_devices() > 0 ? c10::kCUDA : c10::kCPU;
}

/// The lazy device that a thread begins with.
std::atomic<c10::DeviceIndex>& first_index() {
  static std::atomic<c10::DeviceIndex> index = std::max<c10::DeviceIndex>(choose_backing().index(), 0);
  return index;
}

/// The lazy tensor core asks a backend for much that belongs to its own graph
/// executor. Reprise has its own, so these are errors.
[[noreturn]] void not_part_of_reprise(const char* what) {
  TORCH_CHECK(false, "reprise: ", what,
              " belongs to the lazy tensor core's executor, which Reprise does not use");
}

class Backend final : public torch::lazy::BackendImplInterface {
 public:
  Backend() : type_(std::make_shared<DeviceType>(choose_backing().type())) {}

  void PrepareToExit() const override {}
  void SetRngSeed(size_t) const override {}
  const torch::lazy::IrBuilder* GetIrBuilder() const override { return nullptr; }

  BackendDataPtr MakeComputationDataFromTensor(const at::Tensor&, const Shape&,
                                               const BackendDevice&) const override {
    not_part_of_reprise("MakeComputationDataFromTensor");
  }
  BackendDataPtr MakeComputationDataFromScalar(const at::Scalar&,
                                               const BackendDevice&) const override {
    not_part_of_reprise("MakeComputationDataFromScalar");
  }
  BackendDataPtr CreateDataPlaceholder(const BackendDevice&, const Shape&) const override {
    not_part_of_reprise("CreateDataPlaceholder");
  }
  BackendDataPtr GetComputationDataFromNode(const torch::lazy::Node*) const override {
    return nullptr;
  }
  at::Tensor MakeTensorFromComputationData(const BackendDataPtr,
                                           std::optional<at::ScalarType>) const override {
    not_part_of_reprise("MakeTensorFromComputationData");
  }
  std::unique_ptr<torch::lazy::LoweringContext> CreateLoweringContext(
      const std::string&, BackendDevice, c10::ArrayRef<const torch::lazy::Node*>,
      torch::lazy::Util::EmissionMap) const override {
    not_part_of_reprise("CreateLoweringContext");
  }
  std::unique_ptr<torch::lazy::LoweringContext> CreateLoweringContext(
      const std::string&, BackendDevice) const override {
    not_part_of_reprise("CreateLoweringContext");
  }
  std::vector<std::string> GetCompilationDevices(
      const std::string&, c10::ArrayRef<std::string>) const override {
    return {};
  }
  std::vector<ComputationPtr> Compile(std::vector<ComputationPtr>) const override {
    not_part_of_reprise("Compile");
  }
  std::vector<BackendDataPtr> ExecuteComputation(ComputationPtr, c10::ArrayRef<BackendDataPtr>,
                                                 const BackendDevice&) const override {
    not_part_of_reprise("ExecuteComputation");
  }

  std::shared_ptr<BackendDeviceType> GetDefaultDeviceType() const override { return type_; }
  void SetDefaultDeviceType(int8_t type) override {
    type_->type = type;
  }
  int64_t GetDefaultDeviceOrdinal() const override { return ordinal_; }
  void SetDefaultDeviceOrdinal(int64_t ordinal) override { ordinal_ = ordinal; }
  at::DeviceType EagerFallbackDeviceType() const override { return backing(); }

  std::vector<BackendDevice> GetBackendDevices() const override {
    const int count = backing() == c10::kCUDA ? cuda_devices() : 1;
    std::vector<BackendDevice> devices;
    for (int i = 0; i < count; ++i) {
      devices.emplace_back(std::shared_ptr<BackendDeviceType>(type_), i);
    }
    return devices;
  }
  BackendDevice GetBackendDevice(c10::Device device) const override {
    return BackendDevice(std::shared_ptr<BackendDeviceType>(type_),
                         device.has_index() ? device.index() : 0);
  }
  std::string GetComputationBackendText(const ComputationPtr) const override { return ""; }

  c10::DeviceType backing() const { return static_cast<c10::DeviceType>(type_->type); }

 private:
  std::shared_ptr<DeviceType> type_;
  // The device guard's current device; a guard may be set on any thread.
  static thread_local int64_t ordinal_;
};
thread_local int64_t Backend::ordinal_ = 0;

Backend& backend() {
  static auto* instance = new Backend;  // outlives every tensor
  return *instance;
}

/// The lazy tensor core's own guard (torch/csrc/lazy/core/tensor_impl.cpp) begins
/// with a device that has no index, so that `x.to(torch::kLazy)` of a lazy tensor
/// would copy it: `lazy:0` is not `lazy`. It is registered before this one.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kLazy; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {c10::kLazy, current_}; }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_ = std::max<c10::DeviceIndex>(device.index(), 0);
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(getDevice()); }
  c10::DeviceIndex deviceCount() const noexcept override {
    return static_cast<c10::DeviceIndex>(backend().GetBackendDevices().size());
  }

 private:
  static thread_local c10::DeviceIndex current_;
};
thread_local c10::DeviceIndex Guard::current_ = first_index();

C10_REGISTER_GUARD_IMPL(Lazy, Guard)

struct Registration {
  Registration() {
    TORCH_CHECK(!torch::lazy::hasBackend(),
                "reprise: another lazy-tensor-core backend is registered in this process "
                "(its TorchScript backend?): only one can own torch::kLazy");
    static torch::lazy::BackendRegistrar registrar(&backend());
  }
};
const Registration registration;

}  // namespace

c10::Device backing_device_of(c10::DeviceIndex index) {
  const c10::DeviceType type = backend().backing();
  return type == c10::kCPU ? c10::Device(c10::kCPU)
                           : c10::Device(type, lazy_index(index));
}

c10::DeviceIndex lazy_index(c10::DeviceIndex index) {
  return index < 0 ? Guard().getDevice().index() : index;
}

c10::DispatchKeySet backing_key_set(c10::Device device) {
  const auto key = device.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  const c10::DispatchKeySet keys(key);
  return c10::InferenceMode::is_enabled()
             ? keys
             : keys | c10::getAutogradRelatedKeySetFromBackend(c10::toBackendComponent(key));
}

bool is_backing_kind(c10::Device device) {
  return device.is_lazy() || device.type() == backend().backing();
}

void set_backing_device(c10::Device device) {
  TORCH_CHECK_VALUE(device.is_cpu() || device.is_cuda(), "reprise: set_backing_device: cpu, cuda or cuda:i, not ",
                    device);
  TORCH_CHECK_VALUE(device.is_cpu() || std::max<int>(device.index(), 0) < cuda_devices(),
                    "reprise: set_backing_device: there is no ", device, " here");
  TORCH_CHECK(device.type() == backend().backing() || !LazyStorage::any_was_made(),
              "reprise: set_backing_device: lazy tensors were made already, on ", backend().backing());
  backend().SetDefaultDeviceType(static_cast<int8_t>(device.type()));
  first_index() = device.is_cpu() ? c10::DeviceIndex{0} : std::max<c10::DeviceIndex>(device.index(), 0);
  Guard().setDevice({c10::kLazy, first_index()});
}

c10::Device backing_device(c10::DeviceIndex lazy_index) { return backing_device_of(lazy_index); }

}  // namespace reprise
