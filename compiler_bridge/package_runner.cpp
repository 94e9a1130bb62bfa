#include "compiler_bridge/package_runner.h"

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>

namespace reprise {
namespace {

class PackageRunner final : public Runner {
 public:
  explicit PackageRunner(const std::string& path)
      : loader_(path, "model", /*run_single_threaded=*/false, calls_at_once()) {}
  std::vector<at::Tensor> run(std::vector<at::Tensor>&& inputs) override {
    if (C10_LIKELY(called_.load(std::memory_order_acquire))) {
      return loader_.boxed_run(std::move(inputs));
    }
    // The first call deadlocks with others that wait for it (aoti_runtime/model_container.h,
    // torch 2.11: it wants its lock exclusively while they hold it shared).
    const std::lock_guard lock(first_call_);
    auto outputs = loader_.boxed_run(std::move(inputs));
    called_.store(true, std::memory_order_release);
    return outputs;
  }

 private:
  /// More wait for one that ends.
  static size_t calls_at_once() {
    constexpr unsigned kMost = 16;
    return std::clamp(std::thread::hardware_concurrency(), 1u, kMost);
  }

  std::mutex first_call_;
  std::atomic<bool> called_{false};
  torch::inductor::AOTIModelPackageLoader loader_;
};

}  // namespace

std::shared_ptr<Runner> load_package_runner(const std::string& path) {
  return std::make_shared<PackageRunner>(path);
}

}  // namespace reprise
