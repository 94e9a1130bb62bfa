#include "lazy_backend/step_recorder.h"

#include <ATen/core/ATen_fwd.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "lazy_backend/device.h"
#include "lazy_backend/other_layouts.h"

namespace reprise {
namespace {

bool list_holds_tensors(const c10::IValue& value) {
  if (value.isTensorList() || value.isOptionalTensorList()) return true;
  for (const c10::IValue& item : value.toListRef()) {
    if (item.isTensor()) return true;
  }
  return false;
}

void note_parameter(LazyStorage& storage, const at::Tensor& tensor) {
  if (!storage.is_parameter() && tensor.requires_grad() && tensor.is_leaf()) {
    storage.set_is_parameter();
  }
}

}  // namespace

StepRecorder::StepRecorder(const c10::OperatorHandle& op, const OpPolicy& policy,
                           Segment& segment, c10::DeviceIndex device_index, Device device)
    : policy_(policy),
      segment_(segment),
      infers_(device == Device::kMeta),
      step_(std::make_shared<Step>(op)) {
  step_->first_slot = segment.size();
  step_->device_index = device_index;
  step_->randomness = policy.randomness;
  step_->constant_floats = policy.constant_floats;
  step_->grad_mode = c10::GradMode::is_enabled();
  step_->inferred = infers_;
}

c10::Device StepRecorder::device() const {
  return infers_ ? c10::Device(c10::kMeta) : backing_device_of(step_->device_index);
}

at::Tensor StepRecorder::on_device(const at::Tensor& lazy) const {
  if (!infers_) return unwrap(lazy);
  // Views of one storage are that of one here as well.
  for (const Unwrapped& each : tensors_) {
    if (lazy_storage(each.lazy) == lazy_storage(lazy)) {
      return meta_tensor(each.backing.storage(), lazy);
    }
  }
  return meta_tensor(meta_storage(lazy.storage().nbytes()), lazy);
}

Arg StepRecorder::take_tensor(c10::IValue& value, int top_level) {
  Arg arg;
  const at::Tensor& tensor = value.toTensor();
  if (!tensor.defined()) {
    arg.kind = Arg::Kind::kUndefined;
    return arg;
  }
  if (!is_lazy(tensor)) {
    TORCH_CHECK(tensor.dim() == 0 && tensor.device().is_cpu(),
                "Expected all tensors to be on the same device, but found at least two devices, "
                "lazy:", static_cast<int>(step_->device_index), " and ", tensor.device(),
                "! (when checking arguments of ", step_->op.operator_name(),
                "; move the tensor with .to(torch::kLazy))");
    arg.kind = Arg::Kind::kNumber;
    // A wrapped number is nobody's tensor; another may be written to later.
    arg.set_constant(tensor.unsafeGetTensorImpl()->is_wrapped_number() ? tensor
                                                                       : tensor.clone());
    return arg;
  }
  LazyStorage* storage = lazy_storage(tensor);
  note_parameter(*storage, tensor);
  arg.kind = Arg::Kind::kTensor;
  const int64_t found = segment_.find(storage);
  arg.first_use = found < 0;
  if (infers_ && arg.first_use) {
    TORCH_CHECK(storage->pending_in() == nullptr && storage->backing() && !storage->error(),
                "reprise: not a value yet");
  }
  arg.slot = arg.first_use ? segment_.add_input(storage) : static_cast<uint32_t>(found);
  Geometry geometry(*tensor.unsafeGetTensorImpl());
  if (const auto shape = symbolic_shape(tensor)) geometry.fixed = shape->fixed();
  arg.set_geometry(std::move(geometry));
  // Ops compare the identity of arguments: one that comes again is the same again.
  const auto again = std::find_if(tensors_.begin(), tensors_.end(), [&](const Unwrapped& each) {
    return each.lazy.is_same(tensor);
  });
  at::Tensor backing = again != tensors_.end() ? again->backing : on_device(tensor);
  tensors_.push_back({tensor, backing, top_level});
  value = std::move(backing);
  return arg;
}

Arg StepRecorder::take(c10::IValue& value, const c10::Argument& declared, int top_level) {
  Arg arg;
  if (value.isNone()) return arg;
  if (value.isTensor()) return take_tensor(value, top_level);
  if (value.isInt()) {
    arg.kind = Arg::Kind::kInt;
    arg.i = value.toInt();
  } else if (value.isBool()) {
    arg.kind = Arg::Kind::kBool;
    arg.b = value.toBool();
  } else if (value.isDouble()) {
    arg.kind = Arg::Kind::kDouble;
    arg.d = value.toDouble();
  } else if (value.isIntList()) {
    arg.kind = Arg::Kind::kIntList;
    arg.set_ints(value.toIntVector(), value);
  } else if (value.isDevice()) {
    arg.kind = Arg::Kind::kDevice;
    arg.set_constant(value);
    if (value.toDevice().is_lazy()) value = device();
  } else if (value.isList() && list_holds_tensors(value)) {
    arg.kind = Arg::Kind::kList;
    std::vector<Arg> items;
    const bool optional = value.isOptionalTensorList();
    c10::List<at::Tensor> tensors;
    c10::List<std::optional<at::Tensor>> optionals;
    for (const c10::IValue& item : value.toListRef()) {
      c10::IValue copy = item;
      items.push_back(take(copy, declared, -1));
      if (optional) {
        optionals.push_back(copy.to<std::optional<at::Tensor>>());
      } else {
        tensors.push_back(copy.toTensor());
      }
    }
    arg.set_list(std::move(items));
    if (optional) {
      value = std::move(optionals);
    } else {
      value = std::move(tensors);
    }
  } else if (value.isString() || value.isComplexDouble() || value.isList() ||
             value.isGenerator()) {
    arg.kind = Arg::Kind::kConstant;
    arg.set_constant(value);
  } else {
    arg.kind = Arg::Kind::kOpaque;
  }
  return arg;
}

void StepRecorder::take_arguments(torch::jit::Stack& stack) {
  const auto& declared = step_->op.schema().arguments();
  const size_t base = stack.size() - declared.size();
  step_->args.reserve(declared.size());
  for (size_t k = 0; k < declared.size(); ++k) {
    step_->args.push_back(take(stack[base + k], declared[k], static_cast<int>(k)));
  }
  if (policy_.cast_argument >= 0) {
    Arg& number = step_->args[static_cast<size_t>(policy_.cast_argument)];
    if (number.kind == Arg::Kind::kDouble) {
      number.cast = cast_dtype(policy_, c10::ArrayRef<c10::IValue>(stack.data() + base, declared.size()));
    }
  }
  argument_tensors_ = tensors_.size();
  size_t writes = policy_.writes.size();
  if (policy_.training_argument >= 0 && writes > policy_.first_hidden_write) {
    const Arg& training = step_->args[static_cast<size_t>(policy_.training_argument)];
    if (training.kind == Arg::Kind::kBool && !training.b) writes = policy_.first_hidden_write;
  }
  for (size_t k = 0; k < writes; ++k) {
    const Arg& arg = step_->args[policy_.writes[k]];
    const auto note = [&](const Arg& tensor) {
      step_->written.push_back(tensor.slot);
      if (segment_.is_written(tensor.slot)) return;
      if (!segment_.is_created(tensor.slot)) step_->written_inputs.push_back(tensor.slot);
      segment_.set_written(tensor.slot);
      newly_written_.push_back(tensor.slot);
    };
    if (arg.kind == Arg::Kind::kTensor) note(arg);
    if (arg.kind == Arg::Kind::kList) for_each_tensor(arg.list(), note);
  }
}

Result StepRecorder::give(c10::IValue& value, int again) {
  Result result;
  if (value.isList() && list_holds_tensors(value)) {
    result.kind = Result::Kind::kList;
    auto items = std::make_shared<std::vector<Result>>();
    c10::List<at::Tensor> tensors;
    for (const c10::IValue& item : value.toListRef()) {
      c10::IValue copy = item;
      items->push_back(give(copy, -1));
      tensors.push_back(copy.toTensor());
    }
    result.list = std::move(items);
    value = std::move(tensors);
    return result;
  }
  if (!value.isTensor()) {
    result.kind = Result::Kind::kConstant;
    result.constant = value;
    if (value.isList() && value.toListRef().empty()) {
      // An empty list of tensors, say.
      traceable_ = false;
    }
    return result;
  }
  if (policy_.host_results && !infers_ && value.toTensor().defined()) {
    value = value.toTensor().to(device());
  }
  const at::Tensor tensor = value.toTensor();
  if (!tensor.defined()) return result;
  if (again >= 0) {
    for (const Unwrapped& each : tensors_) {
      if (each.argument != again) continue;
      result.kind = Result::Kind::kArgument;
      result.arg = again;
      value = each.lazy;
      return result;
    }
  }
  if (tensor.device() != device() || is_of_other_layout(tensor)) {
    traceable_ = false;
    if (!infers_ && tensor.device() == device()) {
      for (const Unwrapped& each : tensors_) note_shared_storage(each.lazy);
      value = wrap_other_layout(tensor, step_->device_index);
    }
    return result;
  }
  for (const Unwrapped& each : tensors_) {
    if (each.backing.storage().unsafeGetStorageImpl() !=
        tensor.storage().unsafeGetStorageImpl()) {
      continue;
    }
    LazyStorage* storage = lazy_storage(each.lazy);
    at::Tensor alias =
        wrap(c10::intrusive_ptr<LazyStorage>::reclaim_copy(storage), tensor,
             each.lazy.key_set());
    result.kind = Result::Kind::kAlias;
    result.arg = each.argument;
    result.slot = static_cast<uint32_t>(segment_.find(storage));
    result.geometry = shared_geometry(Geometry(*alias.unsafeGetTensorImpl()));
    value = std::move(alias);
    return result;
  }
  result.kind = Result::Kind::kNew;
  result.slot = segment_.size();
  result.nbytes = tensor.storage().nbytes();
  result.device_index = step_->device_index;
  result.geometry = shared_geometry(Geometry(*tensor.unsafeGetTensorImpl()));
  at::Tensor lazy;
  if (infers_) {
    lazy = segment_.make_new(result);
  } else {
    lazy = wrap_new(tensor, step_->device_index);
    segment_.add_created(lazy_storage(lazy));
  }
  tensors_.push_back({lazy, tensor, -1});  // a second result may share its storage
  value = std::move(lazy);
  return result;
}

void StepRecorder::check_changed_geometry() {
  for (const Unwrapped& each : tensors_) {
    if (same_geometry(each.backing, each.lazy)) continue;
    // An `out` tensor was resized. Its storage object stayed the same.
    traceable_ = false;
    if (infers_) continue;
    lazy_storage(each.lazy)->set_backing(each.backing.storage());
    take_geometry(each.backing, each.lazy);
  }
}

std::shared_ptr<Step> StepRecorder::take_results(torch::jit::Stack& stack) {
  if (!policy_.writes.empty()) check_changed_geometry();
  const size_t count = step_->op.schema().returns().size();
  const size_t base = stack.size() - count;
  step_->results.reserve(count);
  bool aliases = policy_.writes.empty() && policy_.randomness == Randomness::kNone;
  for (size_t k = 0; k < count; ++k) {
    step_->results.push_back(give(stack[base + k], policy_.returns_argument[k]));
    const Result& result = step_->results.back();
    const auto is_alias = [](const Result& r) {
      return r.kind == Result::Kind::kAlias || r.kind == Result::Kind::kNone;
    };
    aliases = aliases && (result.kind == Result::Kind::kList
                              ? std::all_of(result.list->begin(), result.list->end(), is_alias)
                              : is_alias(result));
  }
  step_->only_aliases = aliases;
  step_->returns_arguments =
      std::count_if(step_->results.begin(), step_->results.end(), [](const Result& result) {
        return result.kind == Result::Kind::kArgument;
      }) > 1;
  step_->slot_count = segment_.size() - step_->first_slot;
  return traceable_ ? step_ : nullptr;
}

std::vector<SymbolicShapePtr> StepRecorder::argument_shapes() const {
  std::vector<SymbolicShapePtr> shapes;
  for (size_t k = 0; k < argument_tensors_; ++k) shapes.push_back(symbolic_shape(tensors_[k].lazy));
  return shapes;
}

void StepRecorder::undo() {
  for (const uint32_t slot : newly_written_) segment_.set_written(slot, false);
  segment_.rollback(step_->first_slot);
}

bool holds_lists(const c10::IValue& list) {
  const auto items = list.toListRef();
  return !items.empty() && items.front().isList();
}

c10::IValue Unwrapper::operator()(const c10::IValue& value) {
  if (value.isTensor()) {
    const at::Tensor& lazy = value.toTensor();
    if (is_lazy_of_other_layout(lazy)) return unwrap_other_layout(lazy);
    if (!is_lazy(lazy)) return value;
    for (const Pair& pair : pairs_) {
      if (pair.lazy.is_same(lazy)) return pair.backing;
    }
    pairs_.push_back({lazy, unwrap(lazy)});
    return pairs_.back().backing;
  }
  if (value.isDevice() && value.toDevice().is_lazy()) {
    return backing_device_of(value.toDevice().index());
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const c10::IValue& item : value.toListRef()) {
      list.push_back((*this)(item).to<std::optional<at::Tensor>>());
    }
    return list;
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const c10::IValue& item : value.toListRef()) list.push_back((*this)(item).toTensor());
    return list;
  }
  if (value.isList() && holds_lists(value)) {  // the buffers of a collective
    c10::impl::GenericList list(value.toList().elementType());
    for (const c10::IValue& item : value.toListRef()) list.push_back((*this)(item));
    return list;
  }
  return value;
}

namespace {

/// Gives slots their new numbers, in the order of first appearance.
class Renumbering {
 public:
  Renumbering(std::vector<int64_t>& slots, uint32_t& next, std::vector<bool>& created)
      : slots_(slots), next_(next), created_(created) {}

  Arg arg(const Arg& before) {
    Arg after = before;
    if (before.kind == Arg::Kind::kTensor) {
      after.first_use = slots_[before.slot] < 0;
      after.slot = number(before.slot, /*created=*/false);
    } else if (before.kind == Arg::Kind::kList) {
      std::vector<Arg> items;
      for (const Arg& item : before.list()) items.push_back(arg(item));
      after.set_list(std::move(items));
    }
    return after;
  }

  Result result(const Result& before) {
    Result after = before;
    if (before.kind == Result::Kind::kNew || before.kind == Result::Kind::kAlias) {
      after.slot = number(before.slot, before.kind == Result::Kind::kNew);
    } else if (before.kind == Result::Kind::kList) {
      auto items = std::make_shared<std::vector<Result>>();
      for (const Result& item : *before.list) items->push_back(result(item));
      after.list = std::move(items);
    }
    return after;
  }

  uint32_t number(uint32_t slot, bool created) {
    if (slots_[slot] < 0) {
      slots_[slot] = next_++;
      created_.push_back(created);
    }
    return static_cast<uint32_t>(slots_[slot]);
  }

 private:
  std::vector<int64_t>& slots_;
  uint32_t& next_;
  std::vector<bool>& created_;
};

}  // namespace

std::shared_ptr<Step> renumber(const Step& step, std::vector<int64_t>& slots,
                               uint32_t& next_slot, std::vector<bool>& created) {
  auto after = std::make_shared<Step>(step);
  Renumbering renumbering(slots, next_slot, created);
  after->first_slot = next_slot;
  for (size_t k = 0; k < step.args.size(); ++k) after->args[k] = renumbering.arg(step.args[k]);
  for (size_t k = 0; k < step.results.size(); ++k) {
    after->results[k] = renumbering.result(step.results[k]);
  }
  after->slot_count = next_slot - after->first_slot;
  after->written.clear();
  after->written_inputs.clear();
  for (const uint32_t slot : step.written) {
    after->written.push_back(static_cast<uint32_t>(slots[slot]));
  }
  return after;
}

}  // namespace reprise
