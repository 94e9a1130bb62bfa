/// \file
/// The functions of reprise/package.h.
#include <algorithm>
#include <map>

#include "interchange/compiled_package.h"
#include "interchange/exported_program.h"
#include "reprise/export.h"
#include "reprise/package.h"

namespace reprise {
namespace {

/// The module that holds what is called `name`, made where there is none: `a.b.weight` lies
/// in the submodule `b` of the submodule `a`.
torch::nn::Module& holder_of(torch::nn::Module& root, std::string& name) {
  torch::nn::Module* module = &root;
  for (size_t dot; (dot = name.find('.')) != std::string::npos; name.erase(0, dot + 1)) {
    const std::string part = name.substr(0, dot);
    std::shared_ptr<torch::nn::Module> child;
    for (const auto& each : module->named_children()) {
      if (each.key() == part) child = each.value();
    }
    if (child == nullptr) child = module->register_module(part, std::make_shared<torch::nn::Module>(part));
    module = child.get();
  }
  return *module;
}

std::string listed(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

}  // namespace

LoadedModule::LoadedModule(std::unique_ptr<detail::LoadedProgram> program, const torch::nn::Module* weights_of)
    : torch::nn::Module("LoadedModule"), program_(std::move(program)) {
  std::map<std::string, at::Tensor> given;
  if (weights_of != nullptr) {
    const NamedTensors named = named_tensors(*weights_of);
    given.insert(named.begin(), named.end());
  }
  std::vector<detail::LoadedProgram::Weight> all = program_->take_weights();
  std::vector<std::string> missing;
  for (detail::LoadedProgram::Weight& weight : all) {
    const auto found = given.find(weight.name);
    // A number may mean another tensor in another program: it is taken where there is no choice.
    if (found != given.end() && (weight.named || !weight.tensor.defined())) {
      const at::Tensor &own = weight.tensor, &other = found->second;
      TORCH_CHECK_VALUE(!own.defined() || (own.sizes() == other.sizes() && own.scalar_type() == other.scalar_type()),
                        "reprise: '", weight.name, "' of LoadOptions::weights_of: ", own.scalar_type(), own.sizes(),
                        " expected, and ", other.scalar_type(), other.sizes(), " came");
      weight.tensor = other;
    }
    if (!weight.tensor.defined()) missing.push_back(weight.name);
  }
  TORCH_CHECK_VALUE(missing.empty(), "reprise: the file has no values for ", listed(missing), ", and ",
                    weights_of == nullptr ? "LoadOptions::weights_of names no module that does"
                                          : "the module of LoadOptions::weights_of has not either");
  for (detail::LoadedProgram::Weight& weight : all) {
    const bool again = std::any_of(weights_.begin(), weights_.end(),
                                   [&](const at::Tensor& tensor) { return tensor.is_same(weight.tensor); });
    weights_.push_back(weight.tensor);
    if (again) continue;
    std::string name = std::move(weight.name);
    torch::nn::Module& holder = holder_of(*this, name);
    if (weight.is_parameter) {
      holder.register_parameter(name, weight.tensor, weight.tensor.requires_grad());
    } else {
      holder.register_buffer(name, weight.tensor);
    }
  }
}

LoadedModule::~LoadedModule() = default;

at::Tensor LoadedModule::forward(const at::Tensor& input) {
  std::vector<at::Tensor> results = run({input});
  TORCH_CHECK(!results.empty(), "reprise: the program returns nothing");
  return std::move(results.front());
}

std::vector<at::Tensor> LoadedModule::run(const std::vector<at::Tensor>& inputs) {
  return program_->run(weights_, inputs, training_);
}

const std::vector<std::string>& LoadedModule::input_names() const { return program_->input_names(); }

void LoadedModule::train(bool on) {
  torch::nn::Module::train(on);
  training_ = on;
}

std::shared_ptr<LoadedModule> load_package(const std::string& path, const LoadOptions& options) {
  Pt2Archive archive(path);
  const std::vector<std::string> exported = archive.exported_programs(), compiled = archive.compiled_programs();
  std::vector<std::string> all = exported;
  all.insert(all.end(), compiled.begin(), compiled.end());
  TORCH_CHECK(!all.empty(), "reprise: '", path, "' has neither a program of torch.export nor one of AOTInductor");
  TORCH_CHECK_VALUE(!options.entry.empty() || all.size() == 1, "reprise: '", path, "' has several programs (",
                    listed(all), "); name one in LoadOptions::entry");
  const std::string name = options.entry.empty() ? all.front() : options.entry;
  const auto has = [&](const std::vector<std::string>& names) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  TORCH_CHECK_VALUE(has(all), "reprise: '", path, "' has no program '", name, "', but ", listed(all));
  std::unique_ptr<detail::LoadedProgram> program;
  if (has(exported)) {
    program = std::make_unique<ExportedProgram>(archive, name);
  } else {
    program = std::make_unique<CompiledPackage>(archive, name, options.functional);
  }
  return std::make_shared<LoadedModule>(std::move(program), options.weights_of.get());
}

}  // namespace reprise
