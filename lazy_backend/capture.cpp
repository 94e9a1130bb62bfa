#include "lazy_backend/capture.h"

#include <torch/library.h>

#include <string_view>
#include <unordered_set>

#include "lazy_backend/device.h"
#include "lazy_backend/session.h"

namespace reprise {

void capture_boxed(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Session::current().call(op, stack);
}

std::vector<std::string> ops_with_rival_kernels(c10::DispatchKey backing) {
  using c10::DispatchKey;
  constexpr std::string_view kPrefix = "aten::";
  auto& dispatcher = c10::Dispatcher::singleton();
  std::vector<std::string> names;
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    if (!name.name.starts_with(kPrefix)) continue;
    const auto op = dispatcher.findOp(name);
    if (!op || !op->hasSchema()) continue;
    const bool rival = op->hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd) ||
                       (op->hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd) &&
                        op->hasKernelForDispatchKey(backing));
    if (!rival) continue;
    names.push_back(name.name.substr(kPrefix.size()));
    if (!name.overload_name.empty()) names.back() += "." + name.overload_name;
  }
  return names;
}

namespace {

/// `set_data`, and with it `Module::to`, asks whether a tensor's implementation
/// can take over another's. Lazy tensors are plain ones, so it can.
bool has_compatible_shallow_copy_type(const at::Tensor&, const at::Tensor&) { return true; }

TORCH_LIBRARY_IMPL(_, Lazy, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&capture_boxed>());
}

/// Runs when the library is loaded, after libtorch has registered its ops.
struct Registration {
  Registration() {
    static auto* library = new torch::Library(torch::Library::IMPL, "aten",
                                              c10::DispatchKey::Lazy, __FILE__, __LINE__);
    library->impl("_has_compatible_shallow_copy_type", has_compatible_shallow_copy_type);
    std::unordered_set<std::string> taken{"_has_compatible_shallow_copy_type"};
    for (std::string& name : register_hot_ops()) taken.insert(std::move(name));

    const auto backing =
        backing_device_of(0).is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
    for (const std::string& name : ops_with_rival_kernels(backing)) {
      if (taken.contains(name)) continue;
      library->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&capture_boxed>());
    }
  }
};
const Registration registration;

}  // namespace
}  // namespace reprise
