/// \file
/// A compiled package as an object of TorchScript.
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>

#include "interchange/temporary_file.h"
#include "reprise/package.h"
#include "reprise/torchscript.h"

namespace reprise {
namespace {

/// A file for the time in which its content is loaded.
std::string scratch_path() {
  static std::atomic<uint64_t> next{0};
  return (std::filesystem::temp_directory_path() /
          c10::str("reprise-package-", ::getpid(), "-", next.fetch_add(1), ".pt2")).string();
}

void write_bytes(const at::Tensor& bytes, const std::string& path) {
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(bytes.const_data_ptr()), bytes.numel());
  TORCH_CHECK(file.flush().good(), "reprise: '", path, "' cannot be written");
}

at::Tensor bytes_of(const std::string& path) {
  TORCH_CHECK(std::filesystem::is_regular_file(path), "reprise: '", path, "' is no file");
  const auto size = static_cast<int64_t>(std::filesystem::file_size(path));
  at::Tensor bytes = at::empty({size}, at::TensorOptions().dtype(c10::kByte));
  std::ifstream file(path, std::ios::binary);
  file.read(static_cast<char*>(bytes.mutable_data_ptr()), size);
  TORCH_CHECK(file.gcount() == size, "reprise: '", path, "' cannot be read");
  return bytes;
}

/// `__torch__.torch.classes.reprise.Package`.
class ScriptPackage final : public torch::CustomClassHolder {
 public:
  ScriptPackage(at::Tensor bytes, const std::string& path) : bytes_(std::move(bytes)), module_(load_package(path)) {}

  c10::List<at::Tensor> run(const c10::List<at::Tensor>& inputs) {
    return c10::List<at::Tensor>(module_->run(inputs.vec()));
  }
  const at::Tensor& bytes() const { return bytes_; }

 private:
  const at::Tensor bytes_;  ///< the file, as it is saved with the module
  const std::shared_ptr<LoadedModule> module_;
};

TORCH_LIBRARY_FRAGMENT(reprise, m) {
  m.class_<ScriptPackage>("Package")
      .def("run", &ScriptPackage::run)
      .def_pickle([](const c10::intrusive_ptr<ScriptPackage>& self) { return self->bytes(); },
                  [](at::Tensor bytes) {
                    const TemporaryFile file(scratch_path());
                    write_bytes(bytes, file.path());
                    return c10::make_intrusive<ScriptPackage>(std::move(bytes), file.path());
                  });
}

}  // namespace

c10::IValue package_for_script(const std::string& path) {
  return c10::IValue(c10::make_intrusive<ScriptPackage>(bytes_of(path), path));
}

}  // namespace reprise
