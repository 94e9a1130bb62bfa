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
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "lazy_backend/program.h"
#include "lazy_backend/segment.h"
#include "lazy_backend/trace.h"

namespace reprise {

/// What the sizes of a segment share. A session's own, like the tree.
class Pattern {
 public:
  /// A program over symbols has been asked for.
  bool awaits() const { return requested_ != nullptr; }

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

  /// The program over symbols at one of the sizes, whose outputs are those that another
  /// size's would have; null where there is none yet.
  const std::shared_ptr<Program>& program();

  /// These steps were inferred. Returns whether a size with their integers was before, as
  /// far as that is known.
  bool note_inferred(const std::vector<StepPtr>& steps);
  /// Its program is not looked at any more where it runs.
  bool is_trusted() { return program() != nullptr && program_->shared->checked(); }

  /// No program serves this size: a step has changed, or the program takes for granted
  /// what does not hold.
  void note_unserved() { unserved_ = true; }

  /// One more size gets a program of its own. Returns false where that would be too many.
  bool take_own_program();

  /// A size runs that has the program over symbols. Returns how often any did so far.
  uint64_t note_run() { return ++runs_; }

  void drop_programs();

 private:
  static constexpr size_t kMostExamples = 4;
  static constexpr int kMostRequests = 4;
  static constexpr size_t kMostRemembered = 4096;

  void request(const std::string& name, const std::vector<StepPtr>& steps, const Segment& segment);

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
    /// At or below it lies a pattern with a program.
    bool ready = false;
    std::shared_ptr<Pattern> pattern;
  };

  PatternTree() = default;
  ~PatternTree() { clear(); }
  PatternTree(const PatternTree&) = delete;
  PatternTree& operator=(const PatternTree&) = delete;

  /// The root for an environment (`environment_key`).
  Node* root(uint64_t environment);

  /// The child whose step is alike, floats included; or null.
  static Node* find(const Node* node, const Step& step);

  static const std::shared_ptr<Pattern>& pattern_of(Node& node);

  /// The end of the path of these steps, made where it is missing. Where floats differ from
  /// what was there, they become dynamic, in the tree and in `steps`.
  Node* insert(uint64_t environment, std::vector<StepPtr>& steps, size_t count);

  /// `refresh` is to look at this end, whose pattern may have been asked a program for.
  void await(Node* node);
  /// Marks the ways to patterns that have got a program since they were inserted.
  void refresh();

  void clear();

 private:
  /// More nodes are all forgotten: the patterns that go on are found again.
  static constexpr size_t kMostNodes = 1 << 16;

  std::unordered_map<uint64_t, std::unique_ptr<Node>> roots_;
  std::vector<Node*> awaited_;  ///< ends whose pattern has no program
  size_t size_ = 0;
};

}  // namespace reprise
