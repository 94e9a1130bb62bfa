#include "lazy_backend/step_finder.h"

#include <algorithm>
#include <cstdlib>
#include <utility>
#include <vector>

#include "lazy_backend/flat_map.h"
#include "lazy_backend/step_log.h"

// The rules and their constants were tuned on the op streams of
// tests/step_streams; change them only together with the table in
// tests/step_finder_test.cpp.

namespace reprise {
namespace {

constexpr uint32_t kNone = StepLog::kNone;

// A head that takes more ops than this is not remembered. Long ones exist:
// `zero_grad` in place is an op a parameter.
constexpr uint32_t kLongestHead = 1024;
// A shorter period is an inner loop's.
constexpr uint32_t kShortestPeriod = 24;
// Any op other than the segment's first may be in an inner loop too: it must
// recur this often before it is believed.
constexpr uint32_t kFarApart = 128;
constexpr uint32_t kRecurrencesFarApart = 4;
constexpr uint32_t kRecurrencesClose = 32;
// Of an iteration's ops, so many storages may be carried over into the next.
constexpr uint32_t kCarriedFraction = 16;
// Ops looked at again, per op fed, to see what an iteration carries over.
constexpr int64_t kScanCredit = 8;
constexpr int64_t kMostScanCredit = 4 * StepFinder::kLongestSegment;

/// How steps begin: the op that first reads old storages, with those storages,
/// and the ops before it.
class Heads {
 public:
  struct Head {
    uint64_t key;  // StepLog::Op::old_reads of its last op
    uint64_t ops;  // hash of the operators
    uint32_t length;
    uint32_t shortest;  // no step that ends at this head has fewer ops
    uint64_t matched = 0;  // when it last did
  };

  /// False when it is known already.
  bool learn(Head head) {
    for (const Head& known : with_key(head.key)) {
      if (known.ops == head.ops && known.length == head.length) return false;
    }
    if (heads_.size() == StepFinder::kMostHeads) {
      const auto older = [](const Head& a, const Head& b) { return a.matched < b.matched; };
      heads_.erase(std::min_element(heads_.begin(), heads_.end(), older));
    }
    head.matched = ++clock_;
    heads_.insert(std::upper_bound(heads_.begin(), heads_.end(), head, by_key), head);
    return true;
  }

  /// Those with `key`; usually there are none.
  std::span<Head> with_key(uint64_t key) {
    const auto [first, last] =
        std::equal_range(heads_.begin(), heads_.end(), Head{key, 0, 0, 0}, by_key);
    return {first, last};
  }

  void matched(Head& head) { head.matched = ++clock_; }

 private:
  static bool by_key(const Head& a, const Head& b) { return a.key < b.key; }

  std::vector<Head> heads_;  // sorted by key
  uint64_t clock_ = 0;
};

}  // namespace

class StepFinder::Search {
 public:
  std::optional<size_t> feed(const Op& op);
  void restart();

 private:
  /// What rule UPDATE knows of an old storage.
  struct Watch {
    enum : uint8_t { kUntouched, kWrittenFirst, kRead } access = kUntouched;
    uint64_t readers = 0;  // ops that have read it, a bit for each
    uint64_t armed = 0;    // those that had when it was written in place
    uint32_t armed_in = 0;
    uint32_t counted_in = 0;  // see carries_little
  };

  /// Occurrences of an op that reads the same old storages after the same ops.
  struct Recurrence {
    uint32_t count = 0;
    uint32_t before_last = kNone;
    uint32_t last = kNone;
    uint32_t cut = kNone;  // the best between these two
  };

  struct Verdict {
    uint32_t cut = kNone;
    bool learn = false;  // how the step at the cut begins
    uint32_t shortest = 0;  // see Heads::Head
  };

  Verdict examine(uint32_t p);
  uint32_t after_new_parameters(uint32_t p);
  uint32_t at_known_head(uint32_t p);
  Verdict after_update(uint32_t p);
  Verdict at_recurring_header(uint32_t p);
  bool carries_little(uint32_t from, uint32_t first, uint32_t second, uint32_t limit);
  uint64_t header_key(uint32_t p, uint32_t preceding) const;
  uint32_t best_since(uint32_t first) const;
  uint32_t best_without_growth(uint32_t first, uint32_t last) const;
  uint32_t least_of_all() const;
  bool learn_head(const Verdict& verdict);
  void forget_findings();

  StepLog log_;

  // What the rules found in the segment so far.
  uint32_t next_ = 0;             // the op to examine
  std::vector<uint32_t> minima_;  // ops whose score is below those of all after them
  std::vector<Watch> watches_;    // by storage
  uint32_t last_parameter_ = kNone;
  uint32_t last_old_read_ = kNone;
  uint32_t arming_ = 1;  // what was armed in an earlier one no longer counts
  bool fired_ = false;
  FlatMap fires_;
  FlatMap recurrence_of_;
  std::vector<Recurrence> recurrences_;
  uint64_t header_ = 0;
  uint32_t header_preceding_ = kNone;  // ops before it that count; kNone: no header yet
  uint32_t header_count_ = 0;

  // What is kept from segment to segment.
  Heads heads_;
  int64_t scan_credit_ = kMostScanCredit;
  uint32_t counting_ = 0;
};

std::optional<size_t> StepFinder::Search::feed(const Op& op) {
  log_.append(op);
  watches_.resize(log_.storages().size());
  scan_credit_ = std::min(scan_credit_ + kScanCredit, kMostScanCredit);
  while (next_ < log_.size()) {
    Verdict verdict = examine(next_);
    if (verdict.cut == kNone) {
      if (++next_ < kLongestSegment) continue;
      verdict = {least_of_all(), true, kShortestPeriod};
    }
    if (verdict.learn && learn_head(verdict)) {
      // A new head may split these ops in many places: look at all again.
      log_.settle(verdict.cut);
      forget_findings();
      continue;
    }
    restart();
    return verdict.cut;
  }
  return std::nullopt;
}

void StepFinder::Search::restart() {
  log_.clear();
  forget_findings();
}

void StepFinder::Search::forget_findings() {
  next_ = 0;
  minima_.clear();
  watches_.assign(log_.storages().size(), {});
  last_parameter_ = last_old_read_ = kNone;
  arming_ = 1;
  fired_ = false;
  fires_.clear();
  recurrence_of_.clear();
  recurrences_.clear();
  header_preceding_ = kNone;
  header_count_ = 0;
}

StepFinder::Search::Verdict StepFinder::Search::examine(uint32_t p) {
  const StepLog::Op& op = log_[p];
  while (!minima_.empty() && log_[minima_.back()].score >= op.score) minima_.pop_back();
  minima_.push_back(p);

  if (const uint32_t cut = after_new_parameters(p); cut != kNone) return {cut};
  if (const uint32_t cut = at_known_head(p); cut != kNone) return {cut};
  Verdict verdict = after_update(p);
  if (op.old_reads != 0) {
    if (!fired_) verdict = at_recurring_header(p);
    last_old_read_ = p;
  }
  return verdict;
}

// Rule BOOT: the model was made in this segment. The program proper begins
// where its parameters are done.
uint32_t StepFinder::Search::after_new_parameters(uint32_t p) {
  for (const StepLog::Access& access : log_.accesses(p)) {
    const StepLog::Storage& storage = log_.storages()[access.slot];
    if (!storage.leaf || !storage.from_factory) continue;
    if (!access.written) {
      return 1 +
             (last_parameter_ == kNone ? storage.born : std::max(last_parameter_, storage.born));
    }
    last_parameter_ = p;
  }
  return kNone;
}

// Rule HEAD: a step has begun like this before.
uint32_t StepFinder::Search::at_known_head(uint32_t p) {
  if (log_[p].old_reads == 0) return kNone;
  uint32_t cut = kNone;
  for (Heads::Head& head : heads_.with_key(log_[p].old_reads)) {
    if (head.length > p) continue;  // cut before the segment's first op
    const uint32_t start = p + 1 - head.length;
    if (start < head.shortest) continue;
    if (last_old_read_ != kNone && start <= last_old_read_) continue;
    uint64_t ops = 0;
    for (uint32_t q = start; q <= p; ++q) ops = mix_hash(ops, log_[q].op);
    if (ops != head.ops) continue;
    heads_.matched(head);
    cut = std::min(cut, start);
  }
  return cut;
}

// Rule UPDATE: an op read a storage that was then written in place, and reads it
// again: an optimizer step lies between. When this happens a second time to the
// same storage and op, an iteration lies between. A storage whose first access
// is a write holds gradients or statistics, and says nothing.
StepFinder::Search::Verdict StepFinder::Search::after_update(uint32_t p) {
  const uint32_t op = log_[p].op;
  const uint64_t bit = uint64_t{1} << (op & 63);
  uint32_t fire = kNone;
  for (const StepLog::Access& access : log_.accesses(p)) {
    if (!log_.storages()[access.slot].old()) continue;
    Watch& watch = watches_[access.slot];
    if (watch.access == Watch::kUntouched) {
      watch.access = access.written ? Watch::kWrittenFirst : Watch::kRead;
      watch.readers = bit;
    } else if (watch.access == Watch::kRead) {
      const bool armed = watch.armed_in == arming_;
      if (access.written) {
        watch.armed = (armed ? watch.armed : 0) | watch.readers;
        watch.armed_in = arming_;
      } else {
        if (armed && (watch.armed & bit)) fire = access.slot;
        watch.readers |= bit;
      }
    }
  }
  if (fire == kNone) return {};
  uint32_t& before = fires_[uint64_t{op} << 32 | fire];
  if (before != FlatMap::kAbsent) return {best_since(before + 1), true};
  before = p;
  fired_ = true;
  ++arming_;
  return {};
}

// Rule RECUR, for loops that update nothing: the first op of the segment that
// reads old storages comes again on the same ones (or another does, often), and
// hardly anything passes from one iteration to the next.
StepFinder::Search::Verdict StepFinder::Search::at_recurring_header(uint32_t p) {
  const uint32_t preceding = std::min<uint32_t>(2, p);
  if (header_preceding_ == kNone) {
    header_preceding_ = preceding;
    header_ = header_key(p, preceding);
  }
  const bool is_header = p >= header_preceding_ && header_key(p, header_preceding_) == header_;
  const uint64_t key = is_header ? mix_hash(header_, 1) : header_key(p, preceding);
  uint32_t& index = recurrence_of_[key];
  if (index == FlatMap::kAbsent) {
    index = static_cast<uint32_t>(recurrences_.size());
    recurrences_.emplace_back();
  }
  Recurrence& seen = recurrences_[index];
  ++seen.count;
  if (is_header) header_count_ = seen.count;
  const uint32_t i = std::exchange(seen.before_last, seen.last);
  const uint32_t j = std::exchange(seen.last, p);
  if (seen.count < 2) return {};
  const uint32_t first = std::exchange(seen.cut, best_since(j + 1));
  const uint32_t second = seen.cut;
  if (seen.count < 3) return {};

  if (!is_header) {
    const uint32_t enough = p - j >= kFarApart ? kRecurrencesFarApart : kRecurrencesClose;
    if (header_count_ > 1 || seen.count < enough) return {};
  }
  const uint32_t period = second - first;
  if (period < kShortestPeriod) return {};
  const uint32_t limit = std::max<uint32_t>(2, period / kCarriedFraction);
  const int64_t growth = log_[second].live - log_[first].live;
  const bool collects_results = is_header && growth > 0 && !log_[p].grad_mode;
  if (std::abs(growth) > limit && !collects_results) return {};
  if (!carries_little(i, first, second, limit)) return {};
  return {collects_results ? best_without_growth(j, p) : second, true, kShortestPeriod};
}

// At most `limit` storages born in [from, first) are used in [first, second).
bool StepFinder::Search::carries_little(uint32_t from, uint32_t first, uint32_t second,
                                        uint32_t limit) {
  const int64_t cost = second - first;
  if (scan_credit_ < cost) return false;  // asked too often to be about a header
  scan_credit_ -= cost;
  ++counting_;
  uint32_t carried = 0;
  for (const StepLog::Access& access : log_.accesses(first, second)) {
    const uint32_t born = log_.storages()[access.slot].born;
    if (born == kNone || born < from || born >= first) continue;
    if (std::exchange(watches_[access.slot].counted_in, counting_) == counting_) continue;
    if (++carried > limit) return false;
  }
  return true;
}

uint64_t StepFinder::Search::header_key(uint32_t p, uint32_t preceding) const {
  uint64_t key = mix_hash(log_[p].old_reads, preceding);
  for (uint32_t back = 1; back <= preceding; ++back) key = mix_hash(key, log_[p - back].op);
  return key;
}

// The best cut from `first` on: the latest point of least score, then back over
// ops without tensor inputs, which prepare the next step.
uint32_t StepFinder::Search::best_since(uint32_t first) const {
  const uint32_t cut = *std::lower_bound(minima_.begin(), minima_.end(), first);
  return cut <= first + 1 ? cut : std::max(first + 1, log_[cut].slide_to);
}

// The best cut in (first, last], which is one iteration, when that many results
// are kept that otherwise the earliest point would win.
uint32_t StepFinder::Search::best_without_growth(uint32_t first, uint32_t last) const {
  const int64_t period = last - first, growth = log_[last].live - log_[first].live;
  const auto score = [&](uint32_t p) { return log_[p].score * period - growth * (p - first); };
  uint32_t cut = last;
  for (uint32_t q = last; q > first; --q) {
    if (score(q) < score(cut)) cut = q;
  }
  return cut <= first + 1 ? cut : std::max(first + 1, log_[cut].slide_to);
}

// Where a segment that is too long is cut: in its second half, since what comes
// after the cut is fed again.
uint32_t StepFinder::Search::least_of_all() const {
  uint32_t cut = log_.size() / 2;
  for (uint32_t q = cut; q < log_.size(); ++q) {
    if (log_[q].score < log_[cut].score) cut = q;
  }
  return cut;
}

// True when the step that begins at `cut` begins as none did before.
bool StepFinder::Search::learn_head(const Verdict& verdict) {
  const uint32_t cut = verdict.cut;
  uint64_t ops = 0;
  for (uint32_t q = cut; q < log_.size() && q < cut + kLongestHead; ++q) {
    ops = mix_hash(ops, log_[q].op);
    if (log_[q].old_reads != 0) {
      return heads_.learn({log_[q].old_reads, ops, q + 1 - cut, verdict.shortest});
    }
  }
  return false;
}

StepFinder::StepFinder() : search_(std::make_unique<Search>()) {}
StepFinder::~StepFinder() = default;
StepFinder::StepFinder(StepFinder&&) noexcept = default;
StepFinder& StepFinder::operator=(StepFinder&&) noexcept = default;

std::optional<size_t> StepFinder::feed(const Op& op) { return search_->feed(op); }
void StepFinder::restart() { search_->restart(); }

}  // namespace reprise
