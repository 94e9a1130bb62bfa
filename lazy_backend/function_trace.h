/// \file
/// What a session knows of one run of a compiled function (reprise/compile.h).
#pragma once

#include <c10/core/TensorImpl.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "lazy_backend/program.h"
#include "lazy_backend/storage.h"
#include "lazy_backend/trace.h"

namespace reprise {

/// Leaves that compiled functions have used in a thread, but for arguments of theirs.
struct UsedLeaves {
  /// A weakly held tensor keeps its address.
  std::unordered_map<const c10::TensorImpl*, c10::weak_intrusive_ptr<c10::TensorImpl>> all;
  uint64_t generation = 0;  ///< another one with each leaf that is new
};

struct FunctionTrace {
  /// Why the function is not one segment: what ended the first of several. Empty: it is one.
  std::string broken_by;
  /// It was verified, as a whole.
  bool verified = false;
  /// Of its segment; empty where that was recorded.
  std::string segment;
  std::vector<StepPtr> steps;
  /// A program that may take the place of a verified segment; null: not yet.
  std::shared_ptr<Program> program;
  /// Why there will be none; empty where one may come.
  std::string no_program;
  /// By slot: what was there before. Null for what a step has created.
  std::vector<c10::intrusive_ptr<LazyStorage>> inputs;
  /// What was created and is held by somebody when the function has ended.
  std::vector<std::pair<uint32_t, c10::intrusive_ptr<LazyStorage>>> created;
  ScalarValues scalars;
  /// Tensors over `inputs` that ops took, with the slot, where they were asked for.
  std::vector<std::pair<uint32_t, c10::weak_intrusive_ptr<c10::TensorImpl>>> tensors;
};

}  // namespace reprise
