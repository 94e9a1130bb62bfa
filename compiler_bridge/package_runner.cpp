#include "compiler_bridge/package_runner.h"

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

namespace reprise {
namespace {

class PackageRunner final : public Runner {
 public:
  explicit PackageRunner(const std::string& path) : loader_(path) {}
  std::vector<at::Tensor> run(std::vector<at::Tensor>&& inputs) override {
    return loader_.boxed_run(std::move(inputs));
  }

 private:
  torch::inductor::AOTIModelPackageLoader loader_;
};

}  // namespace

std::shared_ptr<Runner> load_package_runner(const std::string& path) {
  return std::make_shared<PackageRunner>(path);
}

}  // namespace reprise
