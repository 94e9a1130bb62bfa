/// \file
/// What has been recorded of a thread's program: a tree of steps.
///
/// Every path from a root is the beginning of a segment. Segments that begin
/// alike share nodes; a node has usually one child. Where segments ended, a node
/// holds a `SegmentEnd`, which carries the programs.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "lazy_backend/trace.h"

namespace reprise {

struct SegmentEnd;

struct Node {
  StepPtr step;  ///< null in a root
  Node* parent = nullptr;
  Node* child = nullptr;    ///< the first of its children
  Node* sibling = nullptr;  ///< the next of its parent's children
  /// A step of the user's program ends here, whatever comes next.
  bool cut = false;
  uint32_t depth = 0;  ///< steps from the root
  std::unique_ptr<SegmentEnd> end;

  Node();
  ~Node();
};

class TraceTree {
 public:
  /// Nodes after which the tree is emptied: some 100 MB.
  static constexpr size_t kMostNodes = 200'000;

  /// The root for an environment (`environment_key`).
  Node* root(uint64_t environment);

  /// The child of `node` that does the same as `step`, or null. A child that
  /// differs from it only in floats is changed to take any.
  static Node* find(const Node* node, const Step& step);

  /// As `find`, and adds it where it is missing.
  Node* extend(Node* node, StepPtr step);

  /// Steps of the path from the root to `node`, in order.
  static std::vector<StepPtr> path(const Node* node);

  /// Drops the subtree below `node` of programs that no longer fit, since a step
  /// at or above it was generalised.
  static void drop_programs(Node* node);

  size_t size() const { return nodes_.size(); }
  bool full() const { return nodes_.size() >= kMostNodes; }
  void clear();

  /// Calls `visit(const Node&)` for each node where a segment has ended.
  template <class Visit>
  void for_each_end(const Visit& visit) const {
    for (const auto& node : nodes_) {
      if (node->end) visit(*node);
    }
  }

 private:
  Node* make_node(Node* parent, StepPtr step);

  std::vector<std::unique_ptr<Node>> nodes_;
  std::unordered_map<uint64_t, Node*> roots_;
};

/// What else changes the meaning of a trace: default dtype, deterministic
/// algorithms, precision of matrix products, the backing device's kind.
uint64_t environment_key();

}  // namespace reprise
