#include "lazy_backend/session.h"

#include <ATen/Parallel.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <dlfcn.h>
#include <execinfo.h>
#include <link.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <sstream>
#include <string_view>
#include <thread>
#include <unordered_set>

#include "compiler_bridge/compile_queue.h"
#include "lazy_backend/below_user_modes.h"
#include "lazy_backend/device.h"
#include "lazy_backend/executor.h"
#include "lazy_backend/exit_report.h"
#include "lazy_backend/interpreter.h"
#include "lazy_backend/log.h"
#include "lazy_backend/match.h"
#include "lazy_backend/metrics.h"
#include "lazy_backend/shape_inference.h"
#include "lazy_backend/step_recorder.h"
#include "reprise/device.h"
#include "reprise/options.h"

namespace reprise {

thread_local Session* Session::current_session_ = nullptr;

namespace {

constexpr const char* kAnOpThrew = "an op threw an error";
/// From so many on, a step's random numbers are not to lie beside the next one's.
constexpr size_t kManyRandomBytes = size_t{1} << 20;
/// Of a loop whose length changes, so many are written down where it is found.
constexpr int kIterationsKept = 2;

/// Sessions are never freed: a storage may name one that is pending there.
struct Sessions {
  std::mutex mutex;
  std::vector<Session*> all;
  std::vector<Session*> idle;
};
Sessions& sessions() {
  static auto* instance = new Sessions;
  return *instance;
}
std::atomic<int> attached_sessions{0};

uint64_t next_epoch() {
  static std::atomic<uint64_t> next{1};
  return next.fetch_add(1, std::memory_order_relaxed);
}

bool any_lazy(c10::ArrayRef<c10::IValue> values) {
  bool found = false;
  visit_tensors(values, [&](const at::Tensor& tensor) { found = found || is_lazy(tensor); });
  return found;
}

/// Whether a symbolic integer is compared by the user's code: libtorch's own asks a hundred
/// things of sizes that say nothing of the program.
bool asked_by_the_program() {
  void* frames[24];
  const int count = ::backtrace(frames, 24);
  for (int k = 0; k < count; ++k) {
    dl_find_object object;  // of glibc 2.35; dladdr() looks through all of libtorch's symbols
    if (::_dl_find_object(frames[k], &object) != 0) return true;
    const std::string_view file(object.dlfo_link_map->l_name);
    const auto is = [&](std::string_view name) { return file.find(name) != std::string_view::npos; };
    if (is("libreprise") || is("libc10")) continue;
    return !is("libtorch");
  }
  return false;
}

/// The lazy device that a call works on.
c10::DeviceIndex device_index_of(c10::ArrayRef<c10::IValue> values, const OpPolicy& policy) {
  c10::DeviceIndex index = -1;
  visit_tensors(values, [&](const at::Tensor& tensor) {
    if (index < 0 && is_lazy(tensor)) index = tensor.device().index();
  });
  if (index < 0 && policy.device_argument >= 0) {
    const c10::IValue& device = values[static_cast<size_t>(policy.device_argument)];
    if (device.isDevice()) index = device.toDevice().index();
  }
  return lazy_index(index);
}

/// Whether all index tensors are lazy ones of integers.
bool takes_positions(const c10::IValue& indices) {
  for (const c10::IValue& index : indices.toListRef()) {
    if (!index.isTensor() || !index.toTensor().defined()) continue;
    const at::Tensor& tensor = index.toTensor();
    const bool mask = tensor.scalar_type() == c10::kBool || tensor.scalar_type() == c10::kByte;
    if (mask || !is_lazy(tensor)) return false;
  }
  return true;
}

/// Whether a call that names a device makes its result where its first lazy tensor lives.
bool stays_on_device(const OpPolicy& how, c10::ArrayRef<c10::IValue> arguments) {
  const c10::IValue& wanted = arguments[static_cast<size_t>(how.device_argument)];
  if (!wanted.isDevice() || !any_lazy(arguments)) return true;
  const c10::Device device = wanted.toDevice();
  return device.is_lazy() && lazy_index(device.index()) == device_index_of(arguments, how);
}

/// Whether a call becomes a step, given where its tensors live.
bool is_traced(const OpPolicy& how, c10::ArrayRef<c10::IValue> arguments) {
  switch (how.kind) {
    case OpPolicy::Kind::kTrace:
      if (how.device_argument >= 0 && !stays_on_device(how, arguments)) return false;
      if (C10_UNLIKELY(how.index_argument >= 0)) {
        return takes_positions(arguments[static_cast<size_t>(how.index_argument)]);
      }
      return how.dropout_argument < 0 ||
             arguments[static_cast<size_t>(how.dropout_argument)].toDouble() == 0;
    case OpPolicy::Kind::kCopy: {
      const at::Tensor &to = arguments[0].toTensor(), &from = arguments[1].toTensor();
      return is_lazy(to) && is_lazy(from) && to.device() == from.device();
    }
    case OpPolicy::Kind::kToCopy: {
      return is_lazy(arguments[0].toTensor()) && stays_on_device(how, arguments);
    }
    default:
      return false;
  }
}

}  // namespace

/// Completes a thread's pending work when it ends.
struct ThreadExit {
  Session* session = nullptr;
  ~ThreadExit() {
    if (session != nullptr) Session::detach(session);
  }
};

Session& Session::attach() {
  // The streams of this thread must outlive its last step: thread-locals are destroyed in the
  // reverse order of their construction.
  if (const c10::Device device = backing_device_of(-1); !device.is_cpu()) {
    c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  }
  static thread_local ThreadExit exit;
  Sessions& registry = sessions();
  const std::lock_guard guard(registry.mutex);
  if (registry.idle.empty()) {
    const auto id = static_cast<uint32_t>(registry.all.size() + 1);
    registry.all.push_back(new Session(id));
    registry.idle.push_back(registry.all.back());
  }
  Session* session = registry.idle.back();
  registry.idle.pop_back();
  attached_sessions.fetch_add(1, std::memory_order_relaxed);
  exit.session = current_session_ = session;
  GuardListener::current() = session;
  // A program may run here before any op of libtorch has.
  at::internal::lazy_init_num_threads();
  const std::lock_guard<SessionLock> own(session->lock_);
  session->begin_segment();
  return *session;
}

void Session::detach(Session* session) {
  try {
    if (::getpid() == static_cast<pid_t>(::syscall(SYS_gettid))) {
      // The process is ending, and objects that an op needs may be gone already.
      // Destructors of thread-locals run before all that `exit` does: the last
      // moment at which a compile can be stopped before Python's libraries go.
      CompileQueue::get().stop_for_exit();
      write_exit_report();
      session->discard();
    } else {
      session->end_with_its_thread();
    }
  } catch (const std::exception& error) {
    TORCH_WARN("reprise: a pending step failed when its thread ended: ", error.what());
  }
  current_session_ = nullptr;
  GuardListener::current() = nullptr;
  Sessions& registry = sessions();
  const std::lock_guard guard(registry.mutex);
  registry.idle.push_back(session);
  attached_sessions.fetch_sub(1, std::memory_order_relaxed);
}

void Session::end_with_its_thread() {
  constexpr const char* kReason = "the thread ended";
  const c10::Device device = backing_device_of(-1);
  if (device.is_cpu()) return mark_step(kReason);
  // What libtorch keeps for each thread to work on a GPU, handles of libraries among it, may
  // be gone already, but for the streams: see `attach`.
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  std::exception_ptr error;
  std::thread helper([&] {
    try {
      const c10::StreamGuard guard(stream);
      current_session_ = this;
      mark_step(kReason);
    } catch (...) {
      error = std::current_exception();
    }
    current_session_ = nullptr;
  });
  helper.join();
  if (error) std::rethrow_exception(error);
}

bool Session::several() { return attached_sessions.load(std::memory_order_relaxed) > 1; }

std::vector<Session*> Session::all() {
  Sessions& registry = sessions();
  const std::lock_guard guard(registry.mutex);
  return registry.all;
}

const OpPolicy& Session::policy(const c10::OperatorHandle& op) {
  const auto [found, missing] = policies_.try_emplace(&op.schema());
  if (C10_UNLIKELY(missing)) {
    found->second = policy_of(op);
    found->second.number = static_cast<uint32_t>(policies_.size());
  }
  return found->second;
}

// ---------------------------------------------------------------------------
// Segments

void Session::begin_segment() {
  current_.clear();
  environment_ = environment_key();
  current_.begin(next_epoch(), id_, this, environment_);
  root_ = tree_.root(environment_);
  log_.clear();
  symbolic_.begin();
  alike_ = any_symbolic() || patterns_.has_boundaries() ? patterns_.root(environment_) : nullptr;
  finder_.restart();
  live_at_start_ = LazyStorage::live_on_this_thread();
  cursor_ = root_->child != nullptr && pause_ == 0 ? root_ : nullptr;
  follow_ = cursor_ == nullptr ? root_ : nullptr;
  // The first op goes the boxed way, which looks at the environment.
  hot_cursor_ = nullptr;
}

void Session::begin_function(uint64_t function, const std::string& name, bool whole, bool watch) {
  const std::lock_guard<SessionLock> guard(lock_);
  end_segment("a compiled function begins");
  function_ = traced_function() = function;
  function_must_be_whole_ = whole;
  function_name_ = name;
  function_broken_by_.clear();
  function_watched_ = watch;
  function_tensors_.clear();
  begin_segment();
}

void Session::watch_arguments(c10::ArrayRef<c10::IValue> arguments) {
  visit_tensors(arguments, [&](const at::Tensor& tensor) {
    if (!is_lazy(tensor)) return;
    const int64_t slot = current_.find(lazy_storage(tensor));
    if (slot < 0 || current_.is_created(static_cast<uint32_t>(slot))) return;
    function_tensors_.try_emplace(tensor.unsafeGetTensorImpl(), static_cast<uint32_t>(slot),
                                  tensor.getIntrusivePtr());
  });
}

void Session::break_function(const char* reason) {
  const bool empty = log_.empty() && (cursor_ == nullptr || cursor_ == root_);
  if (!empty) note_break(reason);
}

void Session::note_break(const char* reason) {
  if (function_ == 0 || !function_broken_by_.empty()) return;
  function_broken_by_ = reason;
  TORCH_CHECK(!function_must_be_whole_, "reprise: ", function_name_,
              " cannot be replayed as one program: ", reason, " here");
}

void Session::abandon_function() {
  const std::lock_guard<SessionLock> guard(lock_);
  function_ = traced_function() = 0;
  end_segment("an error came out of a compiled function");
}

FunctionTrace Session::end_function() {
  const std::lock_guard<SessionLock> guard(lock_);
  function_ = traced_function() = 0;
  FunctionTrace trace;
  trace.broken_by = function_broken_by_;
  if (pause_ > 0 && trace.broken_by.empty()) trace.broken_by = "recording is paused";
  Node* node = nullptr;
  if (trace.broken_by.empty()) {
    trace.verified = cursor_ != nullptr && cursor_ != root_;
    trace.steps = log_;
    node = trace.verified ? cursor_ : nullptr;
    for (uint32_t slot = 0; slot < current_.size(); ++slot) {
      if (current_.is_created(slot)) {
        trace.inputs.emplace_back();
        if (current_.is_alive(slot)) trace.created.emplace_back(slot, current_.lock(slot));
      } else {
        trace.inputs.push_back(
            c10::intrusive_ptr<LazyStorage>::reclaim_copy(current_.at(slot)));
      }
    }
    trace.scalars = current_.scalars;
    for (auto& [impl, tensor] : function_tensors_) trace.tensors.push_back(std::move(tensor));
  }
  function_tensors_.clear();
  end_segment("a compiled function ended");
  if (node == nullptr || !node->end) return trace;
  const SegmentEnd& end = *node->end;
  trace.segment = end.name;
  trace.steps = end.steps;
  if (end.program == nullptr) return trace;
  switch (end.program->state.load()) {
    case Program::State::kReady: {
      const SharedProgram* shared = end.program->shared.get();
      const bool trusted = end.checked || !options().check_programs ||
                           (shared != nullptr && shared->checked());
      // It has shown that it is no slower than the interpreter.
      constexpr int kFewTurns = 8;
      const bool fast = !options().demote_slow_programs || end.contest.decided() ||
                        (shared != nullptr && shared->faster()) ||
                        (end.contest.pairs() >= kFewTurns && end.contest.lead() >= 0);
      if (trusted && fast && end.program->compared_with_record) trace.program = end.program;
      break;
    }
    case Program::State::kQueued:
      break;
    default:
      trace.no_program = end.program->problem;
      break;
  }
  return trace;
}

void Session::flush(const char* reason) {
  const std::lock_guard<SessionLock> guard(lock_);
  if (closed_node_ == nullptr && current_.empty()) return;
  end_segment(reason);
}

void Session::interrupt(const char* reason) {
  flush(reason);
  const std::lock_guard<SessionLock> guard(lock_);
  note_break(reason);
}

void Session::flush_where(c10::function_ref<bool(const Step&)> wanted, const char* reason) {
  const std::lock_guard<SessionLock> guard(lock_);
  const auto leads_by = [&](const Node* node) {
    while (node != nullptr && node->step != nullptr && !wanted(*node->step)) node = node->parent;
    return node != nullptr && node->step != nullptr;
  };
  const auto is_wanted = [&](const StepPtr& step) { return wanted(*step); };
  const bool inferred = pattern_ != nullptr && std::any_of(log_.begin(), log_.end(), is_wanted);
  if (!leads_by(closed_node_) && !leads_by(cursor_) && !inferred) return;
  if (function_ != 0 && function_broken_by_.empty()) function_broken_by_ = reason;  // nothing is thrown
  end_segment(reason);
}

void Session::end_segment(const char* reason) {
  if (C10_UNLIKELY(function_ != 0)) break_function(reason);
  launch_closed();
  if (cursor_ != nullptr) {
    if (cursor_ == root_) {
      // Nothing has happened, or only what left no step.
      if (!current_.empty() || environment_ != environment_key()) begin_segment();
      return;
    }
    Node* node = cursor_;
    found_again();
    reached(*node).reason = reason;
    cursor_ = hot_cursor_ = nullptr;
    struct Begin {  // whatever happens, the next segment begins clean
      Session* session;
      ~Begin() { session->begin_segment(); }
    } begin{this};
    metrics().ops_verified.add(std::exchange(ops_verified_, 0));
    launch(*node, current_);
    return;
  }
  if (pattern_ != nullptr) {
    Node& node = finish_inferring(reason);
    struct Begin {
      Session* session;
      ~Begin() { session->begin_segment(); }
    } begin{this};
    launch(node, current_);
    return;
  }
  cut_loops(log_.size());
  if (!log_.empty()) {
    metrics().segments_recorded.add(1);
    SegmentEnd& end = reached(*insert(log_.size(), Cut::kNone));
    end.reason = reason;
    end.at_error = end.at_error || reason == kAnOpThrew;
    ++end.recorded;
    end.symbols = symbolic_.text();
    REPRISE_LOG(1, end.name, ": recorded ", log_.size(), " ops, ended by ", reason);
  }
  begin_segment();
}

SegmentEnd& Session::reached(Node& node) {
  SegmentEnd& end = end_of(node);
  end.last_run = ++segments_;
  return end;
}


void Session::close(Node* node) {
  // The tree says that a step ends here. It is launched when the next op reads.
  launch_closed();
  found_again();
  metrics().ops_verified.add(std::exchange(ops_verified_, 0));
  current_.swap(closed_);
  closed_node_ = node;
  begin_segment();
}

void Session::launch_closed() {
  if (closed_node_ == nullptr) return;
  struct Finish {
    Session* session;
    ~Finish() {
      session->closed_.clear();
      session->closed_node_ = nullptr;
      session->hot_cursor_ = session->cursor_ == session->root_ ? nullptr : session->cursor_;
    }
  } finish{this};
  Node* node = closed_node_;
  SegmentEnd& end = reached(*node);
  if (end.reason.empty()) end.reason = "the step ends here";
  launch(*node, closed_);
}

void Session::mark_step(const char* reason) {
  const std::lock_guard<SessionLock> guard(lock_);
  end_segment(reason);
}

void Session::settle(const LazyStorage* storage) {
  while (Session* owner = storage->pending_in()) {
    const std::lock_guard<SessionLock> guard(owner->lock_);
    if (storage->pending_in() == owner) owner->settle_locked(storage);
  }
}

void Session::settle_locked(const LazyStorage* storage) {
  launch_closed();
  if (storage->pending_in() == this) end_segment("a value was read");
}

void Session::detach_from_segment(LazyStorage* storage, bool to_write, const char* reason) {
  if (closed_node_ != nullptr &&
      (storage->pending_in() == this || (to_write && closed_.find(storage) >= 0))) {
    launch_closed();
  }
  const int64_t slot = current_.find(storage);
  if (slot < 0) return;
  const auto bound = static_cast<uint32_t>(slot);
  if (to_write || current_.is_created(bound) || current_.is_written(bound) ||
      storage->pending_in() == this) {
    end_segment(reason);
  }
}

void Session::discard() {
  const std::lock_guard<SessionLock> guard(lock_);
  metrics().ops_verified.add(std::exchange(ops_verified_, 0));
  closed_.clear();
  closed_node_ = nullptr;
  if (cursor_ == nullptr && pattern_ == nullptr) {
    end_segment("it was recorded only");  // which has run
  } else {
    begin_segment();
  }
}

void Session::forget() {
  const std::lock_guard<SessionLock> guard(lock_);
  end_segment("traces were forgotten");
  tree_.clear();
  patterns_.clear();
  once_ = nullptr;
  finder_ = StepFinder();
  found_again();
  pause_ = 0;
  begin_segment();
}

void Session::pause(uint64_t ops) {
  const std::lock_guard<SessionLock> guard(lock_);
  stop_recording(ops, "recording was paused");
}

// ---------------------------------------------------------------------------
// One call

void Session::settle_others(c10::ArrayRef<c10::IValue> arguments) {
  visit_tensors(arguments, [&](const at::Tensor& tensor) {
    if (!is_lazy(tensor)) return;
    Session* owner = lazy_storage(tensor)->pending_in();
    if (owner != nullptr && owner != this) settle(lazy_storage(tensor));
  });
}

namespace {

/// An integer or a Boolean that is cast to `dtype`, as the float that does the same.
void make_float(c10::IValue& number, c10::ScalarType dtype) {
  if (!number.isBool() && !number.isInt()) return;
  const int64_t value = number.isBool() ? static_cast<int64_t>(number.toBool()) : number.toInt();
  if (can_hold(dtype, value)) number = static_cast<double>(value);
}

}  // namespace

void Session::call(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto arguments = call_arguments(op, *stack);
  settle_others(arguments);

  const std::lock_guard<SessionLock> guard(lock_);
  if (C10_UNLIKELY(any_symbolic())) {
    symbolic_.take_numbers({stack->data() + (stack->size() - arguments.size()), arguments.size()});
  }
  const OpPolicy& how = policy(op);
  // Where sizes are marked, an integer may be one of them.
  if (C10_UNLIKELY(how.cast_argument >= 0) && !any_symbolic()) {
    make_float(stack->end()[how.cast_argument - static_cast<int>(arguments.size())],
               cast_dtype(how, arguments));
  }
  if (C10_UNLIKELY(how.counts_versions)) {
    for (const uint8_t k : how.writes) {
      visit_tensors(arguments.slice(k, 1), [](const at::Tensor& tensor) {
        if (is_lazy(tensor) && !tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
      });
    }
  }
  if (!is_traced(how, arguments)) {
    call_outside(op, how, stack);
    return;
  }
  const bool reads = any_lazy(arguments);
  if (!reads && how.device_argument >= 0) {
    const c10::IValue& device = arguments[static_cast<size_t>(how.device_argument)];
    if (device.isDevice() && !device.toDevice().is_lazy()) {
      leave(op, how, stack);
      return;
    }
  }
  if (reads) {
    if (how.host_tensors) {
      bool host = false;
      visit_tensors(arguments, [&](const at::Tensor& tensor) {
        host = host || (!is_lazy(tensor) && tensor.dim() > 0);
      });
      if (host) {
        leave(op, how, stack);
        return;
      }
    }
    launch_closed();
  } else if (how.randomness != Randomness::kNone && closed_.random_bytes() >= kManyRandomBytes &&
             !closed_.writes_inputs()) {
    // Eager has let go of these numbers before it draws the next ones. (A step that trains
    // has gradients, which are to go first.)
    launch_closed();
  }
  if ((!reads || cursor_ == root_ || log_.empty()) && environment_ != environment_key()) {
    end_segment("the default dtype or another setting changed");
  }
  if (pause_ > 0) {
    --pause_;
    if (pause_ == 0) {
      begin_segment();
    } else {
      leave(op, how, stack);
      return;
    }
  }
  if (pattern_ != nullptr) {
    if (infer(op, how, stack)) return;
    stop_inferring();
  }
  if (cursor_ != nullptr) {
    if (verify(op, how, stack)) return;
    if (cursor_->end && cursor_->end->at_error) {
      // It is about to throw again: nothing is left of it but the segment's end.
      end_segment(kAnOpThrew);
      if (cursor_ != nullptr && verify(op, how, stack)) return;
    }
    if (cursor_ != nullptr && begin_inferring(op, how, stack)) return;
    if (cursor_ != nullptr) {
      REPRISE_LOG(2, "no record goes on with this call of ", op.operator_name(), " after ",
                  cursor_->depth, " ops");
      recover();
    }
  }
  record(op, how, stack);
}

bool Session::match(Node* node, const c10::IValue* args, size_t count, bool floats_may_differ,
                    bool* differing) {
  const Step& step = *node->step;
  const uint32_t size = current_.size();
  const size_t scalars = current_.scalars.size();
  Matcher matcher(current_, floats_may_differ);
  bool same = true;
  for (size_t k = 0; same && k < count; ++k) same = matcher.match(step.args[k], args[k]);
  if (differing != nullptr) *differing = matcher.differing;
  if (!same || floats_may_differ) {
    current_.rollback(size);
    current_.scalars.resize(scalars);
  }
  return same;
}

void Session::generalise(Node* node, const c10::IValue* args, size_t count) {
  // A closed segment may go through this node with the numbers it has now.
  launch_closed();
  auto general = std::make_shared<Step>(*node->step);
  for (size_t k = 0; k < count; ++k) {
    Arg& arg = general->args[k];
    if (arg.kind != Arg::Kind::kDouble && arg.kind != Arg::Kind::kNumber) continue;
    Matcher exact(current_);
    // Such arguments bind no slots; a scalar that it takes is taken back.
    const size_t scalars = current_.scalars.size();
    if (!exact.match(arg, args[k]) && exact.differing) {
      if (!may_be_dynamic(*general, k)) return;  // another branch, whose sibling keeps its programs
      arg.dynamic = true;
    }
    current_.scalars.resize(scalars);
  }
  node->step = std::move(general);
  TraceTree::drop_programs(node);
  REPRISE_LOG(2, "a number of ", node->step->op.operator_name(),
              " changes from step to step: it becomes an input");
}

bool Session::verify(const c10::OperatorHandle& op, const OpPolicy& how,
                     torch::jit::Stack* stack) {
  const auto arguments = call_arguments(op, *stack);
  const c10::IValue* args = arguments.data();
  const size_t count = arguments.size();
  const c10::DeviceIndex device_index = device_index_of(arguments, how);
  const auto is_candidate = [&](const Node* child) {
    return child->step->op == op && child->step->device_index == device_index;
  };
  Node* found = nullptr;
  const uint32_t size = current_.size();
  const size_t scalars = current_.scalars.size();
  const Candidates candidates(cursor_, [&] { return CallHash::of(arguments); });
  for (Candidates each = candidates; Node* child = each.get(); each.next()) {
    if (is_candidate(child) && match(child, args, count, false, nullptr)) {
      found = child;
      break;
    }
  }
  if (found == nullptr && !how.constant_floats) {
    for (Candidates each = candidates; Node* child = each.get(); each.next()) {
      if (!is_candidate(child) || !match(child, args, count, true, nullptr)) continue;
      generalise(child, args, count);
      if (match(child, args, count, false, nullptr)) {
        found = child;
        break;
      }
    }
  }
  if (found == nullptr) return false;

  const Step& step = *found->step;
  if (C10_UNLIKELY(step.randomness != Randomness::kNone)) current_.draw_random(step, size, scalars);
  c10::SmallVector<c10::IValue, 4> results;
  const std::function<c10::IValue(const Result&)> make = [&](const Result& result) -> c10::IValue {
    switch (result.kind) {
      case Result::Kind::kNone:
        return at::Tensor();
      case Result::Kind::kNew:
        return current_.make_new(result);
      case Result::Kind::kAlias: {
        const c10::IValue* source =
            result.arg >= 0 ? &args[static_cast<size_t>(result.arg)] : nullptr;
        return current_.make_alias(result, source != nullptr && source->isTensor()
                                      ? source->toTensor().key_set()
                                      : c10::DispatchKeySet());
      }
      case Result::Kind::kArgument:
        return args[static_cast<size_t>(result.arg)];
      case Result::Kind::kConstant:
        return result.constant;
      case Result::Kind::kList: {
        c10::List<at::Tensor> list;
        for (const Result& item : *result.list) list.push_back(make(item).toTensor());
        return list;
      }
    }
    TORCH_INTERNAL_ASSERT(false);
  };
  for (const Result& result : step.results) results.push_back(make(result));
  if (C10_UNLIKELY(function_watched_ && function_ != 0)) watch_arguments(arguments);
  torch::jit::drop(*stack, count);
  for (c10::IValue& result : results) stack->push_back(std::move(result));
  advance(found);
  const bool watches = function_watched_ && function_ != 0;
  if (closed_node_ != nullptr || watches) hot_cursor_ = nullptr;  // more to do than to compare
  return true;
}

void Session::recover() {
  launch_closed();
  Node* node = cursor_;
  cursor_ = hot_cursor_ = nullptr;
  follow_ = node;
  if (node == root_) return;
  metrics().ops_verified.add(std::exchange(ops_verified_, 0));
  log_ = TraceTree::path(node);
  for (const StepPtr& step : log_) symbolic_.follow(*step);
  alike_ = nullptr;
  run_log(node);
}

void Session::run_log(Node* node) {
  metrics().mismatches.add(1);
  try {
    const bool compiled = node != nullptr && node->end && node->end->program &&
                          node->end->program->state == Program::State::kReady;
    if (compiled) {
      reached(*node);
      launch(*node, current_);
    } else {
      const NormalTensors normal_tensors;
      interpret(log_, current_);
    }
  } catch (...) {
    begin_segment();
    throw;
  }
  current_.settle();
  for (const StepPtr& step : log_) {
    for (const uint32_t slot : step->written) current_.set_written(slot);
  }
}

// ---------------------------------------------------------------------------
// Inferring

bool Session::begin_inferring(const c10::OperatorHandle& op, const OpPolicy& how,
                              torch::jit::Stack* stack) {
  patterns_.refresh();
  PatternTree::Node* pattern = patterns_.root(environment_);
  if (!pattern->ready || gives_up_inferring()) return false;
  std::vector<StepPtr> steps = TraceTree::path(cursor_);
  for (const StepPtr& step : steps) {
    pattern = PatternTree::find(pattern, *step);
    if (pattern == nullptr || !pattern->ready) return false;
  }
  Node* cursor = std::exchange(cursor_, nullptr);
  hot_cursor_ = nullptr;
  pattern_ = pattern;
  log_ = std::move(steps);
  for (const StepPtr& step : log_) symbolic_.follow(*step);
  if (infer(op, how, stack)) {
    metrics().ops_verified.add(std::exchange(ops_verified_, 0));
    return true;
  }
  pattern_ = nullptr;
  log_.clear();
  symbolic_.begin();
  cursor_ = cursor;
  return false;
}

bool Session::infer(const c10::OperatorHandle& op, const OpPolicy& how,
                    torch::jit::Stack* stack) {
  const auto arguments = call_arguments(op, *stack);
  StepRecorder recorder(op, how, current_, device_index_of(arguments, how),
                        StepRecorder::Device::kMeta);
  const int64_t live = LazyStorage::live_on_this_thread() - live_at_start_;
  torch::jit::Stack values(arguments.begin(), arguments.end());
  std::shared_ptr<Step> step;
  PatternTree::Node* next = nullptr;
  try {
    const BelowUserModes below;
    recorder.take_arguments(values);
    next = next_pattern(recorder.step());
    if (how.shapes == nullptr) how.shapes = std::make_shared<ShapeInference>(op);
    if (next != nullptr && how.shapes->infer(*next->step, values)) {
      step = recorder.take_results(values);
      if (step != nullptr && !next->step->alike(*step, /*floats_may_differ=*/false)) step = nullptr;
      if (step != nullptr && step->randomness != Randomness::kNone) {
        current_.random.push_back(draw(*step));
      }
    }
  } catch (const std::exception& error) {
    // Perhaps the user's error, which the backing device will throw.
    REPRISE_LOG(2, "cannot infer ", op.operator_name(), ": ", error.what());
    step = nullptr;
  }
  if (step == nullptr) {
    if (next != nullptr) {
      ++not_inferred_;
      REPRISE_LOG(2, "it is not known what ", op.operator_name(), " returns for these sizes");
    }
    values.clear();
    recorder.undo();
    return false;
  }
  for (const Arg& arg : step->args) {
    if (arg.dynamic) current_.scalars.push_back(arg.number());
  }
  step->live_before = static_cast<int32_t>(live);
  describe(*step, recorder, how, values, next->step.get(), /*inferred=*/true);
  for (const uint32_t slot : step->written_inputs) current_.at(slot)->set_pending_in(this);
  log_.push_back(std::move(step));
  metrics().ops_inferred.add(1);
  torch::jit::drop(*stack, arguments.size());
  for (c10::IValue& value : values) stack->push_back(std::move(value));
  pattern_ = next;
  if (next->cut) close(&finish_inferring("the step ends here"));
  return true;
}

PatternTree::Node* Session::next_pattern(Step& step) const {
  if (pattern_->repeats && pattern_->step->takes_alike(step, /*floats_may_differ=*/false)) {
    return pattern_;
  }
  for (const auto& next : pattern_->next) {
    const Step& like = *next->step;
    if (!next->ready || !like.takes_alike(step, /*floats_may_differ=*/true)) continue;
    // Numbers that are inputs of the program are so here as well.
    for (size_t k = 0; k < like.args.size(); ++k) step.args[k].dynamic = like.args[k].dynamic;
    if (like.takes_alike(step, /*floats_may_differ=*/false)) return next.get();
  }
  return nullptr;
}

void Session::stop_inferring() {
  launch_closed();
  pattern_ = nullptr;
  alike_ = nullptr;
  run_log(nullptr);
  refeed();
}

Node& Session::finish_inferring(const char* reason) {
  PatternTree::Node* place = std::exchange(pattern_, nullptr);
  ++inferred_;
  found_again();
  const std::shared_ptr<Pattern>& pattern = PatternTree::pattern_of(*place);
  const bool comes_again = pattern->note_inferred(log_);
  Node* node = nullptr;
  if (comes_again || !pattern->is_trusted()) {
    node = insert(log_.size(), place->cut ? Cut::kStep : Cut::kNone, place);
  } else {
    // A size that may never come again is not worth a place in the tree.
    launch_closed();  // which may be such a one
    once_ = std::make_unique<Node>();
    node = once_.get();
    SegmentEnd& end = end_of(*node);
    end.pattern = pattern;
    end.steps = log_;
    end.once = true;
    if (only_aliases(log_)) {
      end.interpreted_only = true;
    } else {
      pattern->add_size(end.name, log_, current_);
    }
  }
  SegmentEnd& end = reached(*node);
  end.reason = reason;
  ++end.inferred;
  return *node;
}

// ---------------------------------------------------------------------------
// Recording

void Session::record(const c10::OperatorHandle& op, const OpPolicy& how,
                     torch::jit::Stack* stack) {
  CompileQueue::get().warm_up();
  const auto arguments = call_arguments(op, *stack);
  StepRecorder recorder(op, how, current_, device_index_of(arguments, how));
  std::vector<c10::IValue> watched;
  if (C10_UNLIKELY(function_watched_ && function_ != 0)) watched = arguments.vec();
  const int64_t live = LazyStorage::live_on_this_thread() - live_at_start_;
  std::shared_ptr<Step> step;
  try {
    const BelowUserModes below;
    recorder.take_arguments(*stack);
    op.callBoxed(stack);
    step = recorder.take_results(*stack);
    watch_arguments(watched);
  } catch (...) {
    current_.rollback(recorder.first_slot());
    // A program that goes on may do the same in every step.
    if (log_.empty()) {
      begin_segment();
    } else {
      end_segment(kAnOpThrew);
    }
    throw;
  }
  if (step == nullptr) {
    current_.rollback(recorder.first_slot());
    end_segment("an op that no trace can say");
    return;
  }
  step->live_before = static_cast<int32_t>(live);
  if (alike_ != nullptr) alike_ = PatternTree::find(alike_, *step);
  describe(*step, recorder, how, *stack, alike_ == nullptr ? nullptr : alike_->step.get(),
           /*inferred=*/false);
  log_.push_back(std::move(step));
  ++ops_recorded_;
  metrics().ops_recorded.add(1);
  after_recorded();
  if (C10_UNLIKELY(++recorded_since_hit_ > patience_)) {
    // Nothing has come again for so long: writing it down does not pay. Try again
    // later, and later still.
    patience_ = std::min(kPatience, next_pause_ / kRecordedShare);
    REPRISE_LOG(1, "nothing repeats: ", next_pause_, " ops run without being recorded");
    stop_recording(std::exchange(next_pause_, std::min(kPauseGrowth * next_pause_, kLongestPause)),
                   "nothing repeats");
  }
}

void Session::describe(Step& step, const StepRecorder& recorder, const OpPolicy& how,
                       torch::jit::Stack& results, const Step* like, bool inferred) {
  if (C10_LIKELY(!any_symbolic())) return;
  const size_t count = step.results.size();
  if (how.shapes == nullptr) how.shapes = std::make_shared<ShapeInference>(step.op);
  const BelowUserModes below;
  symbolic_.describe(step, recorder.argument_shapes(),
                     {results.data() + (results.size() - count), count},
                     inferred ? nullptr : how.shapes.get(), like);
}

void Session::note_guard(const Expression& condition) {
  // Not while this thread's session has the lock, where libtorch asks; nor is it worth a wait.
  const std::unique_lock<SessionLock> guard(lock_, std::try_to_lock);
  if (!guard.owns_lock()) return;
  // What is verified or inferred was asked the same before.
  if ((cursor_ != nullptr && cursor_ != root_) || pattern_ != nullptr) return;
  if (asked_by_the_program()) symbolic_.note_guard(condition, log_.size());
}

void Session::stop_recording(uint64_t ops, const char* reason) {
  end_segment(reason);
  recorded_since_hit_ = 0;
  pause_ = ops == 0 ? 0 : ops + 1;
  begin_segment();
}

std::optional<size_t> Session::feed(const Step& step) {
  if (!options().find_steps || function_ != 0) return std::nullopt;
  finder_arguments_.clear();
  finder_created_.clear();
  for_each_tensor(step.args, [&](const Arg& arg) {
    const LazyStorage* storage = current_.at(arg.slot);
    StepFinder::Argument argument;
    argument.storage = storage->uid();
    argument.written = std::find(step.written.begin(), step.written.end(), arg.slot) !=
                       step.written.end();
    argument.leaf = storage->is_parameter();
    argument.fresh = current_.is_fresh(arg.slot);
    finder_arguments_.push_back(argument);
  });
  for_each_result(step.results, [&](const Result& result) {
    if (result.kind == Result::Kind::kNew) {
      finder_created_.push_back(current_.at(result.slot)->uid());
    }
  });
  StepFinder::Op op;
  op.op = policy(step.op).number;
  op.arguments = finder_arguments_;
  op.created = finder_created_;
  op.grad_mode = step.grad_mode;
  op.live = step.live_before;
  return finder_.feed(op);
}

void Session::after_recorded() {
  if (follow_ != nullptr) {
    follow_ = TraceTree::find(follow_, *log_.back());
    if (follow_ == nullptr) {
      refeed();
    } else if (follow_->cut) {
      drop_front(log_.size(), Cut::kStep);
    }
  } else if (const CutPlace known = known_cut(alike_, log_.size()); known.cut != Cut::kNone) {
    drop_front(known.count, known.cut);
    refeed();
  } else if (const auto cut = feed(*log_.back())) {
    drop_found_step(*cut);
    refeed();
  }
}

void Session::drop_found_step(size_t count) {
  count = cut_loops(count);
  if (count > 0) drop_front(count, Cut::kStep);
}

Session::CutPlace Session::known_cut(const PatternTree::Node* alike, size_t count) {
  if (C10_LIKELY(!patterns_.has_boundaries()) || function_ != 0) return {};
  if (alike != nullptr && alike->boundary) return {Cut::kIteration, count};
  const size_t collection = patterns_.collection_at_start(environment_, {log_.data(), count});
  if (collection == 0) return {};
  // A run of views is over when something else comes.
  const bool over = collection < count || has_tensor_list(*log_[collection - 1]);
  return over ? CutPlace{Cut::kCollection, collection} : CutPlace{};
}

void Session::refeed() {
  while (!log_.empty()) {
    finder_.restart();
    follow_ = root_;
    alike_ = patterns_.has_boundaries() ? patterns_.root(environment_) : nullptr;
    CutPlace place;
    for (size_t k = 0; k < log_.size() && place.cut == Cut::kNone; ++k) {
      if (follow_ != nullptr) follow_ = TraceTree::find(follow_, *log_[k]);
      if (alike_ != nullptr) alike_ = PatternTree::find(alike_, *log_[k]);
      if (follow_ == nullptr && !patterns_.has_boundaries()) break;
      const bool here = follow_ != nullptr && follow_->cut;
      place = here ? CutPlace{Cut::kStep, k + 1} : known_cut(alike_, k + 1);
    }
    if (place.cut != Cut::kNone) {
      drop_front(place.count, place.cut);
      continue;
    }
    size_t found = 0;
    for (size_t k = 0; follow_ == nullptr && k < log_.size() && found == 0; ++k) {
      found = feed(*log_[k]).value_or(0);
    }
    if (found == 0) return;
    drop_found_step(found);
  }
}

size_t Session::cut_loops(size_t count) {
  while (count > 0) {
    const size_t taken = cut_loop(count);
    if (taken == 0) break;
    count -= taken;
  }
  return count;
}

size_t Session::cut_loop(size_t count) {
  if (!options().dynamic_shapes || function_ != 0) return 0;
  alike_ = nullptr;
  const auto loop = patterns_.loop_of_other_length(environment_, log_, count);
  if (!loop) return 0;
  REPRISE_LOG(1, "a loop of ", loop->period, " ops has another length than before, ",
              loop->end - loop->begin, " ops: it is cut from what surrounds it");
  // Views of any number right before it are a segment of their own: in front of it, the end
  // of the first one would not be known.
  const size_t run = patterns_.run_before(environment_, log_, loop->begin);
  if (loop->begin > run) drop_front(loop->begin - run, Cut::kIteration);
  if (run > 0) {
    patterns_.note_collection(environment_, *log_[0]);
    drop_front(run, Cut::kCollection);
  }
  if (loop->collection) {
    const c10::OperatorHandle op = log_[0]->op;
    drop_front(loop->end - loop->begin, Cut::kCollection);
    launch_closed();
    for (Node* child = root_->child; child != nullptr; child = child->sibling) {
      const Step& step = *child->step;
      if (child->cut || step.op != op || !has_tensor_list(step)) continue;
      child->cut = end_of(*child).interpreted_only = true;
      tree_.cut_off(child);
    }
    return loop->end;
  }
  // Two iterations, to see which of their numbers change; the others are like these.
  const int kept = kIterationsKept + (loop->first_coincides ? 1 : 0);
  size_t done = loop->begin;
  std::shared_ptr<Pattern> first;
  for (int k = 0; k < kept && done + loop->period <= loop->end; ++k) {
    const auto pattern = drop_front(loop->period, Cut::kIteration);
    if (pattern != nullptr) pattern->note_loop();
    if (k == 0) first = pattern;
    if (k == 1 && loop->first_coincides && first && pattern) first->become_case_of(pattern);
    done += loop->period;
  }
  if (done < loop->end) forget_front(loop->end - done);
  return loop->end;
}

void Session::make_room() {
  // Programs are counted now and then: that is a walk through the tree.
  constexpr uint64_t kNowAndThen = 64;
  if (!tree_.takes_too_much() && ++inserts_ % kNowAndThen != 0) return;
  launch_closed();
  follow_ = nullptr;
  if (const size_t forgotten = tree_.make_room()) {
    metrics().segments_forgotten.add(forgotten);
    REPRISE_LOG(1, "traces take too much room: ", forgotten, " segments are forgotten");
  }
}

Node* Session::insert(size_t count, Cut cut, PatternTree::Node* pattern) {
  make_room();
  alike_ = nullptr;
  std::vector<std::vector<int64_t>> others;
  if (pattern == nullptr && options().dynamic_shapes && cut != Cut::kCollection) {
    pattern = patterns_.insert(environment_, log_, count);
    others = symbolic_.other_sizes();
  }
  if (pattern != nullptr && !any_symbolic()) PatternTree::share_steps(*pattern, {log_.data(), count});
  Node* node = root_;
  for (size_t k = 0; k < count; ++k) node = tree_.extend(node, log_[k]);
  const std::span<const StepPtr> steps(log_.data(), count);
  const bool nothing_to_compile = cut == Cut::kCollection || only_aliases(steps) ||
                                  (cut == Cut::kIteration && nothing_to_fuse(steps));
  if (nothing_to_compile) end_of(*node).interpreted_only = true;
  if (pattern != nullptr) {
    SegmentEnd& end = end_of(*node);
    const auto& shared = PatternTree::pattern_of(*pattern);
    if (end.pattern != shared && !nothing_to_compile) {
      end.pattern = shared;
      shared->add_size(end.name, {steps.begin(), steps.end()}, current_, std::move(others));
    }
    patterns_.await(pattern);
    pattern->cut = pattern->cut || (cut != Cut::kNone && !pattern->repeats);
    if (cut == Cut::kIteration && !pattern->boundary && !pattern->repeats) {
      patterns_.set_boundary(pattern);
      cut_other_sizes(pattern, nothing_to_compile ? nullptr : shared);
    }
  }
  if (cut == Cut::kCollection && !node->cut) {  // what came after it lies behind
    launch_closed();
    follow_ = nullptr;
    tree_.cut_off(node);
  }
  node->cut = node->cut || cut != Cut::kNone;
  return node;
}

void Session::cut_other_sizes(PatternTree::Node* place, const std::shared_ptr<Pattern>& pattern) {
  launch_closed();
  follow_ = nullptr;
  std::unordered_set<const PatternTree::Node*> way;
  for (const PatternTree::Node* node = place; node != nullptr; node = node->parent) way.insert(node);
  std::vector<Node*> ends;
  std::vector<std::pair<Node*, PatternTree::Node*>> open{{root_, patterns_.root(environment_)}};
  while (!open.empty()) {
    const auto [node, at] = open.back();
    open.pop_back();
    if (at == place) {
      ends.push_back(node);
      continue;
    }
    for (Node* child = node->child; child != nullptr; child = child->sibling) {
      PatternTree::Node* next = PatternTree::find(at, *child->step);
      if (next != nullptr && way.contains(next)) open.emplace_back(child, next);
    }
  }
  for (Node* node : ends) {
    node->cut = true;
    tree_.cut_off(node);
    SegmentEnd& end = end_of(*node);
    end.interpreted_only = pattern == nullptr;
    if (pattern == nullptr || end.pattern == pattern) continue;
    end.pattern = pattern;
    pattern->add_size(end.name, TraceTree::path(node), current_);
  }
}

std::shared_ptr<Pattern> Session::drop_front(size_t count, Cut cut) {
  metrics().segments_recorded.add(1);
  Node* node = insert(count, cut);
  SegmentEnd& end = reached(*node);
  if (end.recorded++ == 0) {
    end.reason = cut == Cut::kStep ? "the step ends here" : "a loop whose length changes";
    end.symbols = symbolic_.text();
    REPRISE_LOG(1, end.name, ": recorded a step of ", count, " ops");
  }
  std::shared_ptr<Pattern> pattern = end.pattern;
  forget_front(count);
  return pattern;
}

void Session::forget_front(size_t count) {
  if (count == log_.size()) {
    begin_segment();
    return;
  }
  // What was recorded since belongs to the next segment, whose slots have other
  // numbers.
  std::vector<StepPtr> before(log_.begin() + static_cast<std::ptrdiff_t>(count), log_.end());
  std::vector<int64_t> slots(current_.size(), -1);
  std::vector<bool> created;
  uint32_t next = 0;
  std::vector<std::shared_ptr<Step>> after;
  const int32_t live = before.front()->live_before;
  live_at_start_ += live;
  for (const StepPtr& step : before) {
    after.push_back(renumber(*step, slots, next, created));
    after.back()->live_before -= live;
  }
  current_.renumber(slots, created, before.front()->first_slot, next_epoch());
  log_.clear();
  for (auto& step : after) {
    for (const uint32_t slot : step->written) {
      if (!created[slot] && !current_.is_written(slot)) step->written_inputs.push_back(slot);
      current_.set_written(slot);
    }
    log_.push_back(std::move(step));
  }
  cursor_ = hot_cursor_ = nullptr;
  follow_ = root_;
}

void Session::explain(std::string& out) {
  const std::lock_guard<SessionLock> guard(lock_);
  out += c10::str("session ", id_, ": ", tree_.size(), " nodes of ",
                  tree_.bytes() >> 10, " KiB, ", ops_recorded_, " ops recorded\n");
  if (inferred_ > 0) {
    out += c10::str("  ", inferred_, " segments of new sizes were inferred, not recorded\n");
  }
  tree_.for_each_end([&](const Node& node) {
    const SegmentEnd& end = *node.end;
    out += c10::str("  ", end.name, ": ", node.depth, " ops, recorded ", end.recorded,
                    end.inferred > 0 ? c10::str("x, inferred ", end.inferred) : "",
                    "x, interpreted ", end.interpreted, "x, replayed ", end.replayed,
                    "x; ended by: ", end.reason, "\n");
    std::istringstream symbols(end.symbols);
    for (std::string line; std::getline(symbols, line);) out += "    " + line + "\n";
    if (!end.about_own.empty()) out += "    " + end.about_own + "\n";
    const Program* program = end.program.get();
    if (program == nullptr) return;
    switch (program->state.load()) {
      case Program::State::kQueued:
        out += "    being compiled\n";
        break;
      case Program::State::kReady:
        out += c10::str("    program: ", program->inputs.size(), " inputs, ",
                        program->outputs.size(), " outputs, ",
                        program->from_store ? "loaded from the artifact store"
                        : program->compile_seconds > 0
                            ? c10::str("compiled in ", program->compile_seconds, " s")
                            : "shared with other sizes",
                        "\n");
        if (!program->reason.empty()) out += "    " + program->reason + "\n";
        if (!program->symbols.empty()) out += "    over symbols: " + program->symbols + "\n";
        if (const std::string about = program->runner->about(); !about.empty()) {
          out += "    " + about + "\n";
        }
        if (program->shared != nullptr && !program->shared->guards.empty()) {
          out += "    where " + program->shared->guards + "\n";
        }
        break;
      case Program::State::kFailed:
        out += c10::str("    failed: ", program->problem, "\n");
        break;
      case Program::State::kDemoted:
        out += c10::str("    ", program->problem, "\n");
        break;
    }
  });
}

}  // namespace reprise
