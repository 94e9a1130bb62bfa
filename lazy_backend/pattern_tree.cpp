#include "lazy_backend/pattern_tree.h"

#include <algorithm>

#include "compiler_bridge/compile_queue.h"
#include "lazy_backend/log.h"
#include "lazy_backend/match.h"
#include "lazy_backend/metrics.h"
#include "reprise/options.h"

namespace reprise {
namespace {

/// So many sizes are looked at together.
uint64_t enough_sizes() {
  return static_cast<uint64_t>(std::max<int64_t>(options().sizes_before_dynamic, 2));
}

void drop_programs_below(PatternTree::Node& top) {
  std::vector<PatternTree::Node*> open{&top};
  while (!open.empty()) {
    PatternTree::Node* node = open.back();
    open.pop_back();
    node->ready = false;
    if (node->pattern) node->pattern->drop_programs();
    for (const auto& next : node->next) open.push_back(next.get());
  }
}

}  // namespace

void Pattern::add_size(const std::string& name, std::vector<StepPtr> steps,
                       const Segment& segment, std::vector<std::vector<int64_t>> others) {
  ++sizes_;
  ops_ += steps.size();
  const bool pending =
      requested_ != nullptr && requested_->state.load() == Program::State::kQueued;
  const bool wanted = unserved_ && !pending && sizes_ + marked_.size() >= std::max(next_request_, enough_sizes()) &&
                      requests_ < kMostRequests && options().compile &&
                      static_cast<int64_t>(ops_) >= options().compile_after_ops;
  if (wanted) request(name, steps, segment);
  if (marked_.empty()) marked_ = std::move(others);
  if (examples_.size() == kMostExamples) examples_.erase(examples_.begin());
  examples_.push_back(std::move(steps));
}

bool Pattern::request_marked(const std::string& name, const std::vector<StepPtr>& steps,
                             const Segment& segment) {
  if (marked_.empty() || program() != nullptr) return false;
  if (requests_ == 0) request(name, steps, segment);
  return awaits();
}

void Pattern::request(const std::string& name, const std::vector<StepPtr>& steps,
                      const Segment& segment) {
  auto program = std::make_shared<Program>();
  program->name = name;
  program->steps = steps;
  const Step& last = *steps.back();
  program->live = segment.live_slots(last.first_slot + last.slot_count);
  program->device_index = last.device_index;
  program->other_sizes = examples_;
  for (const auto& symbols : marked_) {
    std::vector<StepPtr> other;
    for (const StepPtr& step : steps) {
      auto elsewhere = at_symbols(*step, symbols);
      if (elsewhere == nullptr) break;
      other.push_back(std::move(elsewhere));
    }
    if (other.size() == steps.size()) program->other_sizes.push_back(std::move(other));
  }
  requested_ = program;
  ++requests_;
  next_request_ = 2 * sizes_;
  unserved_ = false;
  metrics().programs_requested.add(1);
  CompileQueue::get().push(std::move(program));
}

const std::shared_ptr<Program>& Pattern::program() {
  if (requested_ != nullptr && requested_->state.load() != Program::State::kQueued) {
    if (requested_->state.load() == Program::State::kReady) {
      program_ = requested_;
    } else {
      unserved_ = true;
    }
    requested_ = nullptr;
  }
  return program_;
}

bool Pattern::note_inferred(const std::vector<StepPtr>& steps) {
  CallHash hash;
  for (const StepPtr& step : steps) {
    for (const Arg& arg : step->args) hash.add(arg);
  }
  if (inferred_.size() >= kMostRemembered) inferred_.clear();
  return !inferred_.insert(hash.value()).second;
}

void Pattern::drop_programs() {
  requested_ = program_ = nullptr;
  unserved_ = true;
  examples_.clear();
  sizes_ = ops_ = 0;
  next_request_ = 0;
}

bool Pattern::take_own_program() {
  if (own_programs_ >= options().most_size_programs) return false;
  ++own_programs_;
  return true;
}

PatternTree::Node* PatternTree::root(uint64_t environment) {
  auto& root = roots_[environment];
  if (!root) root = std::make_unique<Node>();
  return root.get();
}

PatternTree::Node* PatternTree::find(const Node* node, const Step& step) {
  for (const auto& next : node->next) {
    if (next->step->alike(step, /*floats_may_differ=*/false)) return next.get();
  }
  return nullptr;
}

PatternTree::Node* PatternTree::insert(uint64_t environment, std::vector<StepPtr>& steps,
                                       size_t count) {
  if (size_ > kMostNodes) clear();
  Node* node = root(environment);
  for (size_t k = 0; k < count; ++k) {
    StepPtr& step = steps[k];
    Node* next = find(node, *step);
    if (next == nullptr && !step->constant_floats) {
      for (const auto& other : node->next) {
        if (!other->step->alike(*step, /*floats_may_differ=*/true)) continue;
        if (auto general = with_dynamic_floats(*other->step, *step)) {
          other->step = std::move(general);
          drop_programs_below(*other);
          next = other.get();
          break;
        }
      }
    }
    if (next == nullptr) {
      if (!node->next.empty()) {
        REPRISE_LOG(2, "no segment of another size goes on with ", step->op.operator_name(),
                    " after ", k, " ops as this one does");
      }
      auto made = std::make_unique<Node>();
      made->step = step;
      made->parent = node;
      next = made.get();
      node->next.push_back(std::move(made));
      ++size_;
    }
    step = taking_dynamic_floats(std::move(step), *next->step);
    node = next;
  }
  return node;
}

const std::shared_ptr<Pattern>& PatternTree::pattern_of(Node& node) {
  if (!node.pattern) node.pattern = std::make_shared<Pattern>();
  return node.pattern;
}

void PatternTree::refresh() {
  std::erase_if(awaited_, [](Node* node) {
    if (node->pattern->program() == nullptr) return !node->pattern->awaits();
    for (; node != nullptr && !node->ready; node = node->parent) node->ready = true;
    return true;
  });
}

void PatternTree::await(Node* node) {
  if (!node->pattern->awaits() && (node->ready || node->pattern->program() == nullptr)) return;
  if (std::find(awaited_.begin(), awaited_.end(), node) == awaited_.end()) awaited_.push_back(node);
}

void PatternTree::clear() {
  // A path is as long as a segment: no recursion.
  std::vector<std::unique_ptr<Node>> open;
  for (auto& [environment, root] : roots_) open.push_back(std::move(root));
  while (!open.empty()) {
    const std::unique_ptr<Node> node = std::move(open.back());
    open.pop_back();
    for (auto& next : node->next) open.push_back(std::move(next));
  }
  roots_.clear();
  awaited_.clear();
  size_ = 0;
}

}  // namespace reprise
