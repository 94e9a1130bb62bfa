#include "interchange/compiled_package.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/library.h>

#include <dlfcn.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>

#include "lazy_backend/gpu.h"
#include "lazy_backend/session.h"
#include "lazy_backend/storage.h"
#include "lazy_backend/trace_tree.h"

namespace reprise {
namespace {

/// Those that are loaded, by their key: an op of the dispatcher takes no pointer.
struct Packages {
  std::mutex mutex;
  std::map<std::string, CompiledPackage*, std::less<>> all;
  std::map<std::string, uint64_t> loaded;  ///< of a name, so many until now
};
Packages& packages() {
  static auto* instance = new Packages;
  return *instance;
}

std::vector<at::Tensor> run_package(c10::string_view key, at::TensorList inputs, at::TensorList weights,
                                    at::TensorList written) {
  CompiledPackage* package = nullptr;
  {
    Packages& registry = packages();
    const std::lock_guard lock(registry.mutex);
    const auto found = registry.all.find(std::string_view(key.data(), key.size()));
    TORCH_CHECK(found != registry.all.end(), "reprise: the package ", key, " is not loaded any more");
    package = found->second;
  }
  return package->run_here(inputs.vec(), weights, written);
}

std::vector<at::Tensor> call_package(c10::string_view key, at::TensorList inputs, at::TensorList weights) {
  return run_package(key, inputs, weights, {});
}

/// The results that there are, without those that are None. `geometry`: of each its rank, sizes
/// and strides.
std::vector<at::Tensor> call_package_as_recorded(c10::string_view key, at::TensorList inputs,
                                                 const std::optional<c10::List<at::Tensor>>& weights,
                                                 c10::string_view, c10::IntArrayRef geometry) {
  std::vector<at::Tensor> results =
      call_package(key, inputs, weights.has_value() ? weights->vec() : std::vector<at::Tensor>());
  std::erase_if(results, [](const at::Tensor& result) { return !result.defined(); });
  for (const at::Tensor& result : results) {
    const auto rank = static_cast<size_t>(result.dim());
    TORCH_CHECK(geometry.size() > 2 * rank && geometry[0] == result.dim() &&
                    geometry.slice(1, rank) == result.sizes() && geometry.slice(1 + rank, rank) == result.strides(),
                "reprise: the package ", key, " returned other sizes than it did before for inputs of the same: ",
                result.sizes());
    geometry = geometry.slice(1 + 2 * rank);
  }
  return results;
}

// A call that may write, or of which little is known, is no step of a trace; `call_package` is
// one (op_policy.cpp). Compiled programs call its overload `as_recorded`: see trace_writer.cpp.
TORCH_LIBRARY_FRAGMENT(reprise, m) {
  m.def("run_package(str package, Tensor[] inputs, Tensor[] weights, Tensor(a!)[] written) -> Tensor[]");
  m.def("call_package(str package, Tensor[] inputs, Tensor[] weights) -> Tensor[]");
  m.def("call_package.as_recorded(str package, Tensor[] inputs, Tensor[]? weights, str dtypes, SymInt[] geometry) "
        "-> Tensor[]");
}
void implement_on_a_device(torch::Library& m) {
  m.impl("run_package", run_package);
  m.impl("call_package", call_package);
  m.impl("call_package.as_recorded", call_package_as_recorded);
}
TORCH_LIBRARY_IMPL(reprise, CPU, m) { implement_on_a_device(m); }
TORCH_LIBRARY_IMPL(reprise, CUDA, m) { implement_on_a_device(m); }
TORCH_LIBRARY_IMPL(reprise, Autograd, m) {
  m.impl("run_package", torch::autograd::autogradNotImplementedFallback());
  m.impl("call_package", torch::autograd::autogradNotImplementedFallback());
}

bool any_lazy(const std::vector<at::Tensor>& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& each) { return is_lazy(each); });
}
bool all_lazy(const std::vector<at::Tensor>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const at::Tensor& each) { return is_lazy(each); });
}

/// The device that the metadata name. Throws where it is not there.
c10::Device device_of(const std::unordered_map<std::string, std::string>& metadata) {
  const auto named = metadata.find("AOTI_DEVICE_KEY");
  const c10::Device device(named == metadata.end() ? "cpu" : named->second);
  TORCH_CHECK(device.is_cpu() || (device.is_cuda() && at::hasCUDA()), "it was compiled for ",
              device.type(), ", and there is no such device here");
  return device;
}

/// Throws where the package's machine code is for another GPU than `device`. What carries PTX as
/// well, or only calls libraries, runs on others.
void check_architecture(c10::Device device, const std::unordered_map<std::string, std::string>& metadata,
                        const Pt2Archive& archive) {
  const auto capability = metadata.find("AOTI_COMPUTE_CAPABILITY");
  if (!device.is_cuda() || capability == metadata.end()) return;
  const auto& files = archive.records();
  const auto any = [&](std::string_view ending) {
    return std::any_of(files.begin(), files.end(), [&](const std::string& file) { return file.ends_with(ending); });
  };
  if (!any(".cubin") || any(".fatbin")) return;
  int number = 0;
  const char* const end = capability->second.data() + capability->second.size();
  const auto read = std::from_chars(capability->second.data(), end, number);
  if (read.ec != std::errc() || read.ptr != end) return;
  const c10::Device here = device.has_index() ? device : c10::impl::VirtualGuardImpl(c10::kCUDA).getDevice();
  TORCH_CHECK(runs_code_for(here, number), "it was compiled for sm_", number, ", and ", here, " is ", gpu_model(here));
}

/// Packages that Python makes ask for `libtorch.so` by name, which a program that links the
/// libraries behind it need not have loaded, and which is found beside these.
void have_libtorch() {
  static const bool once = [] {
    Dl_info info;
    if (::dladdr(reinterpret_cast<const void*>(&at::globalContext), &info) != 0 && info.dli_fname != nullptr) {
      const auto folder = std::filesystem::path(info.dli_fname).parent_path();
      ::dlopen((folder / "libtorch.so").c_str(), RTLD_LAZY | RTLD_LOCAL);
    }
    return true;
  }();
  (void)once;
}

/// How many arguments Python's calling convention says: the leaves of a tree.
size_t leaves_of(const nlohmann::json& tree) {
  if (tree.at("type").is_null()) return 1;
  size_t count = 0;
  for (const auto& child : tree.at("children_spec")) count += leaves_of(child);
  return count;
}

std::optional<size_t> arguments_of(const std::vector<std::string>& call_spec) {
  const auto spec = nlohmann::json::parse(call_spec.empty() ? "" : call_spec[0], nullptr, /*allow_exceptions=*/false);
  if (!spec.is_array() || spec.size() != 2) return std::nullopt;
  return leaves_of(spec[1]);
}

}  // namespace

at::Tensor with_strides(const at::Tensor& tensor, c10::IntArrayRef strides) {
  if (tensor.strides() == strides) return tensor;
  return at::empty_strided(tensor.sizes(), strides, tensor.options()).copy_(tensor);
}

CompiledPackage::CompiledPackage(Pt2Archive& archive, const std::string& name, bool functional)
    : path_(archive.path()), device_(c10::kCPU) {
  try {
    const auto metadata = torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(path_, name);
    device_ = device_of(metadata);
    check_architecture(device_, metadata, archive);
    inputs_ = inputs_in(metadata);
    functional_ = functional || is_functional(metadata);
    stored_ = archive.weights(name);
    described_ = weights_in(metadata).value_or(PackagedWeights{stored_.empty(), {}});
    have_libtorch();
    runner_ = load_package_runner(path_, device_, name);
  } catch (const std::exception& error) {
    const auto* known = dynamic_cast<const c10::Error*>(&error);
    TORCH_CHECK(false, "reprise: the package '", path_, "' cannot be loaded: ",
                known != nullptr ? known->what_without_backtrace() : error.what());
  }
  if (inputs_) {
    input_names_ = inputs_->names();
  } else if (const auto count = arguments_of(runner_->loader().get_call_spec())) {
    for (size_t k = 0; k < *count; ++k) input_names_.push_back("input_" + std::to_string(k));
  }
  Packages& registry = packages();
  const std::lock_guard lock(registry.mutex);
  // Traces name it: another process that loads the same files in the same order finds its programs.
  const std::string called = std::filesystem::path(path_).filename().string() + "/" + name;
  key_ = called + "#" + std::to_string(++registry.loaded[called]);
  registry.all.emplace(key_, this);
}

CompiledPackage::~CompiledPackage() {
  // What waits for a call of it is not to wait until it is gone.
  const auto calls = [&](const Step& step) {
    return step.op.operator_name().name == kPackageCall && step.args[0].constant().toStringView() == key_;
  };
  if (was_step_) {
    for (Session* session : Session::all()) {
      try {
        session->flush_where(calls, "a package is unloaded");
      } catch (const std::exception& error) {
        TORCH_WARN("reprise: a pending step failed when a package was unloaded: ", error.what());
      }
    }
  }
  Packages& registry = packages();
  const std::lock_guard lock(registry.mutex);
  registry.all.erase(key_);
}

std::vector<detail::LoadedProgram::Weight> CompiledPackage::take_weights() {
  std::map<std::string, at::Tensor> sorted;
  auto& loader = runner_->loader();
  if (described_.in_program) {
    for (const auto& [name, tensor] : loader.get_runner()->extract_constants_map(/*use_inactive=*/false)) {
      // They lie in the package, which stays as long as one of them.
      sorted[name] = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [keep = runner_](void*) {},
                                   tensor.options());
    }
  } else {
    for (const std::string& name : loader.get_constant_fqns()) {
      const auto stored = stored_.find(name);
      sorted[name] = stored == stored_.end() ? at::Tensor() : stored->second.to(device_);
    }
    stored_.clear();
  }
  std::vector<Weight> weights;
  for (auto& [name, tensor] : sorted) {
    const PackagedWeight* about = described_.find(name);
    TORCH_CHECK(about != nullptr || tensor.defined(), "reprise: the package '", path_, "' has no values for '", name,
                "', and does not say what it is");
    weight_names_.push_back(name);
    written_.push_back(about != nullptr && about->written);
    // As the program reads it: what the module gets in its place is compared with this.
    bound_.push_back(described_.in_program ? tensor.detach()
                     : about != nullptr
                         ? at::empty_strided(about->sizes, about->strides, at::device(c10::kMeta).dtype(about->dtype))
                         : at::empty_like(tensor, at::device(c10::kMeta)));
    const bool is_parameter = about != nullptr ? about->is_parameter : c10::isFloatingType(bound_.back().scalar_type());
    weights.push_back({name, std::move(tensor), is_parameter, about == nullptr || about->named});
  }
  return weights;
}

std::vector<at::Tensor> CompiledPackage::run(const std::vector<at::Tensor>& weights,
                                             const std::vector<at::Tensor>& inputs, std::optional<bool>) {
  if (inputs_) {
    inputs_->check(inputs);
  } else {
    TORCH_CHECK_VALUE(input_names_.empty() || inputs.size() == input_names_.size(), "reprise: '", path_, "' takes ",
                      input_names_.size(), " tensors, and ", inputs.size(), " came");
  }
  if (inputs.empty() && weights.empty()) return run_here({}, {}, {});
  if (functional_ && !writes() && all_lazy(inputs) && all_lazy(weights)) {
    was_step_ = true;
    using Call = std::vector<at::Tensor>(c10::string_view, at::TensorList, at::TensorList);
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(kPackageCall, "").typed<Call>();
    return op.call(key_, inputs, weights);
  }
  if (any_lazy(inputs) || any_lazy(weights) || traced_function() != 0) {
    // What reads them before this call, and has not run, is to find them as they are.
    Session::current().interrupt("a package that is not known to be functional was called");
  }
  std::vector<at::Tensor> read, written;
  for (size_t k = 0; k < weights.size(); ++k) {
    (written_[k] ? written : read).push_back(weights[k].requires_grad() ? weights[k].detach() : weights[k]);
  }
  // It computes its own gradients, if any.
  const c10::AutoGradMode grad(c10::GradMode::is_enabled() && !writes());
  using Run = std::vector<at::Tensor>(c10::string_view, at::TensorList, at::TensorList, at::TensorList);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("reprise::run_package", "").typed<Run>();
  return op.call(key_, inputs, read, written);
}

bool CompiledPackage::are_bound(const std::vector<at::Tensor>& weights) const {
  return std::equal(weights.begin(), weights.end(), bound_.begin(), bound_.end(), [](const at::Tensor& a, const at::Tensor& b) {
    return !b.is_meta() && a.data_ptr() == b.data_ptr() && a.sizes() == b.sizes() && a.strides() == b.strides() &&
           a.scalar_type() == b.scalar_type();
  });
}

void CompiledPackage::bind(const std::vector<at::Tensor>& weights) {
  std::unordered_map<std::string, at::Tensor> named;
  std::vector<at::Tensor> kept;
  for (size_t k = 0; k < weights.size(); ++k) {
    const at::Tensor& weight = weights[k];
    const at::Tensor& before = bound_[k];
    TORCH_CHECK(weight.device().type() == device_.type(), "reprise: '", weight_names_[k], "' of '", path_,
                "' lies on ", weight.device(), ", and the package was compiled for ", device_.type());
    TORCH_CHECK_VALUE(weight.sizes() == before.sizes() && weight.scalar_type() == before.scalar_type(), "reprise: '",
                      weight_names_[k], "' of '", path_, "': ", before.scalar_type(), before.sizes(),
                      " expected, and ", weight.scalar_type(), weight.sizes(), " came");
    TORCH_CHECK(!written_[k] || weight.strides() == before.strides(), "reprise: '", weight_names_[k], "' of '", path_,
                "' is written by the program, and has other strides than there");
    kept.push_back(with_strides(weight.detach(), before.strides()));
    named.emplace(weight_names_[k], kept.back());
  }
  runner_->load_constants(named);
  bound_ = std::move(kept);
}

std::vector<at::Tensor> CompiledPackage::run_here(const std::vector<at::Tensor>& inputs,
                                                  at::TensorList read, at::TensorList written) {
  const c10::AutoGradMode no_grad(false);
  for (size_t k = 0; k < inputs.size(); ++k) {
    TORCH_CHECK(inputs[k].device().type() == device_.type(), "reprise: input ", k, " of '", path_, "' lies on ",
                inputs[k].device(), ", and the package was compiled for ", device_.type());
  }
  std::vector<at::Tensor> weights;
  size_t next_read = 0, next_written = 0;
  if (!read.empty() || !written.empty()) {
    for (const bool is_written : written_) weights.push_back(is_written ? written[next_written++] : read[next_read++]);
  }
  {
    const std::shared_lock lock(mutex_);
    if (weights.empty() || are_bound(weights)) return runner_->run(std::vector<at::Tensor>(inputs));
  }
  // Others, with weights of their own, wait.
  const std::unique_lock lock(mutex_);
  bind(weights);
  return runner_->run(std::vector<at::Tensor>(inputs));
}

}  // namespace reprise
