#include "lazy_backend/compiled_function.h"

#include <ATen/autocast_mode.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <unordered_set>

#include "lazy_backend/autograd_node.h"
#include "lazy_backend/compiled_backward.h"
#include "lazy_backend/device.h"
#include "lazy_backend/function_plan.h"
#include "lazy_backend/log.h"
#include "lazy_backend/session.h"
#include "lazy_backend/trace_tree.h"
#include "reprise/compile.h"

namespace reprise {
namespace {

using detail::Pack;

/// What has been found out of one key.
struct Entry {
  std::vector<int64_t> key;
  PlanPtr plan;
  DifferentiablePlanPtr both;  ///< in its place where the result takes part in autograd
  std::string reason;  ///< why there is no plan; empty where one may come
  bool watch = true;   ///< what the next run uses is watched, so that it can be planned
  uint64_t traced = 0;
  std::atomic<uint64_t> replayed{0};

  SeenRun seen;
  /// What the last run used, where it was watched.
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>> used;
  SeenBackward backward;
};

/// A 0-dim tensor of the host, which ops on lazy tensors take as a number.
bool is_number(const at::Tensor& tensor) {
  return tensor.device().is_cpu() && tensor.dim() == 0 && tensor.layout() == c10::kStrided;
}

void add_bytes(const at::Tensor& number, std::vector<int64_t>& key) {
  const auto* bytes = static_cast<const unsigned char*>(number.const_data_ptr());
  for (size_t k = 0; k < number.itemsize(); ++k) key.push_back(bytes[k]);
}

void add_geometry(const at::Tensor& tensor, std::vector<int64_t>& key) {
  if (!tensor.defined()) {
    key.push_back(-1);
    return;
  }
  key.push_back(tensor.dim());
  key.push_back(static_cast<int64_t>(tensor.scalar_type()) << 16 |
                static_cast<int64_t>(tensor.requires_grad()) << 8 |
                static_cast<int64_t>(tensor.is_conj()) << 1 | static_cast<int64_t>(tensor.is_neg()));
  key.push_back(static_cast<int64_t>(tensor.device().type()) << 8 | tensor.device().index());
  key.insert(key.end(), tensor.sizes().begin(), tensor.sizes().end());
  if (!is_lazy(tensor)) {
    if (is_number(tensor)) add_bytes(tensor, key);
    return;
  }
  key.insert(key.end(), tensor.strides().begin(), tensor.strides().end());
  key.push_back(tensor.storage_offset());
}

/// The rest of the key: what arguments look like, which share memory, modes.
void complete_key(Pack& arguments) {
  for (size_t k = 0; k < arguments.tensors.size(); ++k) {
    const at::Tensor& tensor = arguments.tensors[k];
    add_geometry(tensor, arguments.key);
    if (!is_lazy(tensor)) continue;
    for (size_t before = 0; before < k; ++before) {
      const at::Tensor& other = arguments.tensors[before];
      if (is_lazy(other) && lazy_storage(other) == lazy_storage(tensor)) {
        arguments.key.push_back(static_cast<int64_t>(before));
        break;
      }
    }
  }
  const auto type = backing_device_of(0).type();
  arguments.key.push_back(at::autocast::is_autocast_enabled(type)
                              ? static_cast<int64_t>(at::autocast::get_autocast_dtype(type)) << 1 |
                                    static_cast<int64_t>(at::autocast::is_autocast_cache_enabled())
                              : -1);
  arguments.key.push_back(static_cast<int64_t>(environment_key()) << 2 |
                          static_cast<int64_t>(c10::GradMode::is_enabled()) << 1 |
                          static_cast<int64_t>(c10::InferenceMode::is_enabled()));
}

}  // namespace

namespace detail {

class Function : public std::enable_shared_from_this<Function> {
 public:
  explicit Function(CompileOptions options);
  ~Function();

  Pack call(Pack&& arguments, c10::function_ref<Pack()> body);
  void explain(std::string& out) const;

 private:
  /// From more keys, those that came first are forgotten.
  static constexpr size_t kMostKeys = 256;

  struct Known {
    std::shared_ptr<Entry> entry;
    PlanPtr plan;
    DifferentiablePlanPtr both;
    bool watched = true;
  };
  Known known_of(const std::vector<int64_t>& key);
  std::optional<Pack> replay(Entry& entry, const Known& known, const Pack& arguments);
  Pack trace(const std::shared_ptr<Entry>& entry, bool watched, const Pack& arguments,
             c10::function_ref<Pack()> body);
  TracedForward traced_forward(const std::shared_ptr<Entry>& entry, PlanPtr plan, const Pack& arguments,
                               const FunctionTrace& run);
  /// What its last run has used, and leaves whose gradients it may take away: what functions have
  /// used in this thread, and what the optimizers of this one step.
  std::vector<HeldTensor> held_before(const Entry& entry) const;

  CompileOptions options_;
  const uint64_t number_;
  mutable std::shared_mutex mutex_;
  std::vector<std::shared_ptr<Entry>> entries_;
};

namespace {

struct Functions {
  std::mutex mutex;
  std::vector<Function*> all;
  uint64_t next = 1;
};
Functions& functions() {
  static auto* instance = new Functions;
  return *instance;
}

}  // namespace

Function::Function(CompileOptions options)
    : options_(std::move(options)), number_([] {
        Functions& registry = functions();
        const std::lock_guard lock(registry.mutex);
        return registry.next++;
      }()) {
  if (options_.name.empty()) options_.name = "function-" + std::to_string(number_);
  Functions& registry = functions();
  const std::lock_guard lock(registry.mutex);
  registry.all.push_back(this);
}

Function::~Function() {
  Functions& registry = functions();
  const std::lock_guard lock(registry.mutex);
  std::erase(registry.all, this);
}

Function::Known Function::known_of(const std::vector<int64_t>& key) {
  const auto find = [&]() -> std::optional<Known> {
    for (const auto& entry : entries_) {
      if (entry->key == key) return Known{entry, entry->plan, entry->both, entry->watch};
    }
    return std::nullopt;
  };
  {
    const std::shared_lock lock(mutex_);
    if (auto known = find()) return std::move(*known);
  }
  const std::unique_lock lock(mutex_);
  if (auto known = find()) return std::move(*known);  // another thread was faster
  if (entries_.size() == kMostKeys) entries_.erase(entries_.begin());
  entries_.push_back(std::make_shared<Entry>());
  entries_.back()->key = key;
  return {entries_.back(), nullptr, nullptr, true};
}

Pack Function::call(Pack&& arguments, c10::function_ref<Pack()> body) {
  // Within another one it is a part of that one.
  if (Session::current().in_function()) return body();
  complete_key(arguments);
  const Known known = known_of(arguments.key);
  if (auto result = replay(*known.entry, known, arguments)) return std::move(*result);
  return trace(known.entry, known.watched, arguments, body);
}

std::optional<Pack> Function::replay(Entry& entry, const Known& known, const Pack& arguments) {
  if (known.plan == nullptr && known.both == nullptr) return std::nullopt;
  auto result = known.both != nullptr ? replay_differentiable(known.both, options_.name, arguments.tensors)
                                      : reprise::replay(*known.plan, arguments.tensors);
  if (result) {
    entry.replayed.fetch_add(1, std::memory_order_relaxed);
    return result;
  }
  const std::unique_lock lock(mutex_);
  entry.plan = nullptr;
  entry.both = nullptr;
  entry.seen.segment.clear();
  entry.backward.run.segment.clear();
  return std::nullopt;
}

TracedForward Function::traced_forward(const std::shared_ptr<Entry>& entry, PlanPtr plan, const Pack& arguments,
                                       const FunctionTrace& run) {
  constexpr uint64_t kBackward = uint64_t{1} << 31;  // of the 32 bits that a function has in `environment_key`
  TracedForward forward{options_.name, number_ | kBackward, std::move(plan), arguments.tensors, run.created, {}, {}};
  forward.found = [self = shared_from_this(), entry](DifferentiablePlanPtr both, const std::string& reason) {
    const std::unique_lock lock(self->mutex_);
    if (both != nullptr) REPRISE_LOG(1, self->options_.name, ": both passes are replayed from now on");
    entry->both = std::move(both);
    if (!reason.empty()) entry->reason = entry->backward.reason = reason;
  };
  forward.with_seen = [self = shared_from_this(), entry](const std::function<void(SeenBackward&)>& with) {
    const std::unique_lock lock(self->mutex_);
    with(entry->backward);
  };
  return forward;
}

std::vector<HeldTensor> Function::held_before(const Entry& entry) const {
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>> tensors;
  auto& leaves = Session::current().used_leaves.all;
  std::erase_if(leaves, [](const auto& each) { return each.second.expired(); });
  for (const auto& [address, leaf] : leaves) tensors.push_back(leaf);
  for (const at::Tensor& parameter : parameters_of(options_.optimizers)) {
    tensors.emplace_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(parameter.unsafeGetTensorImpl()));
  }
  {
    const std::shared_lock lock(mutex_);
    tensors.insert(tensors.end(), entry.used.begin(), entry.used.end());
  }
  // Each once.
  std::unordered_set<const c10::TensorImpl*> met;
  std::erase_if(tensors, [&](const auto& each) { return !met.insert(each._unsafe_get_target()).second; });
  return held_of(tensors);
}

Pack Function::trace(const std::shared_ptr<Entry>& entry, bool watched, const Pack& arguments,
                     c10::function_ref<Pack()> body) {
  Session& session = Session::current();
  const uint64_t first_node = next_node();
  std::vector<AutogradNodePtr> histories;
  for (const at::Tensor& tensor : arguments.tensors) {
    histories.push_back(tensor.defined() ? tensor.grad_fn() : AutogradNodePtr());
  }
  const bool reads_host =
      std::any_of(arguments.tensors.begin(), arguments.tensors.end(), [](const at::Tensor& tensor) {
        return tensor.defined() && !is_lazy(tensor) && !is_number(tensor);
      });
  std::vector<HeldTensor> held;
  if (watched) held = held_before(*entry);
  OptimizerState optimizers;
  if (!options_.optimizers.empty()) optimizers = state_of(options_.optimizers);
  session.begin_function(number_, options_.name, options_.fullgraph,
                         /*watch=*/watched);
  Pack result;
  try {
    result = body();
  } catch (...) {
    session.abandon_function();
    throw;
  }
  const FunctionTrace run = session.end_function();
  note_leaves(session.used_leaves, run, arguments.tensors);
  const bool differentiable =
      c10::GradMode::is_enabled() &&
      std::any_of(result.tensors.begin(), result.tensors.end(),
                  [](const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); });
  bool writes_history = false;
  for (size_t k = 0; k < histories.size(); ++k) {
    const at::Tensor& tensor = arguments.tensors[k];
    writes_history = writes_history || (tensor.defined() && tensor.grad_fn() != histories[k]);
  }
  PlanPtr plan;
  std::string reason;
  {
    const std::unique_lock lock(mutex_);
    ++entry->traced;
    reason = !run.broken_by.empty()          ? "not one program: " + run.broken_by
                    : !run.no_program.empty()       ? run.no_program
                    : reads_host ? "an argument is a tensor of another device, whose values it may read"
                    : writes_history                ? "it writes an argument that takes part in autograd"
                    : !entry->backward.reason.empty() ? entry->backward.reason
                                                    : "";
    std::optional<OptimizerStep> step;
    if (run.verified && watched && reason.empty() && !options_.optimizers.empty()) {
      step = step_of(run, optimizers, state_of(options_.optimizers), reason);
    }
    const bool compared = run.verified && watched && reason.empty();
    if (compared) {
      const std::vector<const LazyStorage*> storages = storages_of(arguments.tensors);
      plan = plan_of(entry->seen, {run, storages, result, differentiable, std::move(step), std::move(held)}, reason);
      if (plan != nullptr && !differentiable) {
        entry->plan = plan;
        REPRISE_LOG(1, options_.name, ": replayed from now on by ", run.segment);
      }
    }
    // Two runs in turn are compared, and both must have been watched.
    if (!compared) entry->seen.segment.clear();
    entry->used.clear();
    for (const auto& [slot, tensor] : run.tensors) entry->used.push_back(tensor);
    // What was said last holds until a run that is watched has shown otherwise.
    if (!reason.empty() || watched) entry->reason = reason;
    entry->watch = reason.empty() || options_.fullgraph;
  }
  if (differentiable && reason.empty()) {
    reason = trace_backward(traced_forward(entry, plan, arguments, run), first_node, result.tensors);
    const std::unique_lock lock(mutex_);
    if (!reason.empty()) {
      entry->reason = reason;
      entry->watch = options_.fullgraph;
    }
  }
  TORCH_CHECK(!options_.fullgraph || reason.empty(), "reprise: ", options_.name,
              " cannot be replayed: ", reason);
  return result;
}

void Function::explain(std::string& out) const {
  const std::shared_lock lock(mutex_);
  uint64_t traced = 0, replayed = 0;
  for (const auto& entry : entries_) {
    traced += entry->traced;
    replayed += entry->replayed.load();
  }
  out += c10::str(options_.name, ": ", entries_.size(), " keys, run ", traced, "x, replayed ", replayed, "x\n");
  for (const auto& entry : entries_) {
    if (!entry->reason.empty()) out += "  not replayed: " + entry->reason + "\n";
  }
}

FunctionHandle::FunctionHandle(const CompileOptions& options)
    : function_(std::make_shared<Function>(options)) {}

Pack FunctionHandle::call(Pack&& arguments, c10::function_ref<Pack()> body) const {
  return function_->call(std::move(arguments), body);
}

}  // namespace detail

void explain_functions(std::string& out) {
  auto& registry = detail::functions();
  const std::lock_guard lock(registry.mutex);
  for (const detail::Function* function : registry.all) function->explain(out);
}

}  // namespace reprise
