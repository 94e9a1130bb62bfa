#include "lazy_backend/loop_finder.h"

#include <algorithm>
#include <vector>

#include "lazy_backend/distinct_inputs.h"
#include "lazy_backend/step_recorder.h"

namespace reprise {
namespace {

using Body = std::vector<StepPtr>;

/// Steps [begin, begin + count) as they would be numbered at the start of a segment.
Body taken_alone(std::span<const StepPtr> steps, size_t begin, size_t count) {
  const Step& last = *steps[begin + count - 1];
  std::vector<int64_t> slots(last.first_slot + last.slot_count, -1);
  std::vector<bool> created;
  uint32_t next = 0;
  Body body;
  body.reserve(count);
  for (size_t k = begin; k < begin + count; ++k) {
    body.push_back(renumber(*steps[k], slots, next, created));
  }
  return body;
}

/// Whether the same ops are called in both stretches.
bool same_ops(std::span<const StepPtr> steps, size_t a, size_t b, size_t count) {
  for (size_t k = 0; k < count; ++k) {
    if (steps[a + k]->op != steps[b + k]->op) return false;
  }
  return true;
}

const std::vector<Result>* list_of(const Result& result) {
  return result.kind == Result::Kind::kList ? result.list.get() : nullptr;
}

}  // namespace

bool only_aliases(std::span<const StepPtr> steps) {
  return std::all_of(steps.begin(), steps.end(), [](const auto& step) { return step->only_aliases; });
}

bool nothing_to_fuse(std::span<const StepPtr> steps) {
  constexpr int kFew = 2;
  int ops = 0;
  std::vector<uint32_t> made;
  for (const StepPtr& step : steps) {
    if (step->only_aliases) continue;
    if (++ops > kFew) return false;
    bool takes = false;
    for_each_tensor(step->args, [&](const Arg& arg) {
      takes = takes || std::find(made.begin(), made.end(), arg.slot) != made.end();
    });
    if (takes) return false;
    for_each_result(step->results, [&](const Result& result) { made.push_back(result.slot); });
    made.insert(made.end(), step->written.begin(), step->written.end());
  }
  return true;
}

std::optional<Loop> find_loop(std::span<const StepPtr> steps, size_t exit) {
  const size_t longest = std::min({exit / 2, steps.size() - exit, kLongestLoopBody});
  for (size_t period = 1; period <= longest; ++period) {
    if (!same_ops(steps, exit, exit - period, period) ||
        !same_ops(steps, exit - 2 * period, exit - period, period)) {
      continue;
    }
    const bool views = only_aliases(steps.subspan(exit, period));
    if (period < kShortestLoopBody && !views) {
      // A chance, or a body so short that several of it would pass for a longer one.
      const size_t stretch = std::min(exit - period, 2 * kShortestLoopBody);
      if (same_ops(steps, exit - period - stretch, exit - stretch, stretch)) return std::nullopt;
      continue;
    }
    const Body body = taken_alone(steps, exit - period, period);
    const auto is_iteration = [&](size_t at) {
      return same_ops(steps, at, exit, period) &&
             alike(body, taken_alone(steps, at, period), /*floats_may_differ=*/true);
    };
    if (!is_iteration(exit) || !is_iteration(exit - 2 * period)) continue;
    Loop loop{exit - 2 * period, period, exit + period, views};
    while (loop.begin >= period && is_iteration(loop.begin - period)) loop.begin -= period;
    while (loop.end + period <= steps.size() && is_iteration(loop.end)) loop.end += period;
    if (!views && loop.begin >= period && same_ops(steps, loop.begin - period, exit, period)) {
      const Body first = taken_alone(steps, loop.begin - period, period);
      loop.first_coincides = as_if_distinct(first, body, /*floats_may_differ=*/true).has_value();
      if (loop.first_coincides) loop.begin -= period;
    }
    return loop;
  }
  return std::nullopt;
}

bool has_tensor_list(const Step& step) {
  if (!step.written.empty()) return false;
  const auto takes = [](const Arg& arg) { return arg.kind == Arg::Kind::kList; };
  const auto gives = [](const Result& result) { return list_of(result) != nullptr; };
  return std::any_of(step.args.begin(), step.args.end(), takes) ||
         std::any_of(step.results.begin(), step.results.end(), gives);
}

bool differ_in_list_length(const Step& a, const Step& b) {
  if (a.op != b.op || a.args.size() != b.args.size() || a.results.size() != b.results.size() ||
      !has_tensor_list(a)) {
    return false;
  }
  bool differ = false;
  for (size_t k = 0; k < a.args.size(); ++k) {
    const Arg &x = a.args[k], &y = b.args[k];
    if (x.kind != y.kind) return false;
    if (x.kind != Arg::Kind::kList) {
      if (!x.alike(y, /*floats_may_differ=*/true)) return false;
      continue;
    }
    const auto &xs = x.list(), &ys = y.list();
    if (xs.empty() || ys.empty() || xs[0].kind != Arg::Kind::kTensor ||
        ys[0].kind != Arg::Kind::kTensor || !xs[0].geometry().lies_like(ys[0].geometry())) {
      return false;
    }
    differ = differ || xs.size() != ys.size();
  }
  for (size_t k = 0; k < a.results.size(); ++k) {
    const auto *xs = list_of(a.results[k]), *ys = list_of(b.results[k]);
    if ((xs == nullptr) != (ys == nullptr)) return false;
    differ = differ || (xs != nullptr && xs->size() != ys->size());
  }
  return differ;
}

}  // namespace reprise
