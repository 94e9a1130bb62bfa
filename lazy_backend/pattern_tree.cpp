#include "lazy_backend/pattern_tree.h"

#include <algorithm>

#include "compiler_bridge/compile_queue.h"
#include "lazy_backend/log.h"
#include "lazy_backend/match.h"
#include "lazy_backend/metrics.h"
#include "lazy_backend/trace_tree.h"
#include "reprise/options.h"

namespace reprise {
namespace {

/// So many sizes are looked at together.
uint64_t enough_sizes() {
  return static_cast<uint64_t>(std::max<int64_t>(options().sizes_before_dynamic, 2));
}

bool same_but_for_floats(std::span<const StepPtr> a, std::span<const StepPtr> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const StepPtr& x, const StepPtr& y) {
    return x->same(*y, /*floats_may_differ=*/true);
  });
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
  if (is_case()) return;
  ++sizes_;
  ops_ += steps.size();
  const bool pending =
      requested_ != nullptr && requested_->state.load() == Program::State::kQueued;
  const bool enough = sizes_ + marked_.size() >= std::max(next_request_, enough_sizes());
  const bool wanted = unserved_ && !pending && enough &&
                      requests_ < kMostRequests && options().compile &&
                      static_cast<int64_t>(ops_) >= options().compile_after_ops;
  if (wanted) request(name, steps, segment);
  if (marked_.empty()) marked_ = std::move(others);
  if (program_ != nullptr && !unserved_) return;  // made of those that there are
  remember(without_unused_views(steps));
}

void Pattern::become_case_of(const std::shared_ptr<Pattern>& general) {
  if (differs_ || requests_ > 0 || general.get() == this || general->is_case()) return;
  general_ = general;
  examples_.clear();
}

uint64_t Pattern::enough() const { return in_loop_ ? 2 : enough_sizes(); }

void Pattern::note_no_case() {
  differs_ = true;
  general_ = nullptr;
}

bool Pattern::request_another(const std::string& name, const std::vector<StepPtr>& steps,
                              const Segment& segment) {
  if (is_case()) {
    const Pattern& general = *general_;
    return general.awaits() || (general.requests_ == 0 && general.sizes_ >= general.enough());
  }
  if (awaits()) return true;
  if (!unserved_ || sizes_ < enough() || requests_ >= kMostRequests || examples_.empty()) {
    return false;
  }
  const bool requested = request(name, steps, segment);
  remember(without_unused_views(steps));
  return requested;
}

void Pattern::remember(std::vector<StepPtr> steps) {
  examples_.push_back(std::move(steps));
  if (examples_.size() <= kMostExamples) return;
  // Of the two that differ least, the older one. The last one stays.
  const auto difference = [](const std::vector<StepPtr>& a, const std::vector<StepPtr>& b) {
    size_t differing = 0;
    if (a.size() != b.size()) return std::max(a.size(), b.size());
    for (size_t k = 0; k < a.size(); ++k) differing += a[k]->same(*b[k], true) ? 0 : 1;
    return differing;
  };
  size_t oldest = 0, least = SIZE_MAX;
  for (size_t a = 0; a < examples_.size(); ++a) {
    for (size_t b = a + 1; b < examples_.size(); ++b) {
      const size_t d = difference(examples_[a], examples_[b]);
      if (d < least) {
        least = d;
        oldest = a;
      }
    }
  }
  examples_.erase(examples_.begin() + static_cast<std::ptrdiff_t>(oldest));
}

bool Pattern::request_marked(const std::string& name, const std::vector<StepPtr>& steps,
                             const Segment& segment) {
  if (is_case() || marked_.empty() || program() != nullptr) return false;
  if (requests_ == 0) request(name, steps, segment);
  return awaits();
}

bool Pattern::request(const std::string& name, const std::vector<StepPtr>& steps,
                      const Segment& segment) {
  auto program = std::make_shared<Program>();
  program->name = name;
  program->environment = environment_text(segment.environment());
  program->steps = without_unused_views(steps);
  const Step& last = *steps.back();
  program->live = segment.live_slots(last.first_slot + last.slot_count);
  program->device_index = last.device_index;
  for (std::vector<StepPtr> other : examples_) {
    const bool is_this_size = same_but_for_floats(program->steps, other);
    if (is_this_size || !alike(program->steps, other, /*floats_may_differ=*/true)) continue;
    // A float that changes from size to size may be the same at one of them.
    for (size_t k = 0; k < other.size(); ++k) {
      other[k] = taking_dynamic_floats(std::move(other[k]), *program->steps[k]);
    }
    program->other_sizes.push_back(std::move(other));
  }
  for (const auto& symbols : marked_) {
    std::vector<StepPtr> other;
    for (const StepPtr& step : program->steps) {
      auto elsewhere = at_symbols(*step, symbols);
      if (elsewhere == nullptr) break;
      other.push_back(std::move(elsewhere));
    }
    if (other.size() == program->steps.size()) program->other_sizes.push_back(std::move(other));
  }
  if (program->other_sizes.empty()) return false;  // each goes through other views
  requested_ = program;
  ++requests_;
  next_request_ = 2 * sizes_;
  unserved_ = false;
  metrics().programs_requested.add(1);
  CompileQueue::get().push(std::move(program));
  return true;
}

const std::shared_ptr<Program>& Pattern::program() {
  if (is_case()) return general_->program();
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

bool PatternTree::repeats(const Node& node, const Step& step) {
  return node.repeats && step.only_aliases && node.step->alike(step, /*floats_may_differ=*/false);
}

PatternTree::Node* PatternTree::find(Node* node, const Step& step) {
  if (repeats(*node, step)) return node;
  for (const auto& next : node->next) {
    if (next->step->alike(step, /*floats_may_differ=*/false)) return next.get();
  }
  return nullptr;
}

namespace {

/// The way that steps go along the paths there are.
struct Way {
  PatternTree::Node* last;  ///< the node that they reach
  size_t depth = 0;         ///< how many of them go along
  size_t ended = 0;         ///< at which of these depths a segment has ended last, or 0
};

Way follow(PatternTree::Node* root, const std::vector<StepPtr>& steps, size_t count) {
  Way way{root};
  while (way.depth < count) {
    PatternTree::Node* next = PatternTree::find(way.last, *steps[way.depth]);
    if (next == nullptr) break;
    way.last = next;
    ++way.depth;
    if (next->pattern != nullptr && way.depth < count) way.ended = way.depth;
  }
  return way;
}

}  // namespace

std::optional<Loop> PatternTree::loop_of_other_length(uint64_t environment,
                                                      const std::vector<StepPtr>& steps,
                                                      size_t count) {
  auto loop = find_loop_of_other_length(environment, steps, count);
  while (loop && collapse(environment, steps, *loop)) {
    loop = find_loop_of_other_length(environment, steps, count);
  }
  if (loop && loop->collection) {
    for (size_t k = loop->begin; k < loop->begin + loop->period; ++k) {
      note_collection(environment, *steps[k]);
    }
  }
  return loop;
}

bool PatternTree::collapse(uint64_t environment, const std::vector<StepPtr>& steps,
                           const Loop& loop) {
  if (!loop.collection || loop.period != 1) return false;
  // Of several storages there is one run after the other, and the first view of each may be
  // the one that meets the storage.
  bool collapsed = false;
  for (size_t begin = loop.begin; begin + 1 < loop.end;) {
    const Step& view = *steps[begin];
    size_t end = begin + 1;
    if (view.slot_count == 0 && view.only_aliases) {
      while (end < loop.end && view.alike(*steps[end], /*floats_may_differ=*/false)) ++end;
    }
    if (end - begin > 1) {
      const Way way = follow(root(environment), steps, begin + 1);
      if (way.depth == begin + 1 && !way.last->repeats) {
        REPRISE_LOG(1, "a run of ", end - begin, " views by ", view.op.operator_name(),
                    " has another length than before, which is of no account from now on");
        collapse(way.last);
        collapsed = true;
      }
    }
    begin = end;
  }
  return collapsed;
}

void PatternTree::collapse(Node* first) {
  first->repeats = true;
  std::vector<std::unique_ptr<Node>> next = std::exchange(first->next, {}), run;
  const auto sort = [&](std::unique_ptr<Node> child) {
    if (repeats(*first, *child->step)) {
      run.push_back(std::move(child));
    } else if (find(first, *child->step) != nullptr) {
      remove(std::move(child));
    } else {
      child->parent = first;
      first->next.push_back(std::move(child));
    }
  };
  for (auto& child : next) sort(std::move(child));
  while (!run.empty()) {
    std::unique_ptr<Node> node = std::move(run.back());
    run.pop_back();
    for (auto& child : std::exchange(node->next, {})) sort(std::move(child));
    remove(std::move(node));
  }
}

size_t PatternTree::run_before(uint64_t environment, const std::vector<StepPtr>& steps,
                               size_t count) {
  const Way way = follow(root(environment), steps, count);
  if (way.depth < count || !way.last->repeats) return 0;
  size_t run = 0;
  while (run < count && repeats(*way.last, *steps[count - 1 - run])) ++run;
  return run;
}

void PatternTree::remove(std::unique_ptr<Node> top) {
  std::vector<std::unique_ptr<Node>> open;  // a path is as long as a segment: no recursion
  open.push_back(std::move(top));
  while (!open.empty()) {
    const std::unique_ptr<Node> node = std::move(open.back());
    open.pop_back();
    for (auto& next : node->next) open.push_back(std::move(next));
    std::erase(awaited_, node.get());
    --size_;
  }
}

std::optional<Loop> PatternTree::find_loop_of_other_length(uint64_t environment,
                                                           const std::vector<StepPtr>& steps,
                                                           size_t count) {
  const Way way = follow(root(environment), steps, count);
  const std::span<const StepPtr> these(steps.data(), count);
  // The other path leaves the loop, or has ended there.
  const bool leaves = way.depth < count && !way.last->next.empty();
  for (const size_t exit : {leaves ? way.depth : 0, way.ended}) {
    if (exit == 0) continue;
    if (const auto loop = find_loop(these, exit)) return loop;
  }
  // These steps do, and the other goes on.
  for (const auto& next : way.last->next) {
    std::vector<StepPtr> other(steps.begin(), steps.begin() + static_cast<std::ptrdiff_t>(way.depth));
    const size_t enough = way.depth + std::min(way.depth / 2, kLongestLoopBody);
    for (const Node* node = next.get(); node != nullptr && other.size() < enough;
         node = node->next.empty() ? nullptr : node->next.front().get()) {
      other.push_back(node->step);
    }
    if (auto loop = find_loop(other, way.depth)) {
      loop->end = way.depth;
      return loop;
    }
  }
  if (!has_boundaries_ || !leaves) return std::nullopt;
  for (const auto& next : way.last->next) {
    const Step& step = *steps[way.depth];
    if (!differ_in_list_length(*next->step, step)) continue;
    return Loop{way.depth, 1, way.depth + 1, /*collection=*/true};
  }
  return std::nullopt;
}

void PatternTree::note_collection(uint64_t environment, const Step& step) {
  if (!is_collection(environment, step)) root(environment)->collections.push_back(step.op);
}

bool PatternTree::is_collection(uint64_t environment, const Step& step) const {
  const auto top = roots_.find(environment);
  if (top == roots_.end() || !(step.only_aliases || has_tensor_list(step))) return false;
  const auto& all = top->second->collections;
  return std::find(all.begin(), all.end(), step.op) != all.end();
}

size_t PatternTree::collection_at_start(uint64_t environment, std::span<const StepPtr> steps) const {
  size_t count = 0;
  while (count < steps.size() && is_collection(environment, *steps[count])) {
    if (has_tensor_list(*steps[count++])) break;
  }
  // One view is no run of them.
  return count == 1 && !has_tensor_list(*steps[0]) ? 0 : count;
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

namespace {

/// The same numbers of both are inputs of programs.
bool same_inputs(const Step& a, const Step& b) {
  return std::equal(a.args.begin(), a.args.end(), b.args.begin(), b.args.end(),
                    [](const Arg& x, const Arg& y) { return x.dynamic == y.dynamic; });
}

}  // namespace

void PatternTree::share_steps(const Node& node, std::span<StepPtr> steps) {
  const Node* at = &node;
  for (size_t k = steps.size(); k-- > 0; at = at->parent) {
    while (k > 0 && repeats(*at, *steps[k]) && repeats(*at, *steps[k - 1])) --k;
    const Step &known = *at->step, &step = *steps[k];
    const bool plain = known.symbolic == nullptr && step.symbolic == nullptr;
    if (plain && known.grad_mode == step.grad_mode && same_inputs(known, step) &&
        known.same(step, /*floats_may_differ=*/false)) {
      steps[k] = at->step;
    }
  }
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
  has_boundaries_ = false;
}

}  // namespace reprise
