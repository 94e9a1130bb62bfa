/// \file
/// Runs an AOTInductor package. No Python.
#pragma once

#include <memory>
#include <string>

#include "lazy_backend/program.h"

namespace reprise {

/// Loads the package at `path`. Throws where it is damaged or made for another
/// torch or device.
std::shared_ptr<Runner> load_package_runner(const std::string& path);

}  // namespace reprise
