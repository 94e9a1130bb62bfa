/// \file
/// What has been recorded of a thread's program: a tree of steps.
///
/// Every path from a root is the beginning of a segment. Segments that begin
/// alike share nodes; a node has usually one child. Where segments ended, a node
/// holds a `SegmentEnd`, which carries the programs.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "lazy_backend/trace.h"

namespace reprise {

struct SegmentEnd;
struct Node;

/// The children of a node with many, by `CallHash`.
class ChildIndex {
 public:
  Node* find(uint64_t hash) const {
    const auto found = first_.find(hash);
    return found == first_.end() ? nullptr : found->second;
  }
  void add(Node* child);
  void remove(Node* child);

 private:
  std::unordered_map<uint64_t, Node*> first_;
};

struct Node {
  StepPtr step;  ///< null in a root
  Node* parent = nullptr;
  Node* child = nullptr;    ///< the first of its children
  Node* sibling = nullptr;  ///< the next of its parent's children
  std::unique_ptr<ChildIndex> index;  ///< null where there are few children
  Node* same_hash = nullptr;          ///< the next of its parent's children with its hash
  /// A step of the user's program ends here, whatever comes next.
  bool cut = false;
  uint32_t depth = 0;  ///< steps from the root
  size_t bytes = 0;    ///< what it takes, its step included, `end` not
  std::unique_ptr<SegmentEnd> end;

  Node();
  ~Node();
};

class TraceTree {
 public:
  TraceTree() = default;
  ~TraceTree() { clear(); }
  TraceTree(const TraceTree&) = delete;
  TraceTree& operator=(const TraceTree&) = delete;

  /// The root for an environment (`environment_key`).
  Node* root(uint64_t environment);

  /// The child of `node` that does the same as `step`, or null. A child that
  /// differs from it only in floats is changed to take any.
  static Node* find(const Node* node, const Step& step);

  /// As `find`, and adds it where it is missing.
  Node* extend(Node* node, StepPtr step);

  /// Forgets all below `node`, of which nothing may be in use.
  void cut_off(Node* node);

  /// Steps of the path from the root to `node`, in order.
  static std::vector<StepPtr> path(const Node* node);

  /// Drops the subtree below `node` of programs that no longer fit, since a step
  /// at or above it was generalised.
  static void drop_programs(Node* node);

  /// Where the tree holds more than `options()` allow: forgets segments, with their
  /// programs and the nodes that only they need, those that ran longest ago first, until
  /// a quarter is free again. Returns how many. Roots stay; no other node may be in use.
  size_t make_room();
  /// The nodes alone are over their limit.
  bool takes_too_much() const;

  size_t size() const { return size_; }
  size_t bytes() const { return bytes_; }
  void clear();

  /// Calls `visit(Node&)` for each node where a segment has ended, by its depth first.
  template <class Visit>
  void for_each_end(const Visit& visit) const {
    for (const auto& [environment, root] : roots_) {
      // Down to the first child, along to the sibling, up again.
      for (Node* node = root; node != nullptr;) {
        if (node->end) visit(*node);
        if (node->child != nullptr) {
          node = node->child;
          continue;
        }
        while (node != root && node->sibling == nullptr) node = node->parent;
        node = node == root ? nullptr : node->sibling;
      }
    }
  }

 private:
  Node* make_node(Node* parent, StepPtr step);
  /// Removes a node without children and end, and its parents that become such.
  void prune(Node* node);

  /// So many children are searched one by one.
  static constexpr size_t kFewChildren = 8;

  size_t size_ = 0;
  size_t bytes_ = 0;
  std::unordered_map<uint64_t, Node*> roots_;
};

/// What else changes the meaning of a trace: default dtype, deterministic
/// algorithms, precision of matrix products, the backing device's kind; and which compiled
/// function the calling thread is in.
uint64_t environment_key();

/// What an environment is in that programs are made for it: `default_dtype=double`. Empty
/// where everything is as it is when a process starts.
std::string environment_text(uint64_t key);

/// The number of the compiled function that the calling thread traces; 0: none.
uint64_t& traced_function();

}  // namespace reprise
