/// \file
/// Finds where a step of the program ends when nobody marks it.
///
/// While a segment is recorded, each op runs eagerly and is fed here. Sooner or
/// later the finder recognises an iteration (the same op comes back to the same
/// long-lived storages) and answers with a cut, which lies in the past: what was
/// recorded before it is a finished step. How that step's successor begins is
/// remembered (its *head*), so that later ones are cut at once.
///
/// It knows nothing of the trace tree. Ops that follow the tree are not fed;
/// when the tree has no path for one, the segment is fed whole, from its start.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

namespace reprise {

/// Deterministic: the same ops get the same cuts. Memory is bounded by the two
/// constants. Not thread-safe; one finder a session.
class StepFinder {
 public:
  /// Ops after which a segment is cut at the best place there is.
  static constexpr size_t kLongestSegment = 16384;
  /// Heads kept; the one that has not matched for longest gives way.
  static constexpr size_t kMostHeads = 512;

  /// A tensor argument, as the storage under it.
  struct Argument {
    uint64_t storage = 0;  ///< identity, never used again for another storage
    bool written = false;  ///< the op writes it in place
    bool leaf = false;     ///< the tensor is a leaf that requires grad
    /// No op that can be fed made it (it was copied from the host, say), and
    /// this segment is the first to use it: a batch, most likely. A batch has
    /// another identity each time and must not pass for a storage that lives
    /// on. Said of every argument over such a storage.
    bool fresh = false;
  };

  /// One op below autograd.
  struct Op {
    uint32_t op = 0;                      ///< the operator; best numbered from 0
    std::span<const Argument> arguments;  ///< all that are tensors, in order
    std::span<const uint64_t> created;    ///< storages that it made
    bool grad_mode = false;
    /// Lazy storages alive just before it. Differences count only, so that any
    /// constant may be added.
    int64_t live = 0;
  };

  StepFinder();
  ~StepFinder();
  StepFinder(StepFinder&&) noexcept;
  StepFinder& operator=(StepFinder&&) noexcept;

  /// Takes the next op of the segment. A result c, 0 < c < ops fed, says that
  /// ops [0, c) are a finished step. The finder has then forgotten the segment
  /// but not what it learned. Ops [c, n) begin the next one: follow the tree
  /// with them, and feed them again where the tree ends.
  std::optional<size_t> feed(const Op& op);

  /// The segment ended for another reason: a host read, `mark_step()`.
  void restart();

 private:
  class Search;
  std::unique_ptr<Search> search_;
};

}  // namespace reprise
