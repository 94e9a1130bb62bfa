#include "compiler_bridge/package_runner.h"

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <mutex>

namespace reprise {
namespace {

class PackageRunner final : public Runner {
 public:
  explicit PackageRunner(const std::string& path) : loader_(path) {}
  std::vector<at::Tensor> run(std::vector<at::Tensor>&& inputs) override {
    // One call at a time: AOTInductor's container has one model, and its first
    // call deadlocks with others that wait for it (aoti_runtime/model_container.h,
    // torch 2.11: it wants its lock exclusively while they hold it shared).
    const std::lock_guard lock(mutex_);
    return loader_.boxed_run(std::move(inputs));
  }

 private:
  std::mutex mutex_;
  torch::inductor::AOTIModelPackageLoader loader_;
};

}  // namespace

std::shared_ptr<Runner> load_package_runner(const std::string& path) {
  return std::make_shared<PackageRunner>(path);
}

}  // namespace reprise
