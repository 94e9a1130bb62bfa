#include "lazy_backend/interpreter.h"

#include <ATen/core/ATen_fwd.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "lazy_backend/below_user_modes.h"
#include "lazy_backend/device.h"
#include "lazy_backend/schema_type.h"

namespace reprise {
namespace {

/// Puts recorded arguments on a stack, in order; dynamic scalars take the next
/// of the segment's values.
class ArgumentBuilder {
 public:
  ArgumentBuilder(const std::vector<c10::Storage>& storages, const ScalarValues& scalars)
      : storages_(storages), scalars_(scalars) {}

  c10::IValue build(const Arg& arg, const Step& step, const c10::Argument& declared) {
    switch (arg.kind) {
      case Arg::Kind::kNone:
        return {};
      case Arg::Kind::kUndefined:
        return at::Tensor();
      case Arg::Kind::kTensor:
        return backing_tensor(storages_[arg.slot], arg.geometry());
      case Arg::Kind::kInt:
        return arg.i;
      case Arg::Kind::kBool:
        return arg.b;
      case Arg::Kind::kDouble:
        return arg.dynamic ? next_scalar() : arg.d;
      case Arg::Kind::kNumber: {
        if (!arg.dynamic) return arg.constant();
        const auto* recorded = arg.constant().toTensor().unsafeGetTensorImpl();
        at::Tensor number = at::scalar_tensor(next_scalar(), c10::kDouble);
        number.unsafeGetTensorImpl()->set_wrapped_number(recorded->is_wrapped_number());
        return number;
      }
      case Arg::Kind::kIntList:
        return arg.boxed_ints();
      case Arg::Kind::kDevice:
        return backing_device_of(step.device_index);
      case Arg::Kind::kConstant:
        return arg.constant();
      case Arg::Kind::kList:
        return build_list(arg, step, declared);
      case Arg::Kind::kOpaque:
        break;
    }
    TORCH_INTERNAL_ASSERT(false, "reprise: an argument that cannot be replayed");
  }

 private:
  double next_scalar() { return scalars_[next_++]; }

  c10::IValue build_list(const Arg& arg, const Step& step, const c10::Argument& declared) {
    const auto type = without_optional(declared.type());
    const auto element = type->expectRef<c10::ListType>().getElementType();
    if (element->kind() == c10::TypeKind::OptionalType) {
      c10::List<std::optional<at::Tensor>> list;
      list.reserve(arg.list().size());
      for (const Arg& item : arg.list()) {
        list.push_back(build(item, step, declared).to<std::optional<at::Tensor>>());
      }
      return list;
    }
    c10::List<at::Tensor> list;
    list.reserve(arg.list().size());
    for (const Arg& item : arg.list()) list.push_back(build(item, step, declared).toTensor());
    return list;
  }

  const std::vector<c10::Storage>& storages_;
  const ScalarValues& scalars_;
  size_t next_ = 0;
};

/// A result of a step that was inferred, as the user has been told that it lies.
at::Tensor as_inferred(const Step& step, const Result& result, const at::Tensor& tensor) {
  const Geometry& told = *result.geometry;
  if (told.matches(*tensor.unsafeGetTensorImpl())) return tensor;
  TORCH_CHECK(tensor.sizes() == told.sizes() && tensor.scalar_type() == told.dtype, "reprise: ",
              step.op.operator_name(), " gave ", tensor.dtype(), tensor.sizes(), " where ",
              told.dtype, told.sizes(), " had been inferred");
  return copy_lying_as(told, result.nbytes, tensor, tensor.device());
}

void take_result(const Step& step, const Result& result, const c10::IValue& value,
                 std::vector<c10::Storage>& storages, const OnMade& created) {
  if (result.kind == Result::Kind::kList) {
    const auto items = value.toListRef();
    for (size_t k = 0; k < result.list->size(); ++k) {
      take_result(step, (*result.list)[k], items[k], storages, created);
    }
    return;
  }
  if (result.kind != Result::Kind::kNew) return;
  at::Tensor tensor =
      C10_UNLIKELY(step.inferred) ? as_inferred(step, result, value.toTensor()) : value.toTensor();
  if (const c10::Device device = backing_device_of(step.device_index);
      C10_UNLIKELY(tensor.device() != device)) {
    tensor = tensor.to(device);  // see `OpPolicy::host_results`
  }
  storages[result.slot] = tensor.storage();
  created(step, result.slot, tensor);
}

}  // namespace

at::Tensor backing_tensor(const c10::Storage& storage, const Geometry& geometry) {
  auto keys = backing_key_set(storage.device());
  if (geometry.conjugate) keys = keys.add(c10::DispatchKey::Conjugate);
  if (geometry.negative) keys = keys.add(c10::DispatchKey::Negative);
  auto impl = c10::make_intrusive<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(storage), keys,
      c10::scalarTypeToTypeMeta(geometry.dtype));
  impl->set_sizes_and_strides(geometry.sizes(), geometry.strides(), geometry.offset);
  return at::Tensor(std::move(impl));
}

at::Tensor empty_tensor(const Geometry& geometry, size_t nbytes, c10::Device device) {
  const auto options = at::TensorOptions().dtype(geometry.dtype).device(device);
  const auto elements =
      static_cast<int64_t>(std::max(nbytes, geometry.nbytes()) / c10::elementSize(geometry.dtype));
  at::Tensor whole = at::empty_strided({elements}, {1}, options);
  Geometry plain = geometry;
  plain.conjugate = plain.negative = false;
  return backing_tensor(whole.storage(), plain);
}

at::Tensor copy_lying_as(const Geometry& geometry, size_t nbytes, const at::Tensor& tensor,
                         c10::Device device) {
  const at::Tensor copy = empty_tensor(geometry, nbytes, device);
  copy.copy_(tensor);
  return copy;
}

at::Tensor draw(const Step& step) {
  const NormalTensors normal_tensors;
  const BelowUserModes below;
  const c10::Device device = backing_device_of(step.device_index);
  torch::jit::Stack stack;
  for (const Arg& arg : step.args) {
    switch (arg.kind) {
      case Arg::Kind::kTensor:
        stack.emplace_back(empty_tensor(arg.geometry(), arg.geometry().nbytes(), device));
        break;
      case Arg::Kind::kNone: stack.emplace_back(); break;
      case Arg::Kind::kInt: stack.emplace_back(arg.i); break;
      case Arg::Kind::kBool: stack.emplace_back(arg.b); break;
      case Arg::Kind::kDouble: stack.emplace_back(arg.d); break;
      case Arg::Kind::kIntList: stack.push_back(arg.boxed_ints()); break;
      case Arg::Kind::kDevice: stack.emplace_back(device); break;
      case Arg::Kind::kConstant: stack.push_back(arg.constant()); break;
      default: TORCH_INTERNAL_ASSERT(false, "reprise: argument of a random op");
    }
  }
  step.op.callBoxed(stack);
  return stack.front().toTensor();
}

std::vector<uint32_t> last_uses(const std::vector<StepPtr>& steps, size_t slots) {
  std::vector<uint32_t> last(slots, 0);
  for (size_t k = 0; k < steps.size(); ++k) {
    if (steps[k]->only_aliases) continue;  // not run
    const auto touch = [&](const auto& user) { last[user.slot] = static_cast<uint32_t>(k); };
    for_each_tensor(steps[k]->args, touch);
    for_each_result(steps[k]->results, touch);
  }
  return last;
}

void run_steps(const std::vector<StepPtr>& steps, const ScalarValues& scalars,
               std::vector<c10::Storage>& storages, std::vector<at::Tensor>& random,
               const OnMade& created, const OnMade& written) {
  const auto last = last_uses(steps, storages.size());
  std::vector<bool> is_created(storages.size());
  std::transform(storages.begin(), storages.end(), is_created.begin(),
                 [](const c10::Storage& storage) { return !storage; });
  ArgumentBuilder arguments(storages, scalars);
  torch::jit::Stack stack, held;
  size_t next_random = 0;
  const BelowUserModes below;
  // A few kernels ask for it (oneDNN's LSTM), and the launch may come under another.
  const c10::AutoGradMode restored(c10::GradMode::is_enabled());
  const auto show_written = [&](const Step& step) {
    if (!written) return;
    for_each_tensor(step.args, [&](const Arg& arg) {
      if (std::find(step.written.begin(), step.written.end(), arg.slot) == step.written.end()) return;
      written(step, arg.slot, backing_tensor(storages[arg.slot], arg.geometry()));
    });
  };
  for (size_t k = 0; k < steps.size(); ++k) {
    const Step& step = *steps[k];
    if (step.only_aliases) continue;
    if (step.randomness != Randomness::kNone) {
      // Drawn already; what it fills or creates takes the numbers over.
      at::Tensor& numbers = random[next_random++];
      if (step.randomness == Randomness::kFills) {
        const Arg& filled = step.args[0];
        backing_tensor(storages[filled.slot], filled.geometry()).copy_(numbers);
      } else {
        take_result(step, step.results[0], numbers, storages, created);
      }
      numbers = at::Tensor();
      show_written(step);
      continue;
    }
    const auto& declared = step.op.schema().arguments();
    for (size_t a = 0; a < step.args.size(); ++a) {
      stack.push_back(arguments.build(step.args[a], step, declared[a]));
    }
    // Of an op that returns several of its arguments, the boxed kernel drops the
    // arguments before it reads the references it returns (torch 2.11,
    // make_boxed_from_unboxed_functor.h): somebody else must hold them.
    if (C10_UNLIKELY(step.returns_arguments)) held = stack;
    c10::GradMode::set_enabled(step.grad_mode);
    step.op.callBoxed(stack);
    held.clear();
    for (size_t r = 0; r < step.results.size(); ++r) {
      take_result(step, step.results[r], stack[r], storages, created);
    }
    stack.clear();
    show_written(step);
    // Free what nothing uses any more.
    const auto free_if_last = [&](const auto& user) {
      if (last[user.slot] == k && is_created[user.slot]) storages[user.slot] = {};
    };
    for_each_tensor(step.args, free_if_last);
    for_each_result(step.results, free_if_last);
  }
}

void interpret(const std::vector<StepPtr>& steps, Segment& segment) {
  std::vector<c10::Storage> storages(segment.size());
  for (uint32_t slot = 0; slot < segment.size(); ++slot) {
    if (!segment.is_created(slot)) storages[slot] = segment.at(slot)->backing();
  }
  try {
    run_steps(steps, segment.scalars, storages, segment.random,
              [&](const Step&, uint32_t slot, const at::Tensor& tensor) {
                if (auto lazy = segment.lock(slot)) lazy->set_backing(tensor.storage());
              });
  } catch (...) {
    for (uint32_t slot = 0; slot < segment.size(); ++slot) {
      if (!segment.is_created(slot) || storages[slot]) continue;
      if (auto lazy = segment.lock(slot); lazy && !lazy->backing()) {
        lazy->set_error(std::current_exception());
      }
    }
    throw;
  }
}

}  // namespace reprise
