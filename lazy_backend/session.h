/// \file
/// One thread's work on the lazy device: records, verifies, recovers.
///
/// A session stands at a place in its trace tree. While a node of the tree says
/// what comes next it *verifies*: no op is run, results are pending. Where what comes
/// differs from it in sizes alone, and a program serves other sizes, it *infers*: no op is
/// run either, each is written down with what libtorch says of its results' geometry.
/// Otherwise it *records*: each op runs on the backing device and is written down. Any
/// mismatch runs the verified or inferred part and goes on recording, so the program is
/// always right.
///
/// Locks: each session has one. A thread never waits for another session's lock
/// while it holds its own: what is pending elsewhere is completed first
/// (`settle`), then its own lock is taken. Sessions are never freed; a thread
/// that ends completes what is pending and leaves its session, with the traces,
/// to the next thread.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/util/FunctionRef.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "lazy_backend/function_trace.h"
#include "lazy_backend/op_policy.h"
#include "lazy_backend/pattern_tree.h"
#include "lazy_backend/segment.h"
#include "lazy_backend/session_lock.h"
#include "lazy_backend/step_finder.h"
#include "lazy_backend/symbolic_trace.h"
#include "lazy_backend/trace_tree.h"
#include "symint/symbolic_number.h"

namespace reprise {

struct DynamicDim;
class StepRecorder;

class Session final : private GuardListener {
 public:
  /// The calling thread's session.
  static Session& current() {
    Session* session = current_session_;
    return C10_LIKELY(session != nullptr) ? *session : attach();
  }

  /// Captures one call; arguments and results are on the stack, as the
  /// dispatcher has them.
  void call(const c10::OperatorHandle& op, torch::jit::Stack* stack);
  /// Completes what is pending and runs the call: see other_layouts.h.
  void call_at_once(const c10::OperatorHandle& op, torch::jit::Stack* stack);

  /// Ends the segment and launches all that is pending.
  void mark_step(const char* reason);

  /// Makes sure that `storage` has its values in its backing, whichever session
  /// makes them. No session lock may be held.
  static void settle(const LazyStorage* storage);

  // What the unboxed entry needs: see hot_ops.h. The lock must be held.
  SessionLock& lock() { return lock_; }
  /// The node whose children say what may come next; null when there is more to
  /// do than to compare.
  Node* hot_cursor() const { return hot_cursor_; }
  Segment& segment() { return current_; }
  /// The next op goes to the backing device and is not looked at: see `pause_`.
  bool passes() {
    if (C10_LIKELY(pause_ <= 1) || closed_node_ != nullptr) return false;
    --pause_;
    return true;
  }
  /// The call matched `node`, and its results have been made.
  void advance(Node* node) {
    for (const uint32_t slot : node->step->written_inputs) {
      current_.at(slot)->set_pending_in(this);
    }
    cursor_ = hot_cursor_ = node;
    ++ops_verified_;
    if (C10_UNLIKELY(node->cut)) close(node);
  }

  /// A tensor's size is a symbol from now on: see reprise/dynamic.h.
  void mark(at::Tensor& tensor, int64_t dim, const DynamicDim& what);
  /// As it was marked last.
  SymbolicTrace::Range range_of(uint32_t symbol) const { return symbolic_.range_of(symbol); }

  // Explicit compile: see reprise/compile.h. What comes between the two is one segment, with
  // a tree of its own, unless something ends it.
  bool in_function() const { return function_ != 0; }
  /// `whole`: what would end the segment throws. `watch`: `FunctionTrace::tensors` is wanted,
  /// at the price of a slower verification.
  void begin_function(uint64_t function, const std::string& name, bool whole, bool watch);
  FunctionTrace end_function();
  UsedLeaves used_leaves;  ///< of the thread whose session this is, and for it alone
  /// An error has come out of it.
  void abandon_function();
  /// Launches all that is pending here, if anything is.
  void flush(const char* reason);
  /// As above, for what is about to run beside the trace: a compiled function with it in it is
  /// not replayed, which throws where it must be.
  void interrupt(const char* reason);
  /// As `flush` where a step that is pending here is `wanted`.
  void flush_where(c10::function_ref<bool(const Step&)> wanted, const char* reason);

  // For tests, benchmarks and reports.
  void discard();
  void forget();
  void pause(uint64_t ops);
  void explain(std::string& out);
  template <class Visit>
  void with_tree(const Visit& visit) {
    const std::lock_guard<SessionLock> guard(lock_);
    visit(tree_);
  }
  static std::vector<Session*> all();
  /// Whether several threads have one now. From any thread; takes no lock.
  static bool several();

 private:
  explicit Session(uint32_t id) : id_(id) {}
  static Session& attach();
  static void detach(Session* session);
  void end_with_its_thread();
  friend struct ThreadExit;

  void note_guard(const Expression& condition) override;
  void watch_arguments(c10::ArrayRef<c10::IValue> arguments);
  /// A segment of a compiled function ends before the function does.
  void break_function(const char* reason);
  /// The compiled function, if any, is not replayed for this reason. Throws where it must be.
  void note_break(const char* reason);
  /// The end at `node`, as the one that ran last.
  SegmentEnd& reached(Node& node);
  void begin_segment();
  void end_segment(const char* reason);
  void close(Node* node);
  void launch_closed();
  void settle_locked(const LazyStorage* storage);
  const OpPolicy& policy(const c10::OperatorHandle& op);

  bool verify(const c10::OperatorHandle& op, const OpPolicy& policy, torch::jit::Stack* stack);
  bool match(Node* node, const c10::IValue* args, size_t count, bool floats_may_differ,
             bool* differing);
  void generalise(Node* node, const c10::IValue* args, size_t count);
  void recover();
  /// Runs the steps of `log_`, which nobody has run yet, and goes on recording.
  void run_log(Node* node);

  /// From verifying, where the call is like one of another size. Returns whether the call
  /// was taken.
  bool begin_inferring(const c10::OperatorHandle& op, const OpPolicy& policy,
                       torch::jit::Stack* stack);
  bool infer(const c10::OperatorHandle& op, const OpPolicy& policy, torch::jit::Stack* stack);
  /// The pattern that goes on with a step like this; sets which of its floats are dynamic.
  PatternTree::Node* next_pattern(Step& step) const;
  /// It has rarely come to an end.
  bool gives_up_inferring() const { return not_inferred_ > 8 + 2 * inferred_; }
  /// Goes on recording.
  void stop_inferring();
  /// The inferred segment has ended: its end in the tree.
  Node& finish_inferring(const char* reason);

  void record(const c10::OperatorHandle& op, const OpPolicy& policy, torch::jit::Stack* stack);
  void describe(Step& step, const StepRecorder& recorder, const OpPolicy& policy,
                torch::jit::Stack& results, const Step* like, bool inferred);
  void after_recorded();
  void refeed();
  /// What ends where the first steps of the log do.
  enum class Cut : uint8_t {
    kNone,
    kStep,       ///< a step of the user's
    kIteration,  ///< the beginning of a loop whose length changes, or an iteration of it
    kCollection, ///< what has the loop's length: `PatternTree::collection_at_start`
  };
  struct CutPlace {
    Cut cut = Cut::kNone;
    size_t count = 0;
  };
  /// The first steps of the log become a segment. Returns its pattern; null where it has none.
  std::shared_ptr<Pattern> drop_front(size_t count, Cut cut);
  void forget_front(size_t count);
  /// The finder says that the first `count` steps of the log are a step of the user's.
  void drop_found_step(size_t count);
  /// Where the first `count` steps of the log are to be cut, as other sizes were, now that
  /// the last of them is known. `alike`: where they lie among the patterns.
  CutPlace known_cut(const PatternTree::Node* alike, size_t count);
  /// Cuts the first `count` steps of the log where loops in them have another length than
  /// they had before. Returns how many of these steps are left at the front.
  size_t cut_loops(size_t count);
  /// As above for one loop. Returns how many steps this took from the front; 0: there is none.
  size_t cut_loop(size_t count);
  /// A segment ends here among the patterns, and so it does at all sizes that were recorded.
  /// `pattern`: theirs; null where there is nothing to compile.
  void cut_other_sizes(PatternTree::Node* place, const std::shared_ptr<Pattern>& pattern);
  /// `pattern`: where the steps lie among the patterns, if that is known.
  Node* insert(size_t count, Cut cut, PatternTree::Node* pattern = nullptr);
  void make_room();
  std::optional<size_t> feed(const Step& step);
  /// A whole segment was verified: recording pays.
  void found_again() {
    recorded_since_hit_ = 0;
    next_pause_ = kFirstPause;
    patience_ = kPatience;
  }
  void stop_recording(uint64_t ops, const char* reason);

  /// What other sessions owe these arguments. While no lock is held.
  void settle_others(c10::ArrayRef<c10::IValue> arguments);
  void call_outside(const c10::OperatorHandle& op, const OpPolicy& policy,
                    torch::jit::Stack* stack);
  void metadata(const c10::OperatorHandle& op, torch::jit::Stack* stack);
  void resize(const c10::OperatorHandle& op, torch::jit::Stack* stack);
  void set_storage(const c10::OperatorHandle& op, torch::jit::Stack* stack);
  void allocate(const c10::OperatorHandle& op, const OpPolicy& policy,
                torch::jit::Stack* stack);
  void leave(const c10::OperatorHandle& op, const OpPolicy& policy, torch::jit::Stack* stack,
             bool at_once = false);
  void host_write(const at::Tensor& destination, const at::Tensor& source, bool non_blocking);
  /// What `storage` holds is in its backing and no part of the segment will
  /// write it (nor, where `to_write`, reads it) later.
  void detach_from_segment(LazyStorage* storage, bool to_write, const char* reason);

  static thread_local Session* current_session_
      __attribute__((tls_model("initial-exec")));

  SessionLock lock_;
  const uint32_t id_;
  Node* hot_cursor_ = nullptr;
  Node* cursor_ = nullptr;  ///< verifying; null: recording
  uint64_t ops_verified_ = 0;
  Segment current_;

  /// A segment that has ended and waits: it is launched when the next op reads a
  /// tensor, for by then a `zero_grad` has dropped what need not be returned.
  Segment closed_;
  Node* closed_node_ = nullptr;

  TraceTree tree_;
  uint64_t environment_ = 0;
  Node* root_ = nullptr;

  uint64_t function_ = 0;  ///< being traced; 0: none
  bool function_must_be_whole_ = false;
  bool function_watched_ = false;
  std::unordered_map<c10::TensorImpl*, std::pair<uint32_t, c10::weak_intrusive_ptr<c10::TensorImpl>>>
      function_tensors_;
  std::string function_name_, function_broken_by_;

  SymbolicTrace symbolic_;
  /// Where what is recorded may lie among the patterns; null: not, or it is not known.
  PatternTree::Node* alike_ = nullptr;

  // Inferring: where the steps, which are in `log_`, lie among the patterns; null: not.
  PatternTree patterns_;
  PatternTree::Node* pattern_ = nullptr;
  std::unique_ptr<Node> once_;  ///< the end of an inferred segment that is not in the tree
  uint64_t inferred_ = 0;       ///< segments
  uint64_t not_inferred_ = 0;  ///< segments that were begun, and met an op of unknown shape

  // Recording: the steps since the segment's start, and where they lie in the
  // tree (null: off the tree, fed to the finder).
  std::vector<StepPtr> log_;
  Node* follow_ = nullptr;
  StepFinder finder_;
  int64_t live_at_start_ = 0;
  uint64_t ops_recorded_ = 0;
  uint64_t inserts_ = 0;
  uint64_t segments_ = 0;  ///< recorded or run

  // Programs that never repeat. All in ops.
  static constexpr uint64_t kPatience = 100'000;
  static constexpr uint64_t kFirstPause = 400'000;
  static constexpr uint64_t kLongestPause = 10'000'000;
  static constexpr uint64_t kPauseGrowth = 4;
  static constexpr uint64_t kRecordedShare = 64;  ///< one op of so many, between pauses
  uint64_t recorded_since_hit_ = 0;
  uint64_t pause_ = 0;  ///< so many, less one, are not recorded
  uint64_t next_pause_ = kFirstPause;
  uint64_t patience_ = kPatience;

  std::unordered_map<const c10::FunctionSchema*, OpPolicy> policies_;
  std::vector<StepFinder::Argument> finder_arguments_;
  std::vector<uint64_t> finder_created_;
};

}  // namespace reprise
