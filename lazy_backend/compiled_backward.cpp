#include "lazy_backend/compiled_backward.h"

#include <ATen/SequenceNumber.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <unordered_set>

#include "lazy_backend/autograd_node.h"
#include "lazy_backend/session.h"

namespace reprise {
namespace {

namespace autograd = torch::autograd;
using autograd::Edge;
using autograd::variable_list;

/// The same tensor without its history.
at::Tensor without_history(const at::Tensor& tensor) {
  return at::Tensor(tensor.unsafeGetTensorImpl()->shallow_copy_and_detach(
      autograd::impl::version_counter(tensor), /*allow_tensor_metadata_change=*/true));
}

/// Dense, at the beginning of a storage of its own, with the strides of what it is the
/// gradient of: the same in each call, whoever made it.
at::Tensor as_planned(const at::Tensor& gradient, const Geometry& geometry, const at::TensorOptions& options,
                      const std::vector<const LazyStorage*>& others) {
  if (!gradient.defined()) {
    return at::zeros(geometry.sizes(), options);
  }
  const bool own = is_lazy(gradient) &&
                   std::find(others.begin(), others.end(), lazy_storage(gradient)) == others.end();
  if (own && geometry.matches(*gradient.unsafeGetTensorImpl())) return without_history(gradient);
  const c10::AutoGradMode no_grad(false);
  return at::empty_strided(geometry.sizes(), geometry.strides(), options).copy_(gradient);
}

Geometry dense_geometry(const at::Tensor& like) {
  Geometry geometry(*like.unsafeGetTensorImpl());
  geometry.offset = 0;
  geometry.conjugate = geometry.negative = false;
  if (like.is_non_overlapping_and_dense()) return geometry;
  int64_t stride = 1;
  for (uint32_t k = geometry.rank; k-- > 0;) {
    geometry.dims[geometry.rank + k] = stride;
    stride *= std::max<int64_t>(geometry.dims[k], 1);
  }
  return geometry;
}

/// Gradients as planned, none of which shares memory with another one or with `others`.
std::vector<at::Tensor> all_as_planned(const variable_list& gradients, const std::vector<Geometry>& geometries,
                                       c10::Device device, std::vector<const LazyStorage*> others) {
  std::vector<at::Tensor> planned;
  for (size_t k = 0; k < gradients.size(); ++k) {
    const auto options = at::TensorOptions().dtype(geometries[k].dtype).device(device);
    planned.push_back(as_planned(gradients[k], geometries[k], options, others));
    others.push_back(lazy_storage(planned.back()));
  }
  return planned;
}

/// Finds the leaves behind results. Returns why a graph cannot be cut out, or nothing.
class GraphCut {
 public:
  GraphCut(const std::vector<at::Tensor>& arguments, uint64_t first_node) : first_node_(first_node) {
    for (size_t k = 0; k < arguments.size(); ++k) {
      if (!arguments[k].defined() || !arguments[k].requires_grad()) continue;
      const auto same = [&](const at::Tensor& other) { return other.is_same(arguments[k]); };
      if (std::any_of(tensors.begin(), tensors.end(), same)) continue;
      inputs.push_back(
          {static_cast<int64_t>(k), c10::weak_intrusive_ptr<c10::TensorImpl>(arguments[k].getIntrusivePtr()), {}});
      tensors.push_back(arguments[k]);
      edges_.push_back(autograd::impl::gradient_edge(arguments[k]));
    }
  }

  std::string follow(const std::vector<at::Tensor>& results) {
    for (uint32_t k = 0; k < results.size(); ++k) {
      if (std::string reason = follow(results[k], k); !reason.empty()) return reason;
    }
    // Libtorch would call them for our pass through its graph, and again for the outer one.
    const auto has_hooks = [](const at::Tensor& tensor) {
      const auto node = tensor.grad_fn();
      return !autograd::impl::hooks(tensor).empty() ||
             (node != nullptr && (!node->tensor_pre_hooks().empty() || !node->retains_grad_hooks().empty()));
    };
    if (std::any_of(tensors.begin(), tensors.end(), has_hooks)) {
      return "a tensor that gets a gradient from it has hooks";
    }
    return "";
  }

  std::vector<GradientInput> inputs;
  std::vector<at::Tensor> tensors;  ///< of the inputs

 private:
  std::string follow(const at::Tensor& result, uint32_t number) {
    std::vector<Edge> open{autograd::impl::gradient_edge(result)};
    std::unordered_set<const autograd::Node*> met;
    while (!open.empty()) {
      const Edge edge = open.back();
      open.pop_back();
      if (!edge.is_valid()) continue;
      if (const auto input = input_of(edge)) {
        auto& reached_by = inputs[*input].results;
        if (reached_by.empty() || reached_by.back() != number) reached_by.push_back(number);
        continue;
      }
      if (!met.insert(edge.function.get()).second) continue;
      if (edge.function->sequence_nr() < first_node_) {
        return "it uses a tensor that takes part in autograd and is no argument";
      }
      for (const Edge& next : edge.function->next_edges()) open.push_back(next);
    }
    return "";
  }
  /// The input behind an edge; a leaf is one from now on.
  std::optional<size_t> input_of(const Edge& edge) {
    const auto found = std::find_if(edges_.begin(), edges_.end(), [&](const Edge& input) {
      return input.function == edge.function && input.input_nr == edge.input_nr;
    });
    if (found != edges_.end()) return static_cast<size_t>(found - edges_.begin());
    const auto* leaf = dynamic_cast<autograd::AccumulateGrad*>(edge.function.get());
    if (leaf == nullptr) return std::nullopt;
    inputs.push_back({-1, c10::weak_intrusive_ptr<c10::TensorImpl>(leaf->variable.getIntrusivePtr()), {}});
    tensors.push_back(leaf->variable);
    edges_.push_back(edge);
    return edges_.size() - 1;
  }
  const uint64_t first_node_;
  std::vector<Edge> edges_;  ///< of the inputs
};

/// What a pass has `made` of gradients, as libtorch's own pass would give it: nothing where
/// no gradient leads to an input, and the same tensor where it is the same, which tells those
/// who keep a gradient whether it is theirs alone.
void finish_gradients(variable_list& made, const variable_list& gradients, const std::vector<GradientInput>& inputs) {
  const auto same = [](const at::Tensor& a, const at::Tensor& b) {
    return a.defined() && b.defined() && is_lazy(a) && is_lazy(b) && lazy_storage(a) == lazy_storage(b) &&
           Geometry(*a.unsafeGetTensorImpl()).matches(*b.unsafeGetTensorImpl());
  };
  for (size_t k = 0; k < made.size(); ++k) {
    const auto given = [&](uint32_t result) { return gradients[result].defined(); };
    if (std::none_of(inputs[k].results.begin(), inputs[k].results.end(), given)) {
      made[k] = at::Tensor();
      continue;
    }
    const auto is_this = [&](const at::Tensor& other) { return same(other, made[k]); };
    auto known = std::find_if(gradients.begin(), gradients.end(), is_this);
    if (known == gradients.end()) {
      const auto end = made.begin() + static_cast<std::ptrdiff_t>(k);
      const auto earlier = std::find_if(made.begin(), end, is_this);
      if (earlier != end) made[k] = *earlier;
    } else {
      made[k] = *known;
    }
  }
}

/// The backward pass of a call that was traced: libtorch's own, traced.
class TracedBackward final : public autograd::Node {
 public:
  TracedBackward(TracedForward&& forward, GraphCut&& cut, std::vector<uint32_t> results, std::vector<at::Tensor> inner)
      : forward_(std::move(forward)), inputs_(std::move(cut.inputs)), tensors_(std::move(cut.tensors)),
        results_(std::move(results)), inner_(std::move(inner)) {
    for (const at::Tensor& tensor : tensors_) add_next_edge(autograd::impl::gradient_edge(tensor));
    for (const at::Tensor& tensor : inner_) geometries_.push_back(dense_geometry(tensor));
  }
  std::string name() const override { return "TracedBackward(" + forward_.name + ")"; }

  void release_variables() override {
    inner_.clear();
    forward_.arguments.clear();
    forward_.created.clear();
  }

 private:
  variable_list apply(variable_list&& gradients) override {
    variable_list made = pass(gradients);
    finish_gradients(made, gradients, inputs_);
    return made;
  }

  variable_list pass(const variable_list& gradients) {
    TORCH_CHECK(!inner_.empty(), "Trying to backward through ", forward_.name, " a second time, after what it kept "
                "for that has been freed. Specify retain_graph=True if you need to backward a second time.");
    const bool keep = autograd::get_current_graph_task_keep_graph();
    if (c10::GradMode::is_enabled()) {
      forward_.found(nullptr, "its gradients are differentiated");
      return autograd::grad(inner_, tensors_, defined(gradients), /*retain_graph=*/true, /*create_graph=*/true,
                            /*allow_unused=*/true);
    }
    std::vector<const LazyStorage*> others = storages_of(forward_.arguments);
    for (const auto& [slot, storage] : forward_.created) others.push_back(storage.get());
    Session& session = Session::current();
    bool whole = !session.in_function();
    forward_.with_seen([&](SeenBackward& seen) { whole = whole && seen.reason.empty(); });
    if (!whole) {
      return autograd::grad(inner_, tensors_, defined(gradients), keep, /*create_graph=*/false, /*allow_unused=*/true);
    }
    const std::vector<at::Tensor> planned =
        all_as_planned(gradients, geometries_, inner_.front().device(), std::move(others));
    session.begin_function(forward_.function, forward_.name + "'s backward pass", /*whole=*/false, /*watch=*/false);
    variable_list made;
    try {
      made = autograd::grad(inner_, tensors_, planned, keep, /*create_graph=*/false, /*allow_unused=*/true);
    } catch (...) {
      session.abandon_function();
      throw;
    }
    const FunctionTrace run = session.end_function();
    // A second pass through the same graph has the same inputs, which says nothing of others.
    if (!std::exchange(noted_, true)) note(run, planned, made);
    return made;
  }

  /// Zeros in the places of those that are not there.
  variable_list defined(const variable_list& gradients) const {
    variable_list out = gradients;
    for (size_t k = 0; k < out.size(); ++k) {
      if (!out[k].defined()) out[k] = at::zeros(inner_[k].sizes(), inner_[k].options());
    }
    return out;
  }

  void note(const FunctionTrace& run, const std::vector<at::Tensor>& gradients, const variable_list& made) {
    PlanPtr backward;
    std::string reason;
    forward_.with_seen([&](SeenBackward& seen) {
      seen.reason = !run.broken_by.empty() ? "its backward pass is not one program: " + run.broken_by : run.no_program;
      if (run.verified && seen.reason.empty() && forward_.plan != nullptr) {
        std::vector<const LazyStorage*> arguments = storages_of(gradients);
        const auto before = storages_of(forward_.arguments);
        arguments.insert(arguments.end(), before.begin(), before.end());
        for (const uint32_t slot : forward_.plan->kept) arguments.push_back(created(slot));
        detail::Pack result;
        result.tensors = made;
        PlannedRun planned{run, arguments, result};
        planned.first_given = static_cast<uint32_t>(gradients.size());
        planned.last_given = planned.first_given + static_cast<uint32_t>(forward_.arguments.size());
        backward = plan_of(seen.run, planned, seen.reason);
      }
      reason = seen.reason;
    });
    if (backward == nullptr) {
      if (!reason.empty()) forward_.found(nullptr, reason);
      return;
    }
    auto plan = std::make_shared<DifferentiablePlan>();
    plan->forward = forward_.plan;
    plan->backward = backward;
    plan->results = results_;
    plan->gradients = geometries_;
    plan->inputs = inputs_;
    for (const Plan::Source& source : backward->inputs) {
      if (source.kind != Plan::Source::Kind::kArgument || source.index < gradients.size()) continue;
      const auto saved = static_cast<uint32_t>(source.index - gradients.size());
      const auto arguments = static_cast<uint32_t>(forward_.arguments.size());
      if (saved < arguments) {
        plan->saved_arguments.push_back(saved);
      } else {
        plan->saved_kept.push_back(saved - arguments);
      }
    }
    for (const auto& [argument, storage] : backward->same_arguments) {
      plan->same_arguments.emplace_back(static_cast<uint32_t>(argument - gradients.size()), storage);
    }
    const auto& watched = forward_.plan->watched;
    for (uint32_t k = 0; k < watched.size(); ++k) {
      const auto reads = [&](const auto& bound) { return bound.get() == watched[k].storage; };
      if (std::any_of(backward->bound.begin(), backward->bound.end(), reads)) plan->saved_watched.push_back(k);
    }
    forward_.found(std::move(plan), "");
  }

  const LazyStorage* created(uint32_t slot) const {
    for (const auto& [number, storage] : forward_.created) {
      if (number == slot) return storage.get();
    }
    return nullptr;
  }

  TracedForward forward_;
  const std::vector<GradientInput> inputs_;
  const std::vector<at::Tensor> tensors_;
  const std::vector<uint32_t> results_;
  std::vector<Geometry> geometries_;
  std::vector<at::Tensor> inner_;  ///< results with libtorch's history
  bool noted_ = false;
};

/// The backward pass of a call that was replayed: a program.
class ReplayedBackward final : public autograd::Node {
 public:
  ReplayedBackward(DifferentiablePlanPtr plan, std::string name, const std::vector<at::Tensor>& arguments,
                   std::vector<at::Tensor> kept, const std::vector<at::Tensor>& inputs,
                   const std::vector<at::Tensor>& results)
      : plan_(std::move(plan)), name_(std::move(name)), arguments_(arguments), kept_(std::move(kept)) {
    for (const at::Tensor& input : inputs) add_next_edge(autograd::impl::gradient_edge(input));
    for (at::Tensor& argument : arguments_) {
      versions_.push_back(argument.defined() && !argument.is_inference() ? argument._version() : 0);
      if (argument.defined()) argument = without_history(argument);  // no circle of nodes
    }
    for (const uint32_t k : plan_->saved_watched) {
      const auto tensor = plan_->forward->watched[k].tensor.lock();
      watched_versions_.push_back(tensor && !tensor->is_inference() ? tensor->version_counter().current_version() : 0);
    }
    std::vector<const LazyStorage*> saved;
    for (const uint32_t k : plan_->saved_arguments) saved.push_back(lazy_storage(arguments_[k]));
    for (const uint32_t k : plan_->saved_kept) saved.push_back(lazy_storage(kept_[k]));
    for (const at::Tensor& result : results) {
      if (!is_lazy(result) || std::find(saved.begin(), saved.end(), lazy_storage(result)) == saved.end()) continue;
      // Not the result itself, whose history this node is.
      saved_results_.emplace_back(autograd::impl::version_counter(result), result._version());
    }
  }
  std::string name() const override { return "ReplayedBackward(" + name_ + ")"; }

  void release_variables() override {
    arguments_.clear();
    kept_.clear();
    released_ = true;
  }

 private:
  variable_list apply(variable_list&& gradients) override {
    TORCH_CHECK(!released_, "Trying to backward through ", name_, " a second time, after what it kept for that has "
                "been freed. Specify retain_graph=True if you need to backward a second time.");
    TORCH_CHECK(!c10::GradMode::is_enabled(), "reprise: the gradients of ", name_, " are to be differentiated "
                "(create_graph), which its compiled backward pass cannot be; call the function itself there, or do so "
                "from its first call on");
    check_versions();
    std::vector<at::Tensor> all = arguments_;
    all.insert(all.end(), kept_.begin(), kept_.end());
    std::vector<at::Tensor> call = all_as_planned(gradients, plan_->gradients, device(), storages_of(all));
    call.insert(call.end(), all.begin(), all.end());
    auto made = replay(*plan_->backward, call);
    TORCH_CHECK(made, "reprise: the backward pass of ", name_, " failed");
    finish_gradients(made->tensors, gradients, plan_->inputs);
    return std::move(made->tensors);
  }

  c10::Device device() const { return {c10::kLazy, plan_->backward->program->device_index}; }

  void check_versions() const {
    constexpr const char* kChanged =
        "one of the variables needed for gradient computation has been modified by an inplace operation: ";
    for (const uint32_t k : plan_->saved_arguments) {
      const at::Tensor& argument = arguments_[k];
      if (!argument.defined() || argument.is_inference()) continue;
      TORCH_CHECK(argument._version() == versions_[k], kChanged, "tensor ", k, " among the arguments of ", name_,
                  " is at version ", argument._version(), "; expected version ", versions_[k], " instead.");
    }
    for (size_t k = 0; k < plan_->saved_watched.size(); ++k) {
      const auto tensor = plan_->forward->watched[plan_->saved_watched[k]].tensor.lock();
      if (!tensor || tensor->is_inference()) continue;
      const auto version = tensor->version_counter().current_version();
      TORCH_CHECK(version == watched_versions_[k], kChanged, "a tensor of ", tensor->sizes(), " that ", name_,
                  " uses is at version ", version, "; expected version ", watched_versions_[k], " instead.");
    }
    for (const auto& [counter, version] : saved_results_) {
      TORCH_CHECK(counter.current_version() == version, kChanged, "a result of ", name_, " is at version ",
                  counter.current_version(), "; expected version ", version, " instead.");
    }
  }

  const DifferentiablePlanPtr plan_;
  const std::string name_;
  std::vector<at::Tensor> arguments_, kept_;
  std::vector<int64_t> versions_, watched_versions_;
  std::vector<std::pair<c10::VariableVersion, int64_t>> saved_results_;
  bool released_ = false;
};

}  // namespace

uint64_t next_node() { return at::sequence_number::peek(); }

std::string trace_backward(TracedForward&& forward, uint64_t first_node, std::vector<at::Tensor>& results) {
  std::vector<uint32_t> which;
  std::vector<at::Tensor> inner;
  for (uint32_t k = 0; k < results.size(); ++k) {
    if (!results[k].defined() || !results[k].requires_grad()) continue;
    which.push_back(k);
    inner.push_back(results[k]);
  }
  GraphCut cut(forward.arguments, first_node);
  if (std::string reason = cut.follow(inner); !reason.empty()) return reason;
  const auto node = make_autograd_node<TracedBackward>(std::move(forward), std::move(cut), which, std::move(inner));
  for (const uint32_t k : which) {
    results[k] = without_history(results[k]);
    autograd::set_history(results[k], node);
  }
  return "";
}

std::optional<detail::Pack> replay_differentiable(const DifferentiablePlanPtr& plan, const std::string& name,
                                                  const std::vector<at::Tensor>& arguments) {
  std::vector<at::Tensor> inputs;
  for (const GradientInput& each : plan->inputs) {
    if (each.argument >= 0) {
      inputs.push_back(arguments[static_cast<size_t>(each.argument)]);
    } else if (auto leaf = each.leaf.lock()) {
      inputs.emplace_back(std::move(leaf));
    } else {
      return std::nullopt;
    }
    if (!inputs.back().requires_grad()) return std::nullopt;  // frozen since
  }
  for (const auto& [argument, storage] : plan->same_arguments) {
    if (lazy_storage(arguments[argument]) != storage) return std::nullopt;
  }
  auto pack = replay(*plan->forward, arguments);
  if (!pack) return std::nullopt;
  auto& tensors = pack->tensors;
  const auto results = static_cast<std::ptrdiff_t>(tensors.size() - plan->forward->kept.size());
  std::vector<at::Tensor> kept(tensors.begin() + results, tensors.end());
  tensors.resize(static_cast<size_t>(results));
  const auto node = make_autograd_node<ReplayedBackward>(plan, name, arguments, std::move(kept), inputs, tensors);
  for (const uint32_t k : plan->results) autograd::set_history(tensors[k], node);
  return pack;
}

}  // namespace reprise
