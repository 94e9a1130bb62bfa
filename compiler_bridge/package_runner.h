/// \file
/// Runs an AOTInductor package. No Python.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>

#include "lazy_backend/program.h"

namespace torch::inductor {
class AOTIModelPackageLoader;
}

namespace reprise {

/// A loaded package.
class PackageRunner : public Runner {
 public:
  /// Others in the places of some of its constants, which stay the caller's. No call of it may
  /// be running.
  void load_constants(std::unordered_map<std::string, at::Tensor>& constants);
  virtual torch::inductor::AOTIModelPackageLoader& loader() = 0;

 private:
  virtual void constants_changed() {}
};

/// Loads the program `name` of the package at `path`, which was made for `device`. On a GPU it
/// runs on the calling thread's current stream. Throws where it is damaged or made for another
/// torch or device.
std::shared_ptr<PackageRunner> load_package_runner(const std::string& path, c10::Device device,
                                                   const std::string& name = "model");

}  // namespace reprise
