/// \file
/// A segment as the step finder sees it: which ops, on which storages, and how
/// old those are. The rules themselves are in step_finder.cpp.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "lazy_backend/flat_map.h"
#include "lazy_backend/mix_hash.h"
#include "lazy_backend/step_finder.h"

namespace reprise {

class StepLog {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  struct Storage {
    uint64_t id = 0;
    uint32_t born = kNone;  ///< op that made it, or first used a fresh one; kNone: none here
    uint32_t last_use = kNone;
    uint32_t last_write = kNone;
    bool fresh = false;
    bool settled = false;  ///< fresh, but a weight after all
    bool leaf = false;     ///< a parameter
    bool from_factory = false;

    /// It lives from iteration to iteration, as far as can be told.
    bool old() const { return leaf || born == kNone || settled; }
  };

  struct Access {
    uint32_t slot;
    bool written;
  };

  struct Op {
    uint32_t op;
    uint32_t first_access;
    uint32_t slide_to;  ///< start of the run of ops without tensor inputs that ends before it
    bool has_inputs;
    bool grad_mode;
    int64_t live;
    // These depend on which storages are old.
    bool writes_old = false;
    int32_t score = 0;       ///< of a cut before this op; low is good
    uint64_t old_reads = 0;  ///< hash of the op and the old storages it only reads; 0: none
  };

  void append(const StepFinder::Op& op);
  void clear();

  /// Settles anew which fresh storages are weights: those in use on both sides
  /// of `cut`, where an iteration begins.
  void settle(uint32_t cut);

  uint32_t size() const { return static_cast<uint32_t>(ops_.size()); }
  const Op& operator[](uint32_t p) const { return ops_[p]; }
  std::span<const Access> accesses(uint32_t p) const { return accesses(p, p + 1); }
  /// Of ops [first, last).
  std::span<const Access> accesses(uint32_t first, uint32_t last) const;
  std::span<const Storage> storages() const { return storages_; }

 private:
  uint32_t slot_of(uint64_t storage);
  void describe(uint32_t p);

  std::vector<Op> ops_;
  std::vector<Access> accesses_;
  std::vector<Storage> storages_;
  FlatMap slots_;
};

}  // namespace reprise
