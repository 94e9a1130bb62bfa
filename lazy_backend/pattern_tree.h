/// \file
/// Segments that differ in integers alone, as one path each.
///
/// Beside the trace tree, where each size has a path of its own, lies this one: every
/// segment that is recorded goes down a path whose steps are alike (`Step::alike`). Where
/// such a path ends, all its sizes share what is known: that they are many, which is worth
/// a program over symbols, and that program.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "lazy_backend/loop_finder.h"
#include "lazy_backend/program.h"
#include "lazy_backend/segment.h"
#include "lazy_backend/trace.h"

namespace reprise {

/// What the sizes of a segment share. A session's own, like the tree.
class Pattern {
 public:
  /// A program over symbols has been asked for.
  bool awaits() const { return general_ != nullptr ? general_->awaits() : requested_ != nullptr; }

  /// Its segments are those of `general` where some inputs coincide (distinct_inputs.h), and
  /// the program of that one serves them as well. Unless it turned out not to.
  void become_case_of(const std::shared_ptr<Pattern>& general);
  bool is_case() const { return general_ != nullptr; }

  /// Its segments are iterations of a loop: there will be other sizes, that is, positions.
  void note_loop() { in_loop_ = true; }

  /// Another size was met: these steps, whose slots are bound in `segment`. Asks for a
  /// program over symbols where there are sizes enough. `others`: values of the symbols of
  /// the user's marks, where the steps are possible as well (`at_symbols`); then this size
  /// and another one are enough.
  void add_size(const std::string& name, std::vector<StepPtr> steps, const Segment& segment,
                std::vector<std::vector<int64_t>> others = {});

  /// This size is worth a program. Returns whether it is to be one over symbols, by the
  /// user's marks, which is asked for where it has not been.
  bool request_marked(const std::string& name, const std::vector<StepPtr>& steps,
                      const Segment& segment);

  /// As `add_size` for one that is there already, and that the program does not serve. Returns
  /// whether another program is asked for, or has been.
  bool request_another(const std::string& name, const std::vector<StepPtr>& steps,
                       const Segment& segment);

  /// The program over symbols at one of the sizes, whose outputs are those that another
  /// size's would have; null where there is none yet.
  const std::shared_ptr<Program>& program();

  /// These steps were inferred. Returns whether a size with their integers was before, as
  /// far as that is known.
  bool note_inferred(const std::vector<StepPtr>& steps);
  /// Its program is not looked at any more where it runs.
  bool is_trusted() { return program() != nullptr && program()->shared->checked(); }

  /// No program serves this size: a step has changed, or the program takes for granted
  /// what does not hold.
  void note_unserved() { unserved_ = true; }
  /// It is no case of another pattern, as it seemed to be.
  void note_no_case();

  /// One more size gets a program of its own. Returns false where that would be too many.
  bool take_own_program();

  /// A size runs that has the program over symbols. Returns how often any did so far.
  uint64_t note_run() { return ++runs_; }

  void drop_programs();

 private:
  uint64_t enough() const;
  static constexpr size_t kMostExamples = 4;
  static constexpr int kMostRequests = 4;
  static constexpr size_t kMostRemembered = 4096;

  /// Returns false where there is no other size whose steps are alike.
  bool request(const std::string& name, const std::vector<StepPtr>& steps, const Segment& segment);
  /// Among the examples, of which the ones that differ most are kept.
  void remember(std::vector<StepPtr> steps);

  std::shared_ptr<Pattern> general_;
  bool in_loop_ = false;
  bool differs_ = false;  ///< it was taken for a case, and is none
  std::vector<std::vector<int64_t>> marked_;  ///< values of the symbols of the user's marks
  uint64_t sizes_ = 0;
  uint64_t ops_ = 0;
  uint64_t next_request_ = 0;  ///< when there are so many sizes; or as few as are enough
  uint64_t runs_ = 0;
  int64_t own_programs_ = 0;
  int requests_ = 0;
  bool unserved_ = true;
  std::vector<std::vector<StepPtr>> examples_;
  std::unordered_set<uint64_t> inferred_;  ///< sizes, by hash
  std::shared_ptr<Program> requested_, program_;
};

class PatternTree {
 public:
  struct Node {
    StepPtr step;  ///< one of those that are alike; null in a root
    Node* parent = nullptr;
    std::vector<std::unique_ptr<Node>> next;
    /// A step of the user's program ends here.
    bool cut = false;
    /// A loop goes on here whose number of iterations changes (loop_finder.h): what is
    /// recorded is cut.
    bool boundary = false;
    /// At or below it lies a pattern with a program.
    bool ready = false;
    /// A view, which any number of others like it may follow: see `collapse`. No segment ends
    /// here: where the last of them is, is not known.
    bool repeats = false;
    std::shared_ptr<Pattern> pattern;
    /// Of a root: see `collection_at_start`.
    std::vector<c10::OperatorHandle> collections;
  };

  PatternTree() = default;
  ~PatternTree() { clear(); }
  PatternTree(const PatternTree&) = delete;
  PatternTree& operator=(const PatternTree&) = delete;

  /// The root for an environment (`environment_key`).
  Node* root(uint64_t environment);

  /// The child whose step is alike, floats included, or `node` itself where such steps repeat;
  /// or null.
  static Node* find(Node* node, const Step& step);
  /// Whether `node` is one that steps like this repeat.
  static bool repeats(const Node& node, const Step& step);

  static const std::shared_ptr<Pattern>& pattern_of(Node& node);

  /// Where a loop in the first `count` steps runs another number of times than it did in a
  /// path that begins alike; nothing where no loop is found. A run of views, or a step with a
  /// list of another length than there, counts as one: `collection_at_start` knows it from then
  /// on. A run of views of one storage does not, whose number is of no account from then on.
  /// Pointers to nodes are no longer good.
  std::optional<Loop> loop_of_other_length(uint64_t environment, const std::vector<StepPtr>& steps,
                                           size_t count);
  /// How many of the first steps make or take what a loop goes through: views of all its
  /// parts, or a list of what it has left. By their number all that follows would differ.
  size_t collection_at_start(uint64_t environment, std::span<const StepPtr> steps) const;
  /// How many of the first `count` steps, at their end, are a run of views of any length.
  size_t run_before(uint64_t environment, const std::vector<StepPtr>& steps, size_t count);
  /// Steps by this op are a collection, where a segment begins with them.
  void note_collection(uint64_t environment, const Step& step);
  /// There are nodes with a `boundary`.
  bool has_boundaries() const { return has_boundaries_; }
  void set_boundary(Node* node) { node->boundary = has_boundaries_ = true; }

  /// The end of the path of these steps, made where it is missing. Where floats differ from
  /// what was there, they become dynamic, in the tree and in `steps`.
  Node* insert(uint64_t environment, std::vector<StepPtr>& steps, size_t count);

  /// Puts the steps of the path to `node` in the places of those that are the same: what many
  /// sizes verify against should stay in the caches.
  static void share_steps(const Node& node, std::span<StepPtr> steps);

  /// `refresh` is to look at this end, whose pattern may have been asked a program for.
  void await(Node* node);
  /// Marks the ways to patterns that have got a program since they were inserted.
  void refresh();

  void clear();

 private:
  /// More nodes are all forgotten: the patterns that go on are found again.
  static constexpr size_t kMostNodes = 1 << 16;

  std::optional<Loop> find_loop_of_other_length(uint64_t environment,
                                                const std::vector<StepPtr>& steps, size_t count);
  /// Makes one node of each run of views of one storage. Returns false for other loops.
  bool collapse(uint64_t environment, const std::vector<StepPtr>& steps, const Loop& loop);
  /// Puts what lies behind a run of views, however long, behind its first one.
  void collapse(Node* first);
  void remove(std::unique_ptr<Node> top);
  bool is_collection(uint64_t environment, const Step& step) const;

  std::unordered_map<uint64_t, std::unique_ptr<Node>> roots_;
  std::vector<Node*> awaited_;  ///< ends whose pattern has no program
  bool has_boundaries_ = false;
  size_t size_ = 0;
};

}  // namespace reprise
