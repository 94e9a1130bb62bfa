#include "lazy_backend/function_plan.h"

#include <ATen/record_function.h>

#include <algorithm>

#include "lazy_backend/below_user_modes.h"
#include "lazy_backend/device.h"
#include "lazy_backend/interpreter.h"
#include "lazy_backend/metrics.h"
#include "lazy_backend/program_run.h"
#include "lazy_backend/session.h"

namespace reprise {
namespace {

using detail::Pack;
using StoragePtr = c10::intrusive_ptr<LazyStorage>;

at::Tensor seen_through(const LazyStorage& storage, const Geometry& geometry) {
  at::Tensor made = storage.made();
  if (made.defined() && geometry.matches(*made.unsafeGetTensorImpl())) return made;
  const NormalTensors normal_tensors;
  at::Tensor tensor = backing_tensor(storage.backing(), geometry);
  storage.keep_made(tensor);
  return tensor;
}

/// Whether gradients may be left in it.
bool is_leaf(c10::TensorImpl& tensor) {
  return tensor.requires_grad() &&
         at::Tensor(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(&tensor)).is_leaf();
}

/// Waits for the values of `storage`; false where there will be none.
bool settled(const LazyStorage& storage) {
  if (C10_UNLIKELY(storage.pending_in() != nullptr)) Session::settle(&storage);
  return storage.error() == nullptr && storage.backing();
}

/// Whether what others hold is what it was when the plan was made, and still there: a
/// storage that nobody sees any more was replaced by another.
bool is_current(const Plan& plan, const std::vector<at::Tensor>& arguments) {
  // Leaves of a thread that is not this one are that thread's to look at.
  const Session& session = Session::current();
  if (plan.made_in == &session && C10_UNLIKELY(plan.leaf_generation != session.used_leaves.generation)) return false;
  bool held = true;
  for (size_t k = 0; k < plan.watched.size(); ++k) {
    const Watched& each = plan.watched[k];
    if (k == 0 || plan.watched[k - 1].slot != each.slot) {
      if (!held) return false;
      held = false;
    }
    const auto tensor = each.tensor.lock();
    if (!tensor) continue;
    if (lazy_storage(tensor.get()) != each.storage || tensor->requires_grad() != each.required_grad) return false;
    if (each.unknown_leaf && tensor->grad().defined()) return false;
    held = true;
  }
  if (!held) return false;
  for (const auto& [argument, storage] : plan.same_arguments) {
    if (lazy_storage(arguments[argument]) != storage) return false;
  }
  for (const Plan::Gradient& gradient : plan.gradients) {
    const auto leaf = gradient.leaf.lock();
    if (leaf && !gradient.was_there && leaf->grad().defined()) return false;
  }
  for (const auto& each : plan.unknown_leaves) {
    const auto leaf = each.lock();
    if (leaf && leaf->grad().defined()) return false;
  }
  if (!plan.program->writes_inputs) return true;
  // Reads and writes would meet that did not in the trace.
  return std::none_of(arguments.begin(), arguments.end(), [&](const at::Tensor& argument) {
    if (!is_lazy(argument)) return false;
    const LazyStorage* storage = lazy_storage(argument);
    return std::any_of(plan.bound.begin(), plan.bound.end(),
                       [&](const StoragePtr& bound) { return bound.get() == storage; });
  });
}

/// A new lazy storage over what a call has made.
StoragePtr storage_over(const c10::Storage& made, c10::DeviceIndex device_index) {
  auto storage = c10::make_intrusive<LazyStorage>(made.nbytes(), device_index);
  storage->set_backing(made);
  return storage;
}

at::Tensor lazy_over(const StoragePtr& storage, const Geometry& geometry) {
  return wrap(storage, backing_tensor(storage->backing(), geometry));
}

}  // namespace

std::vector<HeldTensor> held_of(const std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>>& tensors) {
  std::vector<HeldTensor> all;
  for (const auto& each : tensors) {
    if (const auto tensor = each.lock()) {
      all.push_back({each, tensor->requires_grad(), tensor->grad().defined()});
    }
  }
  return all;
}

void note_leaves(UsedLeaves& leaves, const FunctionTrace& run, const std::vector<at::Tensor>& arguments) {
  for (const auto& [slot, tensor] : run.tensors) {
    const auto leaf = tensor.lock();
    if (!leaf || !is_leaf(*leaf)) continue;
    const bool given = std::any_of(arguments.begin(), arguments.end(),
                                   [&](const at::Tensor& argument) { return argument.unsafeGetTensorImpl() == leaf.get(); });
    if (!given && leaves.all.emplace(leaf.get(), tensor).second) ++leaves.generation;
  }
}

std::vector<const LazyStorage*> storages_of(const std::vector<at::Tensor>& tensors) {
  std::vector<const LazyStorage*> storages;
  for (const at::Tensor& tensor : tensors) storages.push_back(is_lazy(tensor) ? lazy_storage(tensor) : nullptr);
  return storages;
}

std::optional<Pack> replay(const Plan& plan, const std::vector<at::Tensor>& arguments) {
  if (!is_current(plan, arguments)) return std::nullopt;
  std::optional<std::vector<double>> numbers;
  if (plan.optimizers && !(numbers = next_numbers(*plan.optimizers))) return std::nullopt;
  Session::current().flush("a compiled function is called");
  const Program& program = *plan.program;
  std::vector<at::Tensor> inputs, number_inputs;
  inputs.reserve(plan.inputs.size());
  if (numbers && !numbers->empty()) {
    number_inputs = constant_inputs(*numbers, backing_device_of(program.device_index), /*non_blocking=*/true);
  }
  c10::SmallVector<at::Tensor, 2> random;
  for (const uint32_t step : plan.random_steps) random.push_back(draw(*program.steps[step]));
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
        if (numbers && plan.optimizers->numbers[source.index]) {
          const auto& known = plan.optimizers->distinct;
          const auto at = std::find(known.begin(), known.end(), *plan.optimizers->numbers[source.index]);
          inputs.push_back(number_inputs[static_cast<size_t>(at - known.begin())]);
          break;
        }
        inputs.push_back(plan.constants[k]);
        break;
      case Plan::Source::Kind::kNumber:
        inputs.push_back(plan.constants[k]);
        break;
    }
  }
  // As the function does. Whoever still holds one when a CUDA graph runs again has it copied.
  for (const Plan::Gradient& gradient : plan.gradients) {
    if (!gradient.was_there) continue;
    if (const auto leaf = gradient.leaf.lock()) leaf->mutable_grad().reset();
  }
  std::vector<at::Tensor> made;
  try {
    RECORD_FUNCTION("reprise::replay", c10::ArrayRef<const c10::IValue>());
    const NormalTensors normal_tensors;
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
  if (plan.optimizers) count_step(*plan.optimizers);
  for (const Watched& each : plan.watched) {
    const bool turns = each.requires_grad != each.required_grad;
    if (!each.written && !turns) continue;
    const auto tensor = each.tensor.lock();
    if (!tensor) continue;
    if (each.written && !tensor->is_inference()) tensor->bump_version();
    if (turns) tensor->set_requires_grad(each.requires_grad);
  }
  for (const uint32_t k : plan.written_arguments) {
    const at::Tensor& tensor = arguments[k];
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
  // Results that share a storage share it again.
  c10::SmallVector<StoragePtr, 8> storages(made.size()), drawn(random.size());
  const auto tensor_of = [&](const Plan::Output& output) -> at::Tensor {
    switch (output.kind) {
      case Plan::Output::Kind::kNone:
        return {};
      case Plan::Output::Kind::kMade: {
        StoragePtr& storage = storages[output.index];
        if (!storage) {
          storage = storage_over(made[output.index].storage(), program.device_index);
          if (output.geometry.matches(*made[output.index].unsafeGetTensorImpl())) {
            storage->keep_made(made[output.index]);
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
      case Plan::Output::Kind::kRandom: {
        StoragePtr& storage = drawn[output.index];
        if (!storage) storage = storage_over(random[output.index].storage(), program.device_index);
        return lazy_over(storage, output.geometry);
      }
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

namespace {

KnownLeaf* known_leaf(std::vector<KnownLeaf>& leaves, const c10::weak_intrusive_ptr<c10::TensorImpl>& leaf) {
  const auto found = std::find_if(leaves.begin(), leaves.end(), [&](const KnownLeaf& each) { return each.leaf == leaf; });
  return found == leaves.end() ? nullptr : &*found;
}

bool is_created(const FunctionTrace& run, const at::Tensor& tensor) {
  return is_lazy(tensor) && std::any_of(run.created.begin(), run.created.end(), [&](const auto& each) {
    return each.second.get() == lazy_storage(tensor);
  });
}

/// Notes what a run has done with the gradients that there were.
void learn_leaves(std::vector<KnownLeaf>& leaves, const PlannedRun& planned) {
  std::erase_if(leaves, [](const KnownLeaf& each) { return each.leaf.expired(); });
  for (const HeldTensor& held : planned.held) {
    const auto leaf = held.has_gradient ? held.tensor.lock() : c10::intrusive_ptr<c10::TensorImpl>();
    if (!leaf) continue;
    const at::Tensor& gradient = leaf->grad();
    const bool removes = !gradient.defined() || is_created(planned.run, gradient);
    if (KnownLeaf* known = known_leaf(leaves, held.tensor)) {
      known->removes = removes;
    } else {
      leaves.push_back({held.tensor, removes});
    }
  }
}

/// What a replay does with gradients that the function makes none of.
void plan_other_gradients(Plan& plan, std::vector<KnownLeaf>& leaves, const PlannedRun& planned) {
  for (const HeldTensor& held : planned.held) {
    const auto leaf = held.tensor.lock();
    if (!leaf || !is_leaf(*leaf)) continue;
    const bool made = std::any_of(plan.gradients.begin(), plan.gradients.end(),
                                  [&](const Plan::Gradient& each) { return each.leaf == held.tensor; });
    if (made) continue;
    const KnownLeaf* known = known_leaf(leaves, held.tensor);
    if (known != nullptr) {
      if (known->removes) plan.gradients.push_back({held.tensor, Plan::Output{}, /*was_there=*/true});
      continue;
    }
    const auto watched = std::find_if(plan.watched.begin(), plan.watched.end(),
                                      [&](const Watched& each) { return each.tensor == held.tensor; });
    if (watched == plan.watched.end()) {
      plan.unknown_leaves.push_back(held.tensor);
    } else {
      watched->unknown_leaf = true;
    }
  }
}

}  // namespace

PlanPtr plan_of(SeenRun& seen, const PlannedRun& planned, std::string& reason) {
  learn_leaves(seen.leaves, planned);
  const FunctionTrace& run = planned.run;
  const Pack& result = planned.result;
  const auto never = [&](std::string why) -> PlanPtr {
    reason = std::move(why);
    return nullptr;
  };
  const auto argument_of = [&](const LazyStorage* storage) -> std::optional<uint32_t> {
    for (uint32_t k = 0; k < planned.arguments.size(); ++k) {
      if (planned.arguments[k] != nullptr && planned.arguments[k] == storage) return k;
    }
    return std::nullopt;
  };
  // Two runs that did the same: what is the same storage in both is bound, what is neither
  // that nor an argument comes from elsewhere.
  const bool again = seen.segment == run.segment && seen.inputs.size() == run.inputs.size();
  const bool learned = std::exchange(seen.learned_of, run.segment) == run.segment &&
                       seen.inputs.size() == run.inputs.size();
  std::vector<c10::weak_intrusive_ptr<LazyStorage>> inputs;
  for (const StoragePtr& input : run.inputs) inputs.emplace_back(input);
  const auto before = std::exchange(seen.inputs, std::move(inputs));
  const auto was_same = [&](size_t slot) { return before[slot]._unsafe_get_target() == run.inputs[slot].get(); };
  if (!learned) seen.varied.assign(run.inputs.size(), false);
  for (size_t slot = 0; learned && slot < run.inputs.size(); ++slot) {
    if (!was_same(slot)) seen.varied[slot] = true;
  }
  const ScalarValues scalars = std::exchange(seen.scalars, run.scalars);
  seen.segment = run.segment;
  OptimizerStep before_step;
  if (planned.optimizers) {
    before_step = std::exchange(seen.optimizers, *planned.optimizers);
    seen.rates_matter = learned && seen.rates_matter;
    // Where a number has become dynamic just now, it is not known what it follows.
    if (learned && scalars.size() == run.scalars.size()) {
      const bool another_rate = take_over_rates(seen.optimizers, before_step);
      for (size_t k = 0; another_rate && k < scalars.size(); ++k) {
        if (!seen.optimizers.numbers[k] && scalars[k] != run.scalars[k]) seen.rates_matter = true;
      }
    }
    if (seen.rates_matter) seen.optimizers.any_rate.assign(seen.optimizers.any_rate.size(), false);
  }
  if (!again) return nullptr;
  for (size_t slot = 0; slot < run.inputs.size(); ++slot) {
    const LazyStorage* storage = run.inputs[slot].get();
    if (storage == nullptr || argument_of(storage) || was_same(slot)) continue;
    return never("it uses a tensor that is another in each call and no argument");
  }
  if (scalars.size() != run.scalars.size()) return nullptr;  // one of them is new
  for (size_t k = 0; k < scalars.size(); ++k) {
    const bool known = planned.optimizers && seen.optimizers.numbers[k];
    if (known && before_step.numbers[k] != seen.optimizers.numbers[k]) return nullptr;
    if (!known && scalars[k] != run.scalars[k]) {
      return never("a number in it changes from call to call and is no argument; an optimizer's "
                   "are known where it is in CompileOptions::optimizers");
    }
  }
  if (run.program == nullptr) return nullptr;

  auto plan = std::make_shared<Plan>();
  plan->program = run.program;
  plan->made_in = &Session::current();
  plan->leaf_generation = plan->made_in->used_leaves.generation;
  if (planned.optimizers) plan->optimizers = seen.optimizers;
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
  struct Drawn {
    uint32_t slot, number;
    const Geometry& geometry;
  };
  std::vector<Drawn> random;
  for (size_t k = 0; k < program.inputs.size(); ++k) {
    const ProgramInput& input = program.inputs[k];
    using Kind = Plan::Source::Kind;
    switch (input.kind) {
      case ProgramInput::Kind::kSlot:
        if (const auto argument = argument_of(run.inputs[input.index].get())) {
          plan->inputs.push_back({Kind::kArgument, *argument});
          const LazyStorage* storage = run.inputs[input.index].get();
          const bool given = *argument >= planned.first_given && *argument < planned.last_given;
          if (given && !seen.varied[input.index]) plan->same_arguments.emplace_back(*argument, storage);
        } else {
          plan->inputs.push_back({Kind::kBound, bind(input.index)});
        }
        break;
      case ProgramInput::Kind::kScalar: {
        plan->inputs.push_back({Kind::kScalar, input.index});
        plan->constants[k] = constant_input(run.scalars[input.index],
                                            backing_device_of(program.device_index));
        break;
      }
      case ProgramInput::Kind::kNumber: {
        plan->inputs.push_back({Kind::kNumber, input.index});
        const c10::Storage nothing(c10::Storage::use_byte_size_t(), 0,
                                   c10::DataPtr(nullptr, backing_device_of(program.device_index)));
        plan->constants[k] = backing_tensor(nothing, input.geometry);
        break;
      }
      case ProgramInput::Kind::kConstant:
        plan->inputs.push_back({Kind::kNumber, input.index});
        plan->constants[k] = input.constant;
        break;
      case ProgramInput::Kind::kRandom: {
        const auto number = static_cast<uint32_t>(plan->random_steps.size());
        plan->inputs.push_back({Kind::kRandom, number});
        plan->random_steps.push_back(input.index);
        const Step& step = *program.steps[input.index];
        if (step.randomness == Randomness::kCreates) random.push_back({step.results[0].slot, number, *step.results[0].geometry});
        break;
      }
    }
  }

  const auto made_of = [&](uint32_t slot, const std::optional<Geometry>& seen_as) -> std::optional<Plan::Output> {
    for (uint32_t k = 0; k < program.outputs.size(); ++k) {
      const ProgramOutput& output = program.outputs[k];
      if (output.slot == slot) return Plan::Output{Plan::Output::Kind::kMade, k, seen_as.value_or(output.geometry)};
    }
    for (const Drawn& drawn : random) {
      if (drawn.slot != slot) continue;
      return Plan::Output{Plan::Output::Kind::kRandom, drawn.number, seen_as.value_or(drawn.geometry)};
    }
    return std::nullopt;
  };
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
      if (created.get() == storage) return made_of(slot, output.geometry);
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
    if (tensor.defined() && tensor.requires_grad() && !planned.differentiable) {
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
    // Others are gone after the call, but for what a backward pass may keep them.
    const auto was = std::find_if(planned.held.begin(), planned.held.end(),
                                  [&](const HeldTensor& each) { return each.tensor == tensor; });
    if (was == planned.held.end()) continue;
    Watched watched{tensor, run.inputs[slot].get(), slot, was->requires_grad, held->requires_grad(), written(slot)};
    const at::Tensor grad = held->requires_grad() ? at::Tensor(held->grad()) : at::Tensor();
    if (grad.defined() && is_created(run, grad)) {
      auto output = output_of(grad);
      if (!output) return never("a gradient that it leaves is no output of its program");
      plan->gradients.push_back({tensor, std::move(*output), was->has_gradient});
      accounted.push_back(lazy_storage(grad));
    }
    plan->watched.push_back(std::move(watched));
  }
  std::stable_sort(plan->watched.begin(), plan->watched.end(),
                   [](const Watched& a, const Watched& b) { return a.slot < b.slot; });
  for (const auto& [slot, created] : run.created) {
    const bool is_result = std::find(accounted.begin(), accounted.end(), created.get()) != accounted.end();
    if (!planned.differentiable) {
      if (is_result) continue;
      return never("it keeps a tensor that it has made, of " + std::to_string(created->nbytes()) + " bytes");
    }
    auto output = made_of(slot, std::nullopt);
    if (!output) return never("its backward pass needs a tensor that the program does not give");
    plan->outputs.push_back(std::move(*output));
    plan->kept.push_back(slot);
  }
  if (planned.differentiable) {
    // Batch norm's statistics may be written, parameters not.
    const bool trains = !plan->gradients.empty() ||
                        std::any_of(plan->watched.begin(), plan->watched.end(), [](const Watched& each) {
                          const auto tensor = each.tensor.lock();
                          return each.written && tensor && tensor->requires_grad();
                        });
    if (trains) {
      return never("its result takes part in autograd, and it has a backward pass or an optimizer's step in it; "
                   "detach the result");
    }
  }
  plan_other_gradients(*plan, seen.leaves, planned);
  return plan;
}

}  // namespace reprise
