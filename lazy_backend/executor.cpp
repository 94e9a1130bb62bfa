#include "lazy_backend/executor.h"

#include <ATen/record_function.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "compiler_bridge/compile_queue.h"
#include "lazy_backend/below_user_modes.h"
#include "lazy_backend/device.h"
#include "lazy_backend/distinct_inputs.h"
#include "lazy_backend/interpreter.h"
#include "lazy_backend/log.h"
#include "lazy_backend/metrics.h"
#include "lazy_backend/mix_hash.h"
#include "lazy_backend/program_check.h"
#include "lazy_backend/program_run.h"
#include "lazy_backend/trace_tree.h"
#include "reprise/options.h"

namespace reprise {
namespace {

/// How long the backing device takes, where that is asked: one that works on its own is
/// waited for before and after.
class Stopwatch {
 public:
  Stopwatch(bool wanted, c10::DeviceIndex index) : device_(backing_device_of(index)) {
    if (C10_LIKELY(!wanted)) return;
    wait();
    start_ = Clock::now();
  }
  double seconds() const {
    wait();
    return std::chrono::duration<double>(Clock::now() - start_).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  void wait() const {
    if (!device_.is_cpu()) {
      c10::impl::VirtualGuardImpl(device_.type()).getStream(device_).synchronize();
    }
  }

  c10::Device device_;
  Clock::time_point start_;
};

/// Every live slot is an output of the program, or is made beside it.
bool covers(const Program& program, const Segment& segment) {
  size_t next = 0;
  for (uint32_t slot = 0; slot < segment.size(); ++slot) {
    if (!segment.is_created(slot) || !segment.is_alive(slot)) continue;
    while (next < program.live.size() && program.live[next] < slot) ++next;
    if (next == program.live.size() || program.live[next] != slot) return false;
  }
  return true;
}

void poison(Segment& segment, const std::exception_ptr& error) {
  for (uint32_t slot = 0; slot < segment.size(); ++slot) {
    if (!segment.is_created(slot)) continue;
    if (auto lazy = segment.lock(slot); lazy && !lazy->backing()) lazy->set_error(error);
  }
}

/// A program pays when the verified ops that it would have saved are many.
bool worth_a_compile(const SegmentEnd& end) {
  if (end.once || end.interpreted_only) return false;
  return static_cast<int64_t>(end.interpreted * end.steps.size()) >=
         options().compile_after_ops;
}

std::shared_ptr<Program> request_program(const SegmentEnd& end, const Segment& segment,
                                         bool alone = false) {
  auto program = std::make_shared<Program>();
  program->alone = alone;
  program->name = end.name;
  program->environment = environment_text(segment.environment());
  program->steps = end.steps;
  program->live = segment.live_slots(segment.size());
  if (end.program != nullptr) {
    // Other tensors are alive than were before: one program serves both. The
    // one there is goes on serving until then.
    std::vector<uint32_t> both;
    std::set_union(program->live.begin(), program->live.end(), end.program->live.begin(),
                   end.program->live.end(), std::back_inserter(both));
    program->live = std::move(both);
  }
  for (const StepPtr& step : end.steps) program->device_index = step->device_index;
  if (options().check_programs) {
    program->scratch_bytes = scratch_bytes(program->steps, program->live, segment);
  }
  metrics().programs_requested.add(1);
  CompileQueue::get().push(program);
  return program;
}

void demote_if_slower(SegmentEnd& end) {
  const Contest& contest = end.contest;
  if (!contest.program_lost()) return;
  end.program->problem = c10::str(
      "demoted: lost ", contest.pairs_lost(), " of ", contest.pairs(),
      " turns against the interpreter, the last with ", contest.last_program_seconds() * 1e6,
      " us to ", contest.last_interpreter_seconds() * 1e6, " us");
  end.program->state = Program::State::kDemoted;
  metrics().programs_demoted.add(1);
  REPRISE_LOG(1, end.name, " ", end.program->problem);
}

// A size that runs often gets a program of its own beside the one over symbols.

constexpr uint64_t kOften = 256;
constexpr uint64_t kShareOfAll = 4;  ///< one run of so many is at this size

/// To be called once a run.
void request_own_program(SegmentEnd& end, const Segment& segment) {
  const uint64_t all = end.pattern->note_run(), runs = end.replayed + end.interpreted;
  if (C10_LIKELY(runs % kOften != 0) || runs == 0 || kShareOfAll * runs < all) return;
  if (end.own != nullptr || !end.about_own.empty()) return;
  if (!options().specialize_sizes || !options().demote_slow_programs || !options().compile) return;
  end.own = request_program(end, segment, /*alone=*/true);
}

/// Its own program is there: it is checked, and takes turns with the other one.
void begin_contest_with_own(SegmentEnd& end) {
  const std::shared_ptr<Program> own = std::exchange(end.own, nullptr);
  if (own->state != Program::State::kReady) {
    end.about_own = "no program for this size alone: " + own->problem;
    return;
  }
  const SegmentEnd::General general{end.program, end.contest, end.checked};
  end.serve(own);
  if (general.program->state == Program::State::kReady) {
    end.general = general;
    end.about_own = "a program for this size alone takes turns with the one over symbols";
  } else {
    end.about_own = "a program for this size alone, since the one over symbols was slower than "
                    "the interpreter";
  }
}

void return_to_general(SegmentEnd& end, std::string why) {
  const SegmentEnd::General general = std::move(end.general);
  end.serve(general.program);
  end.contest = general.contest;
  end.checked = general.checked;
  end.about_own = std::move(why);
}

void end_contest_with_own(SegmentEnd& end) {
  const Contest& contest = end.contest;
  if (!contest.decided()) return;
  const std::string turns = c10::str(contest.pairs(), " turns against the one over symbols");
  if (contest.program_lost()) {
    return_to_general(end, c10::str("a program for this size alone lost ", contest.pairs_lost(),
                                    " of ", turns));
  } else {
    end.about_own = c10::str("a program for this size alone, won ",
                             contest.pairs() - contest.pairs_lost(), " of ", turns);
    end.general = {};
  }
  REPRISE_LOG(1, end.name, ": ", end.about_own);
}

/// Takes the check's decision over, where there is one.
/// Of what makes a program's inputs those of one size.
uint64_t hash_of_sizes(const Program& program) {
  uint64_t hash = 0;
  for (const ProgramInput& input : program.inputs) {
    for (const int64_t number : input.geometry.dims) hash = mix_hash(hash, static_cast<uint64_t>(number));
    hash = mix_hash(hash, static_cast<uint64_t>(input.geometry.offset));
  }
  return hash;
}

void conclude(SegmentEnd& end) {
  if (!end.check->decided()) return;
  const std::string problem = end.check->problem();
  end.check = nullptr;
  SharedProgram* shared = end.program->shared.get();
  if (problem.empty()) {
    end.checked = true;
    if (shared != nullptr) shared->note_checked(hash_of_sizes(*end.program));
    metrics().programs_checked.add(1);
    return;
  }
  if (shared != nullptr) shared->wrong = true;
  end.program->problem = problem;
  end.program->state = Program::State::kFailed;
  metrics().program_failures.add(1);
  TORCH_WARN("reprise: the program of ", end.name, " is not used: ", problem);
}

bool share(Program& program, const Program& like, const Segment& segment) {
  program.live = like.live;
  // Of the views that they go through, they may use other ones.
  return covers(program, segment) && alike(program.steps, like.steps, /*floats_may_differ=*/true) &&
         CompileQueue::get().share(program, like);
}

/// As `share`, where the inputs of `like` are distinct and some of the program's coincide.
bool share_as_if_distinct(Program& program, const Program& like, const Segment& segment,
                          Pattern& pattern) {
  auto distinct = as_if_distinct(program.steps, like.steps, /*floats_may_differ=*/false);
  if (!distinct) {
    pattern.note_no_case();
    return false;
  }
  const std::vector<uint32_t>& slots = distinct->slots;
  const auto as_they_were = [&](std::vector<uint32_t> live) {
    for (uint32_t& slot : live) slot = slots[slot];  // in the same order: no input is among them
    return live;
  };
  program.live = as_they_were(like.live);
  if (!covers(program, segment)) return false;
  program.live = like.live;
  program.steps.swap(distinct->steps);
  if (!CompileQueue::get().share(program, like)) return false;
  program.steps.swap(distinct->steps);
  program.live = as_they_were(like.live);
  for (ProgramInput& input : program.inputs) {
    if (input.kind == ProgramInput::Kind::kSlot) input.index = slots[input.index];
  }
  for (ProgramOutput& output : program.outputs) output.slot = slots[output.slot];
  return true;
}

/// Takes the program over symbols that another size has, where it serves this one.
void share_program(SegmentEnd& end, const Segment& segment) {
  const std::shared_ptr<Program> like = end.pattern->program();
  if (like == nullptr || end.unserved_by.lock() == like) return;
  end.unserved_by = like;
  auto program = std::make_shared<Program>();
  program->name = end.name;
  program->environment = environment_text(segment.environment());
  program->steps = without_unused_views(end.steps);
  program->device_index = like->device_index;
  const bool shared = end.pattern->is_case()
                          ? share_as_if_distinct(*program, *like, segment, *end.pattern)
                          : share(*program, *like, segment);
  if (!shared) {
    end.pattern->note_unserved();
    return;
  }
  end.serve(std::move(program));
}

/// The program's first run, beside the interpreter's.
void begin_check(SegmentEnd& end, Segment& segment) {
  RECORD_FUNCTION(end.interpret_range, std::vector<c10::IValue>());
  ++end.interpreted;
  metrics().segments_interpreted.add(1);
  end.check = std::make_unique<ProgramCheck>(*end.program, segment);
  // A size may never come again, and others wait for what is found at this one.
  while (end.program->shared != nullptr && !end.check->decided()) end.check->run_disturbed();
  conclude(end);
}

}  // namespace

SegmentEnd& end_of(Node& node) {
  if (!node.end) {
    node.end = std::make_unique<SegmentEnd>();
    static std::atomic<uint64_t> next{1};
    node.end->name = c10::str("segment-", next.fetch_add(1));
    node.end->replay_range = "reprise::replay " + node.end->name;
    node.end->interpret_range = "reprise::interpret " + node.end->name;
  }
  return *node.end;
}

void launch(Node& node, Segment& segment) {
  SegmentEnd& end = end_of(node);
  if (end.steps.empty()) end.steps = TraceTree::path(&node);
  if (end.program == nullptr && end.pattern != nullptr && options().compile) {
    share_program(end, segment);
  }

  // Backing tensors are plain ones whatever mode the user is in.
  const NormalTensors normal_tensors;
  const BelowUserModes below;

  if (end.wider != nullptr && end.wider->state != Program::State::kQueued) {
    if (end.wider->state == Program::State::kReady) {
      end.serve(end.wider);
      end.about_own.clear();  // whose contest is over
    }
    end.wider = nullptr;
  }
  if (C10_UNLIKELY(end.own != nullptr && end.own->state != Program::State::kQueued)) {
    begin_contest_with_own(end);
  }
  if (C10_UNLIKELY(end.general.program != nullptr &&
                   end.program->state != Program::State::kReady)) {
    return_to_general(end, "no program for this size alone: " + end.program->problem);
  }
  if (end.program != nullptr && end.program->shared != nullptr && end.pattern != nullptr) {
    request_own_program(end, segment);
  }
  Program* program = end.program.get();
  const SharedProgram* shared = program == nullptr ? nullptr : program->shared.get();
  if (C10_UNLIKELY(shared != nullptr && shared->wrong &&
                   program->state == Program::State::kReady)) {
    end.check = nullptr;
    program->problem = "it gave other values than the interpreter at another size";
    program->state = Program::State::kFailed;
  }
  const bool ready = program != nullptr && program->state == Program::State::kReady;
  bool usable = ready && covers(*program, segment);
  bool trusted = end.checked || !options().check_programs ||
                 (shared != nullptr && end.check == nullptr && shared->checked());
  if (usable && !trusted) {
    if (end.check == nullptr) return begin_check(end, segment);
    end.check->run_disturbed();
    conclude(end);
    usable = trusted = end.checked;
  }
  const bool timing =
      ready && trusted && options().demote_slow_programs && !end.contest.decided() &&
      !(shared != nullptr && shared->faster());
  const bool its_turn = !timing || end.contest.next() == Contest::Runner::kProgram;
  Program* general = end.general.program.get();  // takes the interpreter's turns
  const bool generals_turn = !its_turn && general != nullptr &&
                             general->state == Program::State::kReady && covers(*general, segment);
  if (usable && (its_turn || generals_turn)) {
    Program* runs = its_turn ? program : general;
    RECORD_FUNCTION(end.replay_range, std::vector<c10::IValue>());
    const Stopwatch stopwatch(timing, runs->device_index);
    try {
      run_program(*runs, segment);
      ++end.replayed;
      metrics().segments_replayed.add(1);
      if (generals_turn) {
        end.contest.interpreter_took(stopwatch.seconds());
        end_contest_with_own(end);
      } else if (timing) {
        end.contest.program_took(stopwatch.seconds());
      }
      return;
    } catch (const std::exception& error) {
      runs->problem = error.what();
      runs->state = Program::State::kFailed;
      metrics().program_failures.add(1);
      TORCH_WARN("reprise: the program of ", end.name, " failed and is not used any more: ",
                 error.what());
      if (runs->writes_inputs) {
        // It may have changed some of them already: running the steps again
        // could apply an update twice.
        poison(segment, std::current_exception());
        throw;
      }
    }
  }

  {
    RECORD_FUNCTION(end.interpret_range, std::vector<c10::IValue>());
    const Stopwatch stopwatch(timing, end.steps.front()->device_index);
    interpret(end.steps, segment);
    ++end.interpreted;
    metrics().segments_interpreted.add(1);
    if (timing && program->state == Program::State::kReady) {  // it may just have failed
      const int lead = end.contest.lead();
      end.contest.interpreter_took(stopwatch.seconds());
      if (shared != nullptr) program->shared->turns_ahead += end.contest.lead() - lead;
      demote_if_slower(end);
    }
  }
  if (!options().compile || !worth_a_compile(end)) return;
  const bool none = end.program == nullptr;
  if (none && end.pattern != nullptr &&
      (end.pattern->request_marked(end.name, end.steps, segment) ||
       end.pattern->request_another(end.name, end.steps, segment))) {
    return;
  }
  const bool other_outputs = !none && end.wider == nullptr &&
                             end.program->state == Program::State::kReady &&
                             !covers(*end.program, segment);
  if (!none && !other_outputs) return;
  if (end.pattern != nullptr && !end.pattern->take_own_program()) {
    if (end.about_own.empty()) {
      end.about_own = "not compiled: so many other sizes have programs of their own (most_size_programs)";
    }
    return;
  }
  (none ? end.program : end.wider) = request_program(end, segment);
}

}  // namespace reprise
