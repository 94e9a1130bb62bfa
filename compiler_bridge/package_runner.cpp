#include "compiler_bridge/package_runner.h"

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <atomic>
#include <mutex>

namespace reprise {
namespace {

/// A program without any computation is made for the CPU, wherever its inputs are.
bool runs_on_gpu(const std::string& path, const std::string& name) {
  const auto metadata =
      torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(path, name);
  const auto device = metadata.find("AOTI_DEVICE_KEY");
  return device != metadata.end() && device->second != "cpu";
}

/// On the CPU, what a program does touches nothing of the loaded model but its constants
/// (`run_impl` of the generated code, torch 2.11), so calls need not wait for each other, nor
/// take turns with several models: only the first one, which finishes the constants, is alone.
class CpuRunner final : public PackageRunner {
 public:
  CpuRunner(const std::string& path, const std::string& name)
      : loader_(path, name, /*run_single_threaded=*/true) {}
  std::vector<at::Tensor> run(std::vector<at::Tensor>&& inputs) override {
    if (C10_LIKELY(called_.load(std::memory_order_acquire))) {
      return loader_.boxed_run(std::move(inputs));
    }
    const std::lock_guard lock(first_call_);
    auto outputs = loader_.boxed_run(std::move(inputs));
    called_.store(true, std::memory_order_release);
    return outputs;
  }
  torch::inductor::AOTIModelPackageLoader& loader() override { return loader_; }

 private:
  void constants_changed() override { called_.store(false, std::memory_order_release); }

  std::mutex first_call_;
  std::atomic<bool> called_{false};
  torch::inductor::AOTIModelPackageLoader loader_;
};

/// Calls wait for each other on the host; what they launch does not. A package that serves
/// several calls at once records events, and cannot be captured as a graph
/// (aoti_runtime/model_base.h, torch 2.11).
class GpuRunner final : public PackageRunner {
 public:
  GpuRunner(const std::string& path, const std::string& name, c10::DeviceIndex index)
      : loader_(path, name, /*run_single_threaded=*/true, /*num_runners=*/1, index) {}
  std::vector<at::Tensor> run(std::vector<at::Tensor>&& inputs) override {
    const std::lock_guard lock(mutex_);
    return loader_.boxed_run(std::move(inputs));
  }
  torch::inductor::AOTIModelPackageLoader& loader() override { return loader_; }

 private:
  std::mutex mutex_;
  torch::inductor::AOTIModelPackageLoader loader_;
};

}  // namespace

void PackageRunner::load_constants(std::unordered_map<std::string, at::Tensor>& constants) {
  loader().load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/false, /*user_managed=*/true);
  constants_changed();
}

std::shared_ptr<PackageRunner> load_package_runner(const std::string& path, c10::Device device,
                                                   const std::string& name) {
  if (device.is_cpu() || !runs_on_gpu(path, name)) return std::make_shared<CpuRunner>(path, name);
  return std::make_shared<GpuRunner>(path, name, device.index());
}

}  // namespace reprise
