#include "compiler_bridge/package_runner.h"

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <mutex>
#include <optional>
#include <span>

namespace reprise {
namespace {

using torch::aot_inductor::tensor_handle_to_tensor_pointer;
using torch::aot_inductor::tensor_pointer_to_tensor_handle;

/// A program without any computation is made for the CPU, wherever its inputs are.
bool runs_on_gpu(const std::string& path, const std::string& name) {
  const auto metadata =
      torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(path, name);
  const auto device = metadata.find("AOTI_DEVICE_KEY");
  return device != metadata.end() && device->second != "cpu";
}

/// The code of a loaded package, called as AOTIModelContainerRunner::boxed_run does (torch
/// 2.11), without its lists and its table of results, which cost more than a small program.
class Entrance {
 public:
  explicit Entrance(const torch::inductor::AOTIModelContainerRunner& loaded) {
    Members::take(loaded, *this);
  }

  /// Takes the inputs away.
  std::vector<at::Tensor> call(std::vector<at::Tensor>&& inputs) const {
    // Handles are tensors on the heap: the code frees those of the inputs, we those it returns.
    std::array<AtenTensorHandle, 32> few{};  // the place of a result that is None stays null
    std::vector<AtenTensorHandle> many;
    std::span<AtenTensorHandle> handles = few;
    const size_t count = inputs.size() + results_;
    if (count > few.size()) {
      many.resize(count);
      handles = many;
    }
    const auto given = handles.subspan(0, inputs.size());
    const auto returned = handles.subspan(inputs.size(), results_);
    std::transform(inputs.begin(), inputs.end(), given.begin(), [](at::Tensor& input) {
      return tensor_pointer_to_tensor_handle(new at::Tensor(std::move(input)));
    });
    TORCH_CHECK(run_(container_, given.data(), given.size(), returned.data(), returned.size(),
                     /*stream_handle=*/nullptr, proxy_executor_) == AOTI_RUNTIME_SUCCESS,
                "a compiled package failed", reason_());
    inputs.clear();
    for (const AtenTensorHandle handle : returned) {
      inputs.push_back(handle == nullptr ? at::Tensor() : *tensor_handle_to_tensor_pointer(handle));
    }
    // One that is returned in two places is one handle.
    std::sort(returned.begin(), returned.end());
    const auto end = std::unique(returned.begin(), returned.end());
    std::for_each(returned.begin(), end, [](AtenTensorHandle handle) {
      delete tensor_handle_to_tensor_pointer(handle);
    });
    return std::move(inputs);
  }

 private:
  struct Members : torch::inductor::AOTIModelContainerRunner {  // to come by what is protected
    static void take(const AOTIModelContainerRunner& from, Entrance& to) {
      to.run_ = from.*(&Members::run_func_);
      to.container_ = from.*(&Members::container_handle_);
      to.proxy_executor_ = from.*(&Members::proxy_executor_handle_);
      to.reason_ = reason_of<Members>(from);
      const auto count = from.*(&Members::get_num_outputs_func_);
      TORCH_CHECK(count(to.container_, &to.results_) == AOTI_RUNTIME_SUCCESS);
    }

   private:
    template <class M>
    static std::function<std::string()> reason_of(const AOTIModelContainerRunner& from) {
      constexpr const char* kPrinted = ", for the reason that it has printed";
      if constexpr (requires { &M::get_last_error_func_; }) {  // not in torch 2.11, nor its packages
        return [get = from.*(&M::get_last_error_func_)]() -> std::string {
          const char* text = nullptr;
          const bool known = get != nullptr && get(&text) == AOTI_RUNTIME_SUCCESS;
          return known && text != nullptr && *text != '\0' ? std::string(": ") + text : kPrinted;
        };
      } else {
        return [] { return kPrinted; };
      }
    }
  };

  decltype(&AOTInductorModelContainerRun) run_ = nullptr;
  AOTInductorModelContainerHandle container_ = nullptr;
  AOTIProxyExecutorHandle proxy_executor_ = nullptr;
  size_t results_ = 0;
  std::function<std::string()> reason_;
};

/// On the CPU, what a program does touches nothing of the loaded model but its constants
/// (`run_impl` of the generated code, torch 2.11), so calls need not wait for each other, nor
/// take turns with several models: only the first one, which finishes the constants, is alone.
class CpuRunner final : public PackageRunner {
 public:
  CpuRunner(const std::string& path, const std::string& name)
      : loader_(path, name, /*run_single_threaded=*/true), entrance_(*loader_.get_runner()) {}
  std::vector<at::Tensor> run(std::vector<at::Tensor>&& inputs) override {
    if (C10_LIKELY(called_.load(std::memory_order_acquire))) {
      return entrance_.call(std::move(inputs));
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
  const Entrance entrance_;
};

/// Calls wait for each other on the host; what they launch does not. A package that serves
/// several calls at once records events, and cannot be captured as a graph
/// (aoti_runtime/model_base.h, torch 2.11).
class GpuRunner final : public PackageRunner {
 public:
  GpuRunner(const std::string& path, const std::string& name, c10::DeviceIndex index)
      : loader_(path, name, /*run_single_threaded=*/true, /*num_runners=*/1, index) {
    if (index >= 0) device_.emplace(c10::kCUDA, index);
  }
  std::vector<at::Tensor> run(std::vector<at::Tensor>&& inputs) override {
    // It launches on the current stream of the current device.
    const c10::OptionalDeviceGuard guard(device_);
    const std::lock_guard lock(mutex_);
    return loader_.boxed_run(std::move(inputs));
  }
  torch::inductor::AOTIModelPackageLoader& loader() override { return loader_; }

 private:
  std::mutex mutex_;
  torch::inductor::AOTIModelPackageLoader loader_;
  std::optional<c10::Device> device_;  ///< nothing: the current one
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
