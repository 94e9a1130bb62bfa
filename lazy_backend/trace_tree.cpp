#include "lazy_backend/trace_tree.h"

#include <ATen/Context.h>
#include <c10/core/DefaultDtype.h>

#include <algorithm>
#include <utility>

#include "lazy_backend/device.h"
#include "lazy_backend/executor.h"
#include "lazy_backend/match.h"
#include "reprise/options.h"

namespace reprise {

namespace {

uint64_t hash_of(const Step& step) { return CallHash::of(step.args).value(); }

}  // namespace

void ChildIndex::add(Node* child) {
  // Last, as among its siblings.
  Node** place = &first_[hash_of(*child->step)];
  while (*place != nullptr) place = &(*place)->same_hash;
  *place = child;
}

void ChildIndex::remove(Node* child) {
  const auto found = first_.find(hash_of(*child->step));
  Node** place = &found->second;
  while (*place != child) place = &(*place)->same_hash;
  *place = child->same_hash;
  if (found->second == nullptr) first_.erase(found);
}

Node::Node() = default;
Node::~Node() = default;

namespace {

size_t bytes_of(const std::vector<Arg>& args) {
  size_t bytes = args.size() * sizeof(Arg);
  for (const Arg& arg : args) {
    switch (arg.kind) {
      case Arg::Kind::kTensor:
        bytes += sizeof(Geometry);
        break;
      case Arg::Kind::kList:
        bytes += bytes_of(arg.list());
        break;
      case Arg::Kind::kIntList:
        bytes += 64 + 2 * sizeof(int64_t) * arg.ints().size();
        break;
      case Arg::Kind::kNumber:
      case Arg::Kind::kConstant:
        bytes += 256;
        break;
      default:
        break;
    }
  }
  return bytes;
}

size_t bytes_of(const std::vector<Result>& results) {
  size_t bytes = results.size() * (sizeof(Result) + sizeof(Geometry));
  for (const Result& result : results) {
    if (result.list) bytes += bytes_of(*result.list);
  }
  return bytes;
}

/// A limit among the options; a negative one is 0.
size_t at_most(int64_t option) { return static_cast<size_t>(std::max<int64_t>(option, 0)); }

/// Calls `visit` for `root` and each node below it, after which the node may be gone.
template <class Visit>
void for_each_below(Node* root, const Visit& visit) {
  std::vector<Node*> open{root};
  while (!open.empty()) {
    Node* node = open.back();
    open.pop_back();
    for (Node* child = node->child; child != nullptr; child = child->sibling) {
      open.push_back(child);
    }
    visit(node);
  }
}

}  // namespace

Node* TraceTree::make_node(Node* parent, StepPtr step) {
  auto* node = new Node;
  node->bytes = sizeof(Node);
  if (step != nullptr) {
    node->bytes += sizeof(Step) + bytes_of(step->args) + bytes_of(step->results);
  }
  node->step = std::move(step);
  node->parent = parent;
  node->depth = parent == nullptr ? 0 : parent->depth + 1;
  ++size_;
  bytes_ += node->bytes;
  return node;
}

Node* TraceTree::root(uint64_t environment) {
  Node*& root = roots_[environment];
  if (root == nullptr) root = make_node(nullptr, nullptr);
  return root;
}

Node* TraceTree::find(const Node* node, const Step& step) {
  const Candidates candidates(node, [&] { return CallHash::of(step.args); });
  for (Candidates each = candidates; Node* child = each.get(); each.next()) {
    if (child->step->same(step, /*floats_may_differ=*/false)) return child;
  }
  if (step.constant_floats) return nullptr;
  for (Candidates each = candidates; Node* child = each.get(); each.next()) {
    if (!child->step->same(step, /*floats_may_differ=*/true)) continue;
    auto general = with_dynamic_floats(*child->step, step);
    if (!general) continue;
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
  size_t children = 1;
  for (; *place != nullptr; place = &(*place)->sibling) ++children;
  *place = child;
  if (node->index != nullptr) {
    node->index->add(child);
  } else if (children > kFewChildren) {
    node->index = std::make_unique<ChildIndex>();
    for (Node* each = node->child; each != nullptr; each = each->sibling) node->index->add(each);
  }
  return child;
}

void TraceTree::cut_off(Node* node) {
  for (Node* child = std::exchange(node->child, nullptr); child != nullptr;) {
    for_each_below(std::exchange(child, child->sibling), [&](Node* below) {
      --size_;
      bytes_ -= below->bytes;
      delete below;
    });
  }
  node->index = nullptr;
}

std::vector<StepPtr> TraceTree::path(const Node* node) {
  std::vector<StepPtr> steps;
  steps.reserve(node->depth);
  for (; node->step != nullptr; node = node->parent) steps.push_back(node->step);
  std::reverse(steps.begin(), steps.end());
  return steps;
}

void TraceTree::drop_programs(Node* node) {
  for_each_below(node, [](Node* next) {
    if (next->end) next->end->drop_programs();
  });
}

void TraceTree::prune(Node* node) {
  while (node->step != nullptr && node->child == nullptr && node->end == nullptr) {
    Node* parent = node->parent;
    if (parent->index != nullptr) parent->index->remove(node);
    Node** place = &parent->child;
    while (*place != node) place = &(*place)->sibling;
    *place = node->sibling;
    --size_;
    bytes_ -= node->bytes;
    delete node;
    node = parent;
  }
}

bool TraceTree::takes_too_much() const { return bytes_ > at_most(options().trace_bytes); }

size_t TraceTree::make_room() {
  // What all sizes share is one program, which the sizes do not own.
  const auto owned = [](const SegmentEnd& end) -> size_t {
    return end.program != nullptr && end.program->shared == nullptr ? 1 : 0;
  };
  std::vector<Node*> ends;
  size_t programs = 0;
  for_each_end([&](Node& node) {
    ends.push_back(&node);
    programs += owned(*node.end);
  });
  const size_t most_bytes = at_most(options().trace_bytes);
  const size_t most_programs = at_most(options().most_programs);
  const bool many_bytes = takes_too_much(), many_programs = programs > most_programs;
  if (!many_bytes && !many_programs) return 0;
  std::sort(ends.begin(), ends.end(),
            [](const Node* a, const Node* b) { return a->end->last_run < b->end->last_run; });
  size_t dropped = 0;
  for (Node* node : ends) {
    const bool bytes_left = many_bytes && bytes_ > most_bytes - most_bytes / 4;
    const bool programs_left = many_programs && programs > most_programs - most_programs / 4;
    if (!bytes_left && !programs_left) break;
    if (!bytes_left && owned(*node->end) == 0) continue;
    ++dropped;
    programs -= owned(*node->end);
    node->end = nullptr;
    node->cut = false;
    prune(node);
  }
  return dropped;
}

void TraceTree::clear() {
  for (const auto& [environment, root] : roots_) {
    for_each_below(root, [](Node* node) { delete node; });
  }
  roots_.clear();
  size_ = bytes_ = 0;
}

namespace {
/// Of float32 products; IEEE's is what there is where none was set.
/// `Context::float32MatmulPrecision` knows the older of two ways to set it, and throws where the
/// newer one was used.
at::Float32Precision matmul_precision(c10::DeviceType device) {
  // The table of them is destroyed before the first static objects are, which may call ops yet.
  static bool destroyed = false;
  struct Watch {
    Watch() { at::globalContext(); }
    ~Watch() { destroyed = true; }
  };
  static const Watch watch;
  if (C10_UNLIKELY(destroyed)) return at::Float32Precision::NONE;
  const auto backend = device == c10::kCPU ? at::Float32Backend::MKLDNN : at::Float32Backend::CUDA;
  const auto precision = at::globalContext().float32Precision(backend, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::IEEE ? at::Float32Precision::NONE : precision;
}
}  // namespace

uint64_t& traced_function() {
  thread_local uint64_t function = 0;
  return function;
}

uint64_t environment_key() {
  const auto& context = at::globalContext();
  uint64_t key = static_cast<uint64_t>(c10::get_default_dtype().toScalarType());
  key = key << 1 | static_cast<uint64_t>(context.deterministicAlgorithms());
  key = key << 1 | static_cast<uint64_t>(context.deterministicFillUninitializedMemory());
  const auto device = backing_device_of(0).type();
  key = key << 3 | static_cast<uint64_t>(matmul_precision(device));
  key = key << 8 | static_cast<uint64_t>(device);
  return key << 32 | traced_function();
}

std::string environment_text(uint64_t key) {
  key >>= 40;  // the function and the device's type
  const auto take = [&key](int bits) {
    const uint64_t value = key & ((uint64_t{1} << bits) - 1);
    key >>= bits;
    return value;
  };
  const auto precision = static_cast<at::Float32Precision>(take(3));
  const bool fills = take(1) != 0, deterministic = take(1) != 0;
  const auto dtype = static_cast<c10::ScalarType>(key);
  std::string text;
  if (dtype != c10::kFloat) text += c10::str(" default_dtype=", dtype);
  if (deterministic) text += " deterministic";
  if (deterministic && !fills) text += " unfilled";
  if (precision != at::Float32Precision::NONE) {
    text += " matmul_precision=" + at::precision2str(precision);
  }
  return text.empty() ? text : text.substr(1);
}

}  // namespace reprise
