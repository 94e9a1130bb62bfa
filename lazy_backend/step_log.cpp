#include "lazy_backend/step_log.h"

namespace reprise {
namespace {

// A fresh storage that is still in use after so many ops may be a weight
// without grad: it counts as old from then on.
constexpr uint32_t kSettlesAfter = 256;

}  // namespace

void StepLog::append(const StepFinder::Op& op) {
  const uint32_t p = size();
  const size_t first = accesses_.size();
  for (const StepFinder::Argument& argument : op.arguments) {
    const size_t known = storages_.size();
    const uint32_t slot = slot_of(argument.storage);
    Storage& storage = storages_[slot];
    if (argument.fresh && storages_.size() > known) {
      storage.fresh = true;
      storage.born = p;
    }
    if (storage.fresh && p - storage.born >= kSettlesAfter) storage.settled = true;
    // A leaf that was computed (a detached activation) is no parameter.
    if (argument.leaf && (storage.born == kNone || storage.fresh || storage.from_factory)) {
      storage.leaf = true;
    }
    storage.last_use = p;
    if (argument.written) storage.last_write = p;
    accesses_.push_back({slot, false});
  }
  for (size_t a = first; a < accesses_.size(); ++a) {  // written through any of the arguments
    accesses_[a].written = storages_[accesses_[a].slot].last_write == p;
  }
  for (const uint64_t created : op.created) {
    Storage& storage = storages_[slot_of(created)];
    storage.born = p;
    storage.from_factory = op.arguments.empty();
  }
  const uint32_t slide_to = p > 0 && !ops_.back().has_inputs ? ops_.back().slide_to : p;
  ops_.push_back({.op = op.op,
                  .first_access = static_cast<uint32_t>(first),
                  .slide_to = slide_to,
                  .has_inputs = !op.arguments.empty(),
                  .grad_mode = op.grad_mode,
                  .live = op.live});
  describe(p);
}

void StepLog::clear() {
  ops_.clear();
  accesses_.clear();
  storages_.clear();
  slots_.clear();
}

void StepLog::settle(uint32_t cut) {
  for (Storage& storage : storages_) {
    storage.settled = storage.fresh && storage.born < cut && storage.last_use >= cut;
  }
  for (uint32_t p = 0; p < size(); ++p) describe(p);
}

std::span<const StepLog::Access> StepLog::accesses(uint32_t first, uint32_t last) const {
  const size_t begin = ops_[first].first_access;
  const size_t end = last < size() ? ops_[last].first_access : accesses_.size();
  return {accesses_.data() + begin, end - begin};
}

uint32_t StepLog::slot_of(uint64_t storage) {
  uint32_t& slot = slots_[storage];
  if (slot == FlatMap::kAbsent) {
    slot = static_cast<uint32_t>(storages_.size());
    storages_.push_back({.id = storage});
  }
  return slot;
}

void StepLog::describe(uint32_t p) {
  Op& op = ops_[p];
  op.old_reads = 0;
  op.writes_old = false;
  int32_t batches = 0;
  for (const Access& access : accesses(p)) {
    const Storage& storage = storages_[access.slot];
    if (!storage.old()) {
      // In training this would favour the op that first uses the labels.
      if (storage.fresh && storage.born == p && !op.grad_mode) ++batches;
    } else if (access.written) {
      op.writes_old = true;
    } else {
      op.old_reads = mix_hash(op.old_reads ? op.old_reads : mix_hash(1, op.op), storage.id);
    }
  }
  // A step begins with what it needs no input for, or with a batch, and after
  // the last update of a parameter.
  op.score = static_cast<int32_t>(op.live) - batches;
  if (!op.has_inputs || batches > 0) op.score -= 2;
  if (p > 0 && ops_[p - 1].writes_old) op.score -= 2;
}

}  // namespace reprise
