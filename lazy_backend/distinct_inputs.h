/// \file
/// Steps that do the same as others do, but for storages that are one here and two there.
///
/// `h = c = zeros` before a loop gives its first iteration one storage where later ones have
/// two. A program that takes two serves it as well, as long as it writes neither. (The other
/// way round does not hold.)
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "lazy_backend/trace.h"

namespace reprise {

/// Numbers the slots of steps as if what coincides were distinct, one step after the other,
/// by other steps in which it is.
class DistinctInputs {
 public:
  /// `step` with the slots that `like` has, to which it is alike then (`Step::alike`); null
  /// where no numbering makes it so.
  StepPtr add(const Step& step, const Step& like, bool floats_may_differ);

  /// By slot of the steps that were returned: the slot it had.
  const std::vector<uint32_t>& slots() const { return slots_; }

 private:
  bool meet(uint32_t slot, uint32_t like, bool created);
  bool take(Arg& arg, const Arg& like);
  bool make(Result& result, const Result& like);
  bool write(const Step& step, const Step& like);

  struct Known {
    uint32_t numbers = 0;  ///< how many it has
    bool created = false;
    bool written = false;
  };
  std::vector<Known> known_;     ///< by slot before
  std::vector<uint32_t> slots_;  ///< by slot after
};

/// All of `steps` by `like`, which are as many; nothing where one of them cannot be.
struct DistinctSteps {
  std::vector<StepPtr> steps;
  std::vector<uint32_t> slots;  ///< `DistinctInputs::slots`
};
std::optional<DistinctSteps> as_if_distinct(std::span<const StepPtr> steps,
                                            std::span<const StepPtr> like, bool floats_may_differ);

}  // namespace reprise
