#include "lazy_backend/trace_tree.h"

#include <ATen/Context.h>
#include <c10/core/DefaultDtype.h>

#include <algorithm>

#include "lazy_backend/device.h"
#include "lazy_backend/executor.h"

namespace reprise {

Node::Node() = default;
Node::~Node() = default;

Node* TraceTree::make_node(Node* parent, StepPtr step) {
  auto node = std::make_unique<Node>();
  node->step = std::move(step);
  node->parent = parent;
  node->depth = parent == nullptr ? 0 : parent->depth + 1;
  nodes_.push_back(std::move(node));
  return nodes_.back().get();
}

Node* TraceTree::root(uint64_t environment) {
  Node*& root = roots_[environment];
  if (root == nullptr) root = make_node(nullptr, nullptr);
  return root;
}

Node* TraceTree::find(const Node* node, const Step& step) {
  for (Node* child = node->child; child != nullptr; child = child->sibling) {
    if (child->step->same(step, /*floats_may_differ=*/false)) return child;
  }
  if (step.constant_floats) return nullptr;
  for (Node* child = node->child; child != nullptr; child = child->sibling) {
    if (!child->step->same(step, /*floats_may_differ=*/true)) continue;
    auto general = std::make_shared<Step>(*child->step);
    bool all = true;  // floats within a list, say, stay constants
    for (size_t k = 0; k < step.args.size(); ++k) {
      Arg& arg = general->args[k];
      if (arg.same(step.args[k], /*floats_may_differ=*/false)) continue;
      all = all && may_be_dynamic(step, k);
      arg.dynamic = true;
    }
    if (!all) continue;
    child->step = std::move(general);
    drop_programs(child);
    return child;
  }
  return nullptr;
}

Node* TraceTree::extend(Node* node, StepPtr step) {
  if (Node* child = find(node, *step)) return child;
  Node* child = make_node(node, std::move(step));
  // Last, so that the common path stays first.
  Node** place = &node->child;
  while (*place != nullptr) place = &(*place)->sibling;
  *place = child;
  return child;
}

std::vector<StepPtr> TraceTree::path(const Node* node) {
  std::vector<StepPtr> steps;
  steps.reserve(node->depth);
  for (; node->step != nullptr; node = node->parent) steps.push_back(node->step);
  std::reverse(steps.begin(), steps.end());
  return steps;
}

void TraceTree::drop_programs(Node* node) {
  std::vector<Node*> open{node};
  while (!open.empty()) {
    Node* next = open.back();
    open.pop_back();
    if (next->end) next->end->drop_programs();
    for (Node* child = next->child; child != nullptr; child = child->sibling) {
      open.push_back(child);
    }
  }
}

void TraceTree::clear() {
  roots_.clear();
  nodes_.clear();
}

uint64_t environment_key() {
  const auto& context = at::globalContext();
  uint64_t key = static_cast<uint64_t>(c10::get_default_dtype().toScalarType());
  key = key << 1 | static_cast<uint64_t>(context.deterministicAlgorithms());
  key = key << 1 | static_cast<uint64_t>(context.deterministicFillUninitializedMemory());
  key = key << 2 | static_cast<uint64_t>(context.float32MatmulPrecision());
  key = key << 8 | static_cast<uint64_t>(backing_device_of(0).type());
  return key;
}

}  // namespace reprise
