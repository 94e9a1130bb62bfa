#include "lazy_backend/distinct_inputs.h"

#include <algorithm>

namespace reprise {

bool DistinctInputs::meet(uint32_t slot, uint32_t like, bool created) {
  if (like < slots_.size()) return slots_[like] == slot;
  if (like > slots_.size()) return false;
  if (slot >= known_.size()) known_.resize(slot + 1);
  Known& known = known_[slot];
  // What the steps make cannot come from outside as well; what they write must be one thing.
  if (known.numbers > 0 && (created || known.created || known.written)) return false;
  ++known.numbers;
  known.created = created;
  slots_.push_back(slot);
  return true;
}

bool DistinctInputs::take(Arg& arg, const Arg& like) {
  if (arg.kind != like.kind) return false;
  if (arg.kind == Arg::Kind::kTensor) {
    if (!meet(arg.slot, like.slot, /*created=*/false)) return false;
    arg.slot = like.slot;
    arg.first_use = like.first_use;
  } else if (arg.kind == Arg::Kind::kList) {
    std::vector<Arg> items = arg.list();
    if (items.size() != like.list().size()) return false;
    for (size_t k = 0; k < items.size(); ++k) {
      if (!take(items[k], like.list()[k])) return false;
    }
    arg.set_list(std::move(items));
  }
  return true;
}

bool DistinctInputs::make(Result& result, const Result& like) {
  if (result.kind != like.kind) return false;
  if (result.kind == Result::Kind::kNew || result.kind == Result::Kind::kAlias) {
    if (!meet(result.slot, like.slot, result.kind == Result::Kind::kNew)) return false;
    result.slot = like.slot;
  } else if (result.kind == Result::Kind::kList) {
    auto items = std::make_shared<std::vector<Result>>(*result.list);
    if (items->size() != like.list->size()) return false;
    for (size_t k = 0; k < items->size(); ++k) {
      if (!make((*items)[k], (*like.list)[k])) return false;
    }
    result.list = std::move(items);
  }
  return true;
}

bool DistinctInputs::write(const Step& step, const Step& like) {
  if (step.written.size() != like.written.size()) return false;
  for (const uint32_t slot : like.written) {
    const uint32_t before = slots_[slot];
    if (std::find(step.written.begin(), step.written.end(), before) == step.written.end() ||
        known_[before].numbers > 1) {
      return false;
    }
    known_[before].written = true;
  }
  return true;
}

StepPtr DistinctInputs::add(const Step& step, const Step& like, bool floats_may_differ) {
  if (step.op != like.op || step.args.size() != like.args.size() ||
      step.results.size() != like.results.size()) {
    return nullptr;
  }
  auto out = std::make_shared<Step>(step);
  for (size_t k = 0; k < step.args.size(); ++k) {
    if (!take(out->args[k], like.args[k])) return nullptr;
  }
  for (size_t k = 0; k < step.results.size(); ++k) {
    if (!make(out->results[k], like.results[k])) return nullptr;
  }
  if (!write(step, like)) return nullptr;
  out->first_slot = like.first_slot;
  out->slot_count = like.slot_count;
  out->written = like.written;
  out->written_inputs = like.written_inputs;
  if (!like.alike(*out, floats_may_differ)) return nullptr;
  return out;
}

std::optional<DistinctSteps> as_if_distinct(std::span<const StepPtr> steps,
                                            std::span<const StepPtr> like,
                                            bool floats_may_differ) {
  if (steps.size() != like.size()) return std::nullopt;
  DistinctInputs inputs;
  DistinctSteps out;
  for (size_t k = 0; k < steps.size(); ++k) {
    out.steps.push_back(inputs.add(*steps[k], *like[k], floats_may_differ));
    if (out.steps.back() == nullptr) return std::nullopt;
  }
  out.slots = inputs.slots();
  return out;
}

}  // namespace reprise
