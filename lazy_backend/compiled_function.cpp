#include "lazy_backend/compiled_function.h"

#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <shared_mutex>

#include "lazy_backend/below_user_modes.h"
#include "lazy_backend/device.h"
#include "lazy_backend/function_trace.h"
#include "lazy_backend/interpreter.h"
#include "lazy_backend/log.h"
#include "lazy_backend/metrics.h"
#include "lazy_backend/program_run.h"
#include "lazy_backend/session.h"
#include "lazy_backend/trace_tree.h"
#include "reprise/compile.h"

namespace reprise {
namespace {

using detail::Pack;
using StoragePtr = c10::intrusive_ptr<LazyStorage>;
using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl>;

/// A tensor that the function uses and that somebody else holds.
struct Watched {
  WeakTensor tensor;
  const LazyStorage* storage;  ///< over which it lay when it was bound
  bool written = false;
};

/// How a call is replayed. Immutable; used by several threads at once.
struct Plan {
  struct Source {
    enum class Kind : uint8_t { kArgument, kBound, kScalar, kRandom, kNumber };
    Kind kind;
    uint32_t index;
  };
  struct Output {
    enum class Kind : uint8_t { kNone, kMade, kArgument, kBound, kRandom };
    Kind kind = Kind::kNone;
    uint32_t index = 0;
    Geometry geometry;
  };
  /// A gradient that the function leaves in a leaf.
  struct Gradient {
    WeakTensor leaf;
    Output output;
  };

  std::shared_ptr<Program> program;
  std::vector<Source> inputs;
  std::vector<StoragePtr> bound;
  std::vector<Watched> watched;
  std::vector<at::Tensor> constants;  ///< by program input: what is the same in every call
  std::vector<uint32_t> random_steps;
  std::vector<uint32_t> written_arguments;
  std::vector<Output> outputs;
  std::vector<Gradient> gradients;
  std::vector<int64_t> result_key;
};
using PlanPtr = std::shared_ptr<const Plan>;

/// What has been found out of one key.
struct Entry {
  std::vector<int64_t> key;
  PlanPtr plan;
  std::string reason;  ///< why there is no plan; empty where one may come
  uint64_t traced = 0;
  std::atomic<uint64_t> replayed{0};

  // Of the last verified run.
  std::string segment;
  std::vector<StoragePtr> inputs;
  ScalarValues scalars;
};

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
  if (!is_lazy(tensor)) return;
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
  arguments.key.push_back(static_cast<int64_t>(environment_key()) << 2 |
                          static_cast<int64_t>(c10::GradMode::is_enabled()) << 1 |
                          static_cast<int64_t>(c10::InferenceMode::is_enabled()));
}

at::Tensor seen_through(const LazyStorage& storage, const Geometry& geometry) {
  const at::Tensor& made = storage.made();
  if (made.defined() && geometry.matches(*made.unsafeGetTensorImpl())) return made;
  return backing_tensor(storage.backing(), geometry);
}

/// Waits for the values of `storage`; false where there will be none.
bool settled(const LazyStorage& storage) {
  if (C10_UNLIKELY(storage.pending_in() != nullptr)) Session::settle(&storage);
  return storage.error() == nullptr && storage.backing();
}

at::Tensor lazy_over(const StoragePtr& storage, const Geometry& geometry) {
  return wrap(storage, backing_tensor(storage->backing(), geometry));
}

/// Replays a call; nothing where what was bound is not there any more, or the program fails.
std::optional<Pack> replay(const Plan& plan, const std::vector<at::Tensor>& arguments) {
  for (const Watched& each : plan.watched) {
    const auto tensor = each.tensor.lock();
    if (tensor && lazy_storage(tensor.get()) != each.storage) return std::nullopt;
  }
  Session::current().flush("a compiled function is called");
  const Program& program = *plan.program;
  std::vector<at::Tensor> inputs;
  inputs.reserve(plan.inputs.size());
  c10::SmallVector<at::Tensor, 2> random;
  {
    c10::InferenceMode normal_tensors(false);
    for (const uint32_t step : plan.random_steps) random.push_back(draw(*program.steps[step]));
  }
  for (size_t k = 0; k < plan.inputs.size(); ++k) {
    const Plan::Source& source = plan.inputs[k];
    switch (source.kind) {
      case Plan::Source::Kind::kArgument:
      case Plan::Source::Kind::kBound: {
        const bool argument = source.kind == Plan::Source::Kind::kArgument;
        const LazyStorage& storage = argument ? *lazy_storage(arguments[source.index])
                                              : *plan.bound[source.index];
        if (!settled(storage)) return std::nullopt;
        inputs.push_back(seen_through(storage, program.inputs[k].geometry));
        break;
      }
      case Plan::Source::Kind::kRandom:
        inputs.push_back(random[source.index]);
        break;
      case Plan::Source::Kind::kScalar:
      case Plan::Source::Kind::kNumber:
        inputs.push_back(plan.constants[k]);
        break;
    }
  }
  std::vector<at::Tensor> made;
  try {
    RECORD_FUNCTION("reprise::replay", c10::ArrayRef<const c10::IValue>());
    c10::InferenceMode normal_tensors(false);
    const BelowUserModes below;
    made = program.runner->run(std::move(inputs));
    for (size_t k = 0; k < made.size(); ++k) made[k] = as_recorded(program, k, made[k]);
  } catch (const std::exception& error) {
    // Out of memory, say. What it may have written in part cannot be run again.
    if (program.writes_inputs) throw;
    metrics().program_failures.add(1);
    TORCH_WARN("reprise: a compiled function's program failed, and the function is run: ", error.what());
    return std::nullopt;
  }
  metrics().segments_replayed.add(1);
  for (const Watched& each : plan.watched) {
    if (!each.written) continue;
    if (const auto tensor = each.tensor.lock(); tensor && !tensor->is_inference()) tensor->bump_version();
  }
  for (const uint32_t k : plan.written_arguments) {
    const at::Tensor& tensor = arguments[k];
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
  // Results that share a storage share it again.
  c10::SmallVector<StoragePtr, 8> storages(made.size());
  const auto tensor_of = [&](const Plan::Output& output) -> at::Tensor {
    switch (output.kind) {
      case Plan::Output::Kind::kNone:
        return {};
      case Plan::Output::Kind::kMade: {
        StoragePtr& storage = storages[output.index];
        if (!storage) {
          storage = c10::make_intrusive<LazyStorage>(made[output.index].storage().nbytes(),
                                                     program.device_index);
          storage->set_backing(made[output.index].storage());
          if (output.geometry.matches(*made[output.index].unsafeGetTensorImpl())) {
            storage->set_made(made[output.index]);
            return wrap(storage, made[output.index]);
          }
        }
        return lazy_over(storage, output.geometry);
      }
      case Plan::Output::Kind::kArgument:
        return lazy_over(StoragePtr::reclaim_copy(lazy_storage(arguments[output.index])),
                         output.geometry);
      case Plan::Output::Kind::kBound:
        return lazy_over(plan.bound[output.index], output.geometry);
      case Plan::Output::Kind::kRandom:
        return wrap_new(random[output.index], program.device_index);
    }
    TORCH_INTERNAL_ASSERT(false);
  };
  Pack result;
  result.key = plan.result_key;
  result.tensors.reserve(plan.outputs.size());
  for (const Plan::Output& output : plan.outputs) result.tensors.push_back(tensor_of(output));
  for (const Plan::Gradient& gradient : plan.gradients) {
    if (const auto leaf = gradient.leaf.lock()) leaf->mutable_grad() = tensor_of(gradient.output);
  }
  return result;
}

}  // namespace

namespace detail {

class Function {
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
    bool may_get_plan = true;
  };
  Known known_of(const std::vector<int64_t>& key);
  Pack trace(Entry& entry, bool may_get_plan, const Pack& arguments, c10::function_ref<Pack()> body);
  /// A plan of a verified run; null where there is none yet, or never: see the reason.
  PlanPtr plan_of(Entry& entry, const FunctionTrace& run, const Pack& arguments, const Pack& result);

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
      if (entry->key == key) return Known{entry, entry->plan, entry->reason.empty()};
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
  return {entries_.back(), nullptr, true};
}

Pack Function::call(Pack&& arguments, c10::function_ref<Pack()> body) {
  // Within another one it is a part of that one.
  if (Session::current().in_function()) return body();
  complete_key(arguments);
  const auto [entry, plan, may_get_plan] = known_of(arguments.key);
  if (plan != nullptr) {
    if (auto result = replay(*plan, arguments.tensors)) {
      entry->replayed.fetch_add(1, std::memory_order_relaxed);
      return std::move(*result);
    }
    const std::unique_lock lock(mutex_);
    entry->plan = nullptr;
    entry->segment.clear();
  }
  return trace(*entry, may_get_plan, arguments, body);
}

Pack Function::trace(Entry& entry, bool may_get_plan, const Pack& arguments,
                     c10::function_ref<Pack()> body) {
  Session& session = Session::current();
  session.begin_function(number_, options_.name, options_.fullgraph,
                         /*watch=*/may_get_plan);
  Pack result;
  try {
    result = body();
  } catch (...) {
    session.abandon_function();
    throw;
  }
  const FunctionTrace run = session.end_function();
  std::string reason;
  {
    const std::unique_lock lock(mutex_);
    ++entry.traced;
    entry.reason = !run.broken_by.empty() ? "not one program: " + run.broken_by : run.no_program;
    if (run.verified && entry.reason.empty()) {
      entry.plan = plan_of(entry, run, arguments, result);
      if (entry.plan != nullptr) REPRISE_LOG(1, options_.name, ": replayed from now on by ", run.segment);
    }
    reason = entry.reason;
  }
  TORCH_CHECK(!options_.fullgraph || reason.empty(), "reprise: ", options_.name,
              " cannot be replayed: ", reason);
  return result;
}

PlanPtr Function::plan_of(Entry& entry, const FunctionTrace& run, const Pack& arguments,
                          const Pack& result) {
  const auto never = [&](std::string why) -> PlanPtr {
    entry.reason = std::move(why);
    return nullptr;
  };
  const auto argument_of = [&](const LazyStorage* storage) -> std::optional<uint32_t> {
    for (uint32_t k = 0; k < arguments.tensors.size(); ++k) {
      if (is_lazy(arguments.tensors[k]) && lazy_storage(arguments.tensors[k]) == storage) return k;
    }
    return std::nullopt;
  };
  // Two runs that did the same: what is the same storage in both is bound, what is neither
  // that nor an argument comes from elsewhere.
  const bool again = entry.segment == run.segment && entry.inputs.size() == run.inputs.size();
  const std::vector<StoragePtr> before = std::exchange(entry.inputs, run.inputs);
  const ScalarValues scalars = std::exchange(entry.scalars, run.scalars);
  entry.segment = run.segment;
  if (!again) return nullptr;
  for (size_t slot = 0; slot < run.inputs.size(); ++slot) {
    const LazyStorage* storage = run.inputs[slot].get();
    if (storage == nullptr || argument_of(storage) || before[slot].get() == storage) continue;
    return never("it uses a tensor that is another in each call and no argument");
  }
  if (scalars != run.scalars) return never("a number in it changes from call to call and is no argument");
  if (run.program == nullptr) return nullptr;

  auto plan = std::make_shared<Plan>();
  plan->program = run.program;
  const Program& program = *run.program;
  std::vector<int64_t> bound(run.inputs.size(), -1);  // by slot
  const auto bind = [&](uint32_t slot) {
    if (bound[slot] < 0) {
      bound[slot] = static_cast<int64_t>(plan->bound.size());
      plan->bound.push_back(run.inputs[slot]);
    }
    return static_cast<uint32_t>(bound[slot]);
  };
  plan->constants.resize(program.inputs.size());
  std::vector<std::pair<uint32_t, uint32_t>> random;  // created slot, number
  for (size_t k = 0; k < program.inputs.size(); ++k) {
    const ProgramInput& input = program.inputs[k];
    using Kind = Plan::Source::Kind;
    switch (input.kind) {
      case ProgramInput::Kind::kSlot:
        if (const auto argument = argument_of(run.inputs[input.index].get())) {
          plan->inputs.push_back({Kind::kArgument, *argument});
        } else {
          plan->inputs.push_back({Kind::kBound, bind(input.index)});
        }
        break;
      case ProgramInput::Kind::kScalar: {
        plan->inputs.push_back({Kind::kScalar, input.index});
        at::Tensor number = empty_tensor(input.geometry, sizeof(double), c10::kCPU);
        *static_cast<double*>(number.mutable_data_ptr()) = run.scalars[input.index];
        plan->constants[k] = number.to(backing_device_of(program.device_index));
        break;
      }
      case ProgramInput::Kind::kNumber: {
        plan->inputs.push_back({Kind::kNumber, input.index});
        const c10::Storage nothing(c10::Storage::use_byte_size_t(), 0,
                                   c10::DataPtr(nullptr, backing_device_of(program.device_index)));
        plan->constants[k] = backing_tensor(nothing, input.geometry);
        break;
      }
      case ProgramInput::Kind::kRandom: {
        const auto number = static_cast<uint32_t>(plan->random_steps.size());
        plan->inputs.push_back({Kind::kRandom, number});
        plan->random_steps.push_back(input.index);
        const Step& step = *program.steps[input.index];
        if (step.randomness == Randomness::kCreates) random.emplace_back(step.results[0].slot, number);
        break;
      }
    }
  }

  const auto output_of = [&](const at::Tensor& tensor) -> std::optional<Plan::Output> {
    Plan::Output output;
    if (!tensor.defined()) return output;
    if (!is_lazy(tensor)) return std::nullopt;
    output.geometry = Geometry(*tensor.unsafeGetTensorImpl());
    const LazyStorage* storage = lazy_storage(tensor);
    if (const auto argument = argument_of(storage)) {
      output.kind = Plan::Output::Kind::kArgument;
      output.index = *argument;
      return output;
    }
    for (const auto& [slot, created] : run.created) {
      if (created.get() != storage) continue;
      for (uint32_t k = 0; k < program.outputs.size(); ++k) {
        if (program.outputs[k].slot != slot) continue;
        output.kind = Plan::Output::Kind::kMade;
        output.index = k;
        return output;
      }
      for (const auto& [random_slot, number] : random) {
        if (random_slot != slot) continue;
        output.kind = Plan::Output::Kind::kRandom;
        output.index = number;
        return output;
      }
      return std::nullopt;
    }
    for (uint32_t slot = 0; slot < run.inputs.size(); ++slot) {
      if (run.inputs[slot].get() != storage) continue;
      output.kind = Plan::Output::Kind::kBound;
      output.index = bind(slot);
      return output;
    }
    return std::nullopt;
  };
  std::vector<const LazyStorage*> accounted;
  for (const at::Tensor& tensor : result.tensors) {
    if (tensor.defined() && tensor.requires_grad()) {
      return never("its result takes part in autograd; call it under torch::NoGradGuard, or "
                   "put the backward pass into it");
    }
    auto output = output_of(tensor);
    if (!output) return never("it returns a tensor that the program does not make");
    plan->outputs.push_back(std::move(*output));
    if (is_lazy(tensor)) accounted.push_back(lazy_storage(tensor));
  }
  plan->result_key = result.key;

  // Tensors that others hold: arguments of ops, whose storages are bound.
  const auto written = [&](uint32_t slot) {
    return std::any_of(run.steps.begin(), run.steps.end(), [&](const StepPtr& step) {
      return std::find(step->written.begin(), step->written.end(), slot) != step->written.end();
    });
  };
  for (uint32_t slot = 0; slot < run.inputs.size(); ++slot) {
    if (run.inputs[slot] == nullptr || !written(slot)) continue;
    if (const auto argument = argument_of(run.inputs[slot].get())) {
      plan->written_arguments.push_back(*argument);
    }
  }
  for (const auto& [slot, tensor] : run.tensors) {
    const auto held = tensor.lock();
    if (!held || bound[slot] < 0 || lazy_storage(held.get()) != run.inputs[slot].get()) continue;
    Watched watched{tensor, run.inputs[slot].get(), written(slot)};
    const at::Tensor grad = held->requires_grad() ? at::Tensor(held->grad()) : at::Tensor();
    if (grad.defined() && is_lazy(grad)) {
      const auto created = std::find_if(run.created.begin(), run.created.end(), [&](const auto& each) {
        return each.second.get() == lazy_storage(grad);
      });
      if (created != run.created.end()) {
        auto output = output_of(grad);
        if (!output) return never("a gradient that it leaves is no output of its program");
        plan->gradients.push_back({tensor, std::move(*output)});
        accounted.push_back(lazy_storage(grad));
      }
    }
    plan->watched.push_back(std::move(watched));
  }
  for (const auto& [slot, created] : run.created) {
    if (std::find(accounted.begin(), accounted.end(), created.get()) == accounted.end()) {
      return never("it keeps a tensor that it has made, of " + std::to_string(created->nbytes()) +
                   " bytes");
    }
  }
  return plan;
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
